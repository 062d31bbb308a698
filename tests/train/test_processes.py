"""Processes that train together: the numbers of one process, and how a run ends without one.

On the CPU, through gloo. Several processes add in another order than one, so that their losses are
compared with a tolerance of float32; on one number of processes they are equal bit for bit.
"""

import dataclasses
import shutil
import signal
import time
from pathlib import Path

import pytest

from configs.cluster import ClusterConfig
from configs.data import DataConfig
from configs.mesh import MeshConfig
from configs.train import CheckpointConfig, TrainConfig
from tests.train import processes

ROUNDING = 1e-5  # relative, after a few steps


@pytest.fixture
def config(tmp_path, helpers):
    helpers.write_text(tmp_path / "text", documents=200)
    helpers.write_tokenizer(tmp_path / "tokenizer")
    return helpers.tiny_config(
        model=dataclasses.replace(helpers.tiny_model(), vocab_size=260, eos_token_ids=(256,)),
        output=str(tmp_path / "run"),
        num_steps=6,
        eval_every_steps=3,
        eval_batches=2,
        checkpoint=CheckpointConfig(every_steps=2, keep=2),
        data=DataConfig(
            paths=(str(tmp_path / "text"),), tokenizer=str(tmp_path / "tokenizer"),
            sequence_length=32, eval_fraction=0.1,
        ),
    )  # fmt: skip


def alone(config: TrainConfig, cache: Path) -> list[dict]:
    """The metrics of the same run in one process."""
    config = dataclasses.replace(
        config, output=f"{config.output}-alone", mesh=MeshConfig(), cluster=ClusterConfig()
    )
    assert processes.start(config, cache).wait() == 0
    return processes.metrics(config.output)


def assert_close(got: list[dict], want: list[dict]) -> None:
    assert [(row["kind"], row["step"]) for row in got] == [
        (row["kind"], row["step"]) for row in want
    ]
    for ours, theirs in zip(got, want, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=ROUNDING)


@pytest.mark.races
def test_two_processes_one_killed_and_gone_on_with_in_one(config, tmp_path):
    """Same losses as one process; a lost process ends the other; the run goes on without it."""
    cache = tmp_path / "cache"
    config = dataclasses.replace(config, num_steps=300, eval_every_steps=100)
    group = processes.Group(config, cache, 2)
    group.reach(7)
    group.processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert group.wait() == {0: 75, 1: -signal.SIGKILL}, group.said()
    assert time.monotonic() - begin < 20
    assert "process 0: process 1 on" in group.said() and "is lost: its connection" in group.said()

    last = processes.last_step(Path(config.output))
    config = dataclasses.replace(config, num_steps=last + 3)
    assert processes.start(config, cache).wait() == 0
    assert_close(processes.metrics(config.output), alone(config, cache))


@pytest.mark.slow
@pytest.mark.races
def test_sigterm_to_one_saves_in_all(config, tmp_path):
    cache = tmp_path / "cache"
    config = dataclasses.replace(config, num_steps=10_000, mesh=MeshConfig(data=2, fsdp=1))
    group = processes.Group(config, cache, 2)
    group.reach(3)
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == {0: 75, 1: 75}, group.said()
    step = processes.last_step(Path(config.output))
    assert f"interrupted at step {step}" in group.said()
    assert (Path(config.output) / "checkpoints" / str(step) / "params").is_dir()


