"""What a launch refuses, and what it says."""

import pytest

from configs.hardware import launch

GIVEN = {
    "name": "run-1",
    "topology": "v5p-128",
    "project": "my-project",
    "zone": "us-east5-a",
    "output": "gs://bucket/run",
    "train": "pretrain-7b",
}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("topology", "v5p-100", "v5p-64 and v5p-128"),
        ("topology", "h100-8", "is no TPU slice"),
        ("name", "Run_1", "name='Run_1'; it must be lower-case"),
        ("name", "a" * 41, "at most 40"),
        ("project", "", "project=''; it must be"),
        ("zone", "us-east5", "zone='us-east5'; it must be a zone such as us-east5-a"),
        ("zone", "", "zone=''"),
        ("output", "runs/mine", "must be gs://BUCKET/FOLDER"),
        ("output", "gs://", "must be gs://BUCKET/FOLDER"),
        ("package", "my wheel", "package=.my wheel.; it must be gs:"),
        ("train", "", "train is empty"),
        ("train", "pretrain-7b --data.paths 'x", "is not shell"),
        ("train", "pretrain-7b --output x", "holds --output"),
        ("max_restarts", -1, "max_restarts=-1"),
        ("grace_seconds", 0, "grace_seconds=0"),
    ],
)
def test_a_wrong_field_is_named(field, value, says):
    with pytest.raises(ValueError, match=says):
        launch.LaunchConfig(**GIVEN | {field: value})


@pytest.mark.parametrize(
    ("target", "fields", "says"),
    [
        ("queued-resource", {}, "needs package; give --package"),
        ("gke", {"image": "x"}, "needs cluster"),
        ("xpk", {"cluster": "x"}, "needs image"),
        (
            "gke",
            {"cluster": "x", "image": "x", "package": "gs://b/p"},
            "package=.* means nothing to gke",
        ),
        (
            "queued-resource",
            {"package": "gs://b/p.whl", "topology": "tpu7x-128"},
            "do not offer tpu7x",
        ),
        ("gke", {"cluster": "x", "image": "x", "topology": "2xv5e-8"}, "several machines"),
    ],
)
def test_a_way_that_does_not_suit_is_refused(target, fields, says):
    with pytest.raises(ValueError, match=says):
        launch.LaunchConfig(**GIVEN | fields).check_target(target)
