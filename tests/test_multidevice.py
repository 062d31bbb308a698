"""Runs tests/multidevice in processes of their own: a process has one number of devices."""

from pathlib import Path

import pytest

from tests.support import own_process

# Each shard is a process, of about equal seconds; files of one shard share imports.
SHARDS = {
    "engine": ["test_engine.py"],
    "training": ["test_training.py", "test_loss.py"],
    "experts": ["test_experts.py", "test_quantised.py"],
    "steps": ["test_train_step.py", "test_context.py", "test_paged.py"],
}
FOLDER = Path(__file__).parent / "multidevice"
pytestmark = pytest.mark.timeout(1800)
TAKES = pytest.mark.takes(seconds=300, reason="a shard of the multi-device tests")


def test_every_file_is_in_one_shard():
    files = sorted(path.name for path in FOLDER.glob("test_*.py"))
    assert sorted(file for shard in SHARDS.values() for file in shard) == files


@TAKES
@pytest.mark.parametrize("shard", SHARDS)
def test_on_eight_devices(shard):
    _run(shard, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [name for name in SHARDS if name != "engine"])
def test_the_slow_ones_on_eight_devices(shard):
    _run(shard, "slow")


def _run(shard: str, chosen: str) -> None:
    files = [f"tests/multidevice/{file}" for file in SHARDS[shard]]
    own_process.run_pytest("-m", chosen, *files, setting="QWEN_JAX_MULTIDEVICE")