@pytest.mark.slow
@pytest.mark.races
def test_four_then_two_then_one(config, tmp_path):
    """Killed on four, ended by SIGTERM on two, finished on one: one run's data and losses."""
    cache = tmp_path / "cache"
    config = dataclasses.replace(config, num_steps=100_000, eval_every_steps=100_000)
    four = processes.Group(config, cache, 4)
    four.reach(5)
    four.processes[0].send_signal(signal.SIGKILL)
    codes = four.wait()
    assert codes == {0: -signal.SIGKILL, 1: 75, 2: 75, 3: 75}, four.said()
    for n in (1, 2, 3):
        assert f"process {n}: process 0 on" in four.logs[n].read_text()

    two = processes.Group(config, cache, 2)
    two.reach(processes.last_step(Path(config.output)) + 5)
    two.processes[0].send_signal(signal.SIGTERM)
    assert two.wait() == {0: 75, 1: 75}, two.said()

    last = processes.last_step(Path(config.output))
    config = dataclasses.replace(config, num_steps=last + 5)
    assert processes.start(config, cache).wait() == 0
    assert_close(processes.metrics(config.output), alone(config, cache))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, MeshConfig(tensor=2)),
        (2, MeshConfig(context=2)),
        (4, MeshConfig(fsdp=2, tensor=2)),
        (4, MeshConfig(data=2, fsdp=2)),
    ],
)
def test_meshes_over_processes(config, tmp_path, count, mesh):
    """Processes of one row group read the same rows; on `context`, other columns of them."""
    config = dataclasses.replace(config, mesh=mesh)
    for _ in range(2):  # the second time it goes on from its end, and finds nothing to do
        group = processes.Group(config, tmp_path / "cache", count)
        assert group.wait() == dict.fromkeys(range(count), 0), group.said()
    assert_close(processes.metrics(config.output), alone(config, tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.races
def test_killed_on_the_same_processes_is_bitwise_the_same(config, tmp_path):
    cache = tmp_path / "cache"
    config = dataclasses.replace(config, num_steps=20, eval_every_steps=10)
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    assert processes.Group(whole, cache, 2).wait() == {0: 0, 1: 0}
    for killed in (0, 1):
        group = processes.Group(config, cache, 2)
        group.reach(processes.last_step(Path(config.output)) + 4)
        group.processes[killed].send_signal(signal.SIGKILL)
        assert group.wait()[1 - killed] == 75, group.said()
    assert processes.Group(config, cache, 2).wait() == {0: 0, 1: 0}
    assert processes.metrics(config.output) == processes.metrics(whole.output)


@pytest.mark.slow
def test_a_process_that_never_starts_is_named(config, tmp_path):
    group = processes.Group(config, tmp_path / "cache", 3, leave_out=(1,), start_seconds=15)
    assert group.wait() == {0: 75, 2: 75}
    for n in (0, 2):
        assert "process 1 of 3 did not come within 15 s" in group.logs[n].read_text()


@pytest.mark.slow
def test_processes_with_other_settings_or_another_folder_are_refused(config, tmp_path):
    cache = tmp_path / "cache"
    group = processes.Group(config, cache, 2, change={1: {"seed": 1}})
    assert group.wait() == {0: 2, 1: 2}
    assert "process 1 was started unlike process 0 (seed: 0 there, 1 here)" in group.said()
    assert "process 1 on" in group.logs[0].read_text()

    group = processes.Group(config, cache, 2, change={1: {"output": str(tmp_path / "local")}})
    assert group.wait() == {0: 2, 1: 2}
    for log in group.logs:
        assert "is not the same folder for all processes: process 1 on" in log.read_text()


@pytest.mark.slow
def test_damage_to_one_process_shards_ends_all_and_an_older_checkpoint_serves(config, tmp_path):
    cache = tmp_path / "cache"
    assert processes.Group(config, cache, 2).wait() == {0: 0, 1: 0}
    newest = Path(config.output) / "checkpoints" / "6"
    files = (newest / "params").glob("ocdbt.process_1/d/*")
    file = max(files, key=lambda file: file.stat().st_size)
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for damage in (lambda: file.write_bytes(flipped), file.unlink):
        damage()
        group = processes.Group(config, cache, 2)
        assert 0 not in group.wait().values(), group.said()
        for log in group.logs:
            assert f"{newest} is damaged: " in log.read_text()
            assert "to go on from the checkpoint of step 4" in log.read_text()
    shutil.rmtree(newest)
    assert processes.Group(config, cache, 2).wait() == {0: 0, 1: 0}
    assert_close(processes.metrics(config.output), alone(config, cache))
