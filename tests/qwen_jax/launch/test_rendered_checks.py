"""A launch file that was made wrong is told what is wrong with it."""

import pytest

from qwen_jax.launch import render, rendered_checks


@pytest.mark.parametrize(
    ("target", "file", "old", "new", "says"),
    [
        ("gke", "jobset.yaml", "completions: 16", "completions: 15", "completions and paral"),
        ("gke", "jobset.yaml", "replicas: 1", "replicas: 2", "rents 128 chips; v5p-128 is 64"),
        ("gke", "jobset.yaml", "topology: 4x4x4", "topology: 4x4x8", "4x4x8; v5p-128 is 4x4x4"),
        ("gke", "jobset.yaml", "limits: {google.com/tpu: 4}", "limits: {google.com/tpu: 8}",
         "requests and limits"),
        ("gke", "jobset.yaml", "kind: JobSet", "kind: Job", "is .*'Job'"),
        ("gke", "jobset.yaml", "action: FailJobSet", "action: Fail", "unknown action 'Fail'"),
        ("gke", "jobset.yaml", "backoffLimit: 0", "backoffLimit: 1", "backoffLimit 0"),
        ("gke", "jobset.yaml", "containers:", "container:", "not a JobSet"),
        ("gke", "jobset.yaml", "  replicatedJobs:", " replicatedJobs:", "not a JobSet"),
        ("gke", "node_pools.sh", "--num-nodes=16", "--num-nodes=8", "rents 32 chips"),
        ("gke", "node_pools.sh", "ct5p-hightpu-4t", "ct5p-hightpu-1t", "rents 16 chips"),
        ("gke", "node_pools.sh", "--spot", "--cheap", "has no option --cheap"),
        ("queued-resource", "create.sh", "v5p-128", "v5p-256", "rents 128 chips"),
        ("queued-resource", "create.sh", "--node-id", "--node-name", "no option --node-name"),
        ("queued-resource", "startup.sh", "esac", "", "syntax error"),
        ("queued-resource", "delete.sh", "resources delete", "resources drop", "unknown command"),
        ("xpk", "workload.sh", "--num-slices=1", "--num-slices=3", "rents 192 chips"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(job, target, file, old, new, says):
    made = job(target)
    files = render.render(made, target=target)
    assert old in files[file]
    files[file] = files[file].replace(old, new)
    with pytest.raises(ValueError, match=rf"^{file}: .*{says}"):
        rendered_checks.check(files, made)


def test_options_are_those_of_the_command_not_of_what_it_runs(job):
    made = job("xpk", train="pretrain-7b --mesh.fsdp=-1")
    (text,) = render.render(made, target="xpk").values()
    ((command, options),) = rendered_checks.commands(text)
    assert command == "xpk workload create"
    assert "--command" in options and "--mesh" not in options
