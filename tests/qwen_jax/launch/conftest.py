"""Jobs to launch."""

from collections.abc import Callable

import pytest

from configs.hardware import launch

WAYS = {
    "queued-resource": {"package": "gs://bucket/qwen_jax-0.1.0-py3-none-any.whl"},
    "xpk": {"cluster": "mine", "image": "us-docker.pkg.dev/p/r/qwen-jax:1"},
    "gke": {"cluster": "mine", "image": "us-docker.pkg.dev/p/r/qwen-jax:1"},
}


@pytest.fixture
def job() -> Callable[..., launch.LaunchConfig]:
    """A job for a target, changed field by field."""

    def make(target: launch.Target, **fields: object) -> launch.LaunchConfig:
        given = {
            "name": "run-1",
            "topology": "v5p-128",
            "project": "my-project",
            "zone": "us-east5-a",
            "output": "gs://bucket/run",
            "train": "pretrain-7b --data.paths '/data/a b.jsonl'",
        }
        return launch.LaunchConfig(**given | WAYS[target] | fields)

    return make
