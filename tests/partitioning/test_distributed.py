"""Where a process finds its place in a cluster; starting one is tested in tests/train."""

import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from configs import schema
from partitioning import distributed


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    assert distributed.find(schema.Cluster()) is None
    with distributed.joined(schema.Cluster()):
        distributed.stage("anything", seconds=0)
        assert distributed.gather({"a": 1}) == [{"a": 1}]
        distributed.agree({"a": 1})


def test_explicit(monkeypatch):
    config = schema.Cluster(launch="explicit", coordinator="a:1", num_processes=4, process_id=0)
    assert distributed.find(config) == distributed.Membership("a:1", 4, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    found = distributed.find(schema.Cluster(launch="explicit"))
    assert found == distributed.Membership("b:2", 3, 2)
    assert distributed.find(config) == distributed.Membership("a:1", 4, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='two' is not a whole number"):
        distributed.find(schema.Cluster(launch="explicit"))


def test_slurm(monkeypatch):
    for name, value in {
        "JOB_ID": "4242", "STEP_NODELIST": "node[07-09,12]", "NTASKS": "4", "PROCID": "3",
        "LOCALID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    port = 4242 % 4096 + 61440
    found = distributed.find(schema.Cluster(launch="auto"))
    assert found == distributed.Membership(f"node07:{port}", 4, 3, (1,))
    # What is said goes before what is found.
    found = distributed.find(schema.Cluster(launch="auto", coordinator="node08:9"))
    assert found == distributed.Membership("node08:9", 4, 3, (1,))


def test_gke_with_tpus_in_two_slices(monkeypatch):
    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "slice-1-0.set,slice-1-1.set",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0.set:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    found = distributed.find(schema.Cluster(launch="auto"))
    assert found == distributed.Membership("slice-0-0.set:8482", 4, 3)


def test_nothing_to_be_found_says_what_to_give():
    with pytest.raises(ValueError, match="num_processes, cluster.process_id not known") as error:
        distributed.find(schema.Cluster(launch="auto", coordinator="a:1"))
    assert "JAX_PROCESS_ID" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "a:1"}, "have no effect with cluster.launch=single"),
        ({"silence_seconds": 0}, "silence_seconds"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        schema.Cluster(**values)


def test_a_process_beyond_the_last():
    config = schema.Cluster(launch="explicit", coordinator="a:1", num_processes=4, process_id=4)
    with pytest.raises(ValueError, match="process_id=4 must be below cluster.num_processes=4"):
        distributed.find(config)
