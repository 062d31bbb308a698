"""Where a process finds its place in a cluster; starting one is tested in tests/train."""

import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from configs.cluster import ClusterConfig
from partitioning.processes import cluster as cluster_lib


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    assert cluster_lib.find(ClusterConfig()) is None
    with cluster_lib.joined(ClusterConfig()):
        cluster_lib.stage("anything", seconds=0)
        assert cluster_lib.gather({"a": 1}) == [{"a": 1}]
        cluster_lib.agree({"a": 1})


def test_explicit(monkeypatch):
    config = ClusterConfig(launch="explicit", coordinator="a:1", num_processes=4, process_id=0)
    assert cluster_lib.find(config) == cluster_lib.Membership("a:1", 4, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    found = cluster_lib.find(ClusterConfig(launch="explicit"))
    assert found == cluster_lib.Membership("b:2", 3, 2)
    assert cluster_lib.find(config) == cluster_lib.Membership("a:1", 4, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='two' is not a whole number"):
        cluster_lib.find(ClusterConfig(launch="explicit"))


def test_slurm(monkeypatch):
    for name, value in {
        "JOB_ID": "4242", "STEP_NODELIST": "node[07-09,12]", "NTASKS": "4", "PROCID": "3",
        "LOCALID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    port = 4242 % 4096 + 61440
    found = cluster_lib.find(ClusterConfig(launch="auto"))
    assert found == cluster_lib.Membership(f"node07:{port}", 4, 3, (1,))
    # What is said goes before what is found.
    found = cluster_lib.find(ClusterConfig(launch="auto", coordinator="node08:9"))
    assert found == cluster_lib.Membership("node08:9", 4, 3, (1,))


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
    found = cluster_lib.find(ClusterConfig(launch="auto"))
    assert found == cluster_lib.Membership("slice-0-0.set:8482", 4, 3)


def test_nothing_to_be_found_says_what_to_give():
    with pytest.raises(ValueError, match="num_processes, cluster.process_id not known") as error:
        cluster_lib.find(ClusterConfig(launch="auto", coordinator="a:1"))
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
        ClusterConfig(**values)


def test_a_process_beyond_the_last():
    config = ClusterConfig(launch="explicit", coordinator="a:1", num_processes=4, process_id=4)
    with pytest.raises(ValueError, match="process_id=4 must be below cluster.num_processes=4"):
        cluster_lib.find(config)
