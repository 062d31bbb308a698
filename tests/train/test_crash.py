"""A run killed at random moments, and started again each time, is the run that was not killed.

Every run is a process of its own, on text and a tokenizer that the test makes.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import schema
from configs.data import DataConfig
from configs.train import CheckpointConfig, TrainConfig
from tests.train import processes

EVERY = 2  # steps between checkpoints: most of the time one is being written


@pytest.fixture
def config(tmp_path, helpers):
    helpers.write_text(tmp_path / "text", documents=200)
    helpers.write_tokenizer(tmp_path / "tokenizer")
    return helpers.tiny_config(
        model=dataclasses.replace(helpers.tiny_model(), vocab_size=257, eos_token_ids=(256,)),
        eval_every_steps=20,
        eval_batches=2,
        checkpoint=CheckpointConfig(every_steps=EVERY, keep=2),
        data=DataConfig(
            paths=(str(tmp_path / "text"),), tokenizer=str(tmp_path / "tokenizer"),
            sequence_length=32, eval_fraction=0.1,
        ),
    )  # fmt: skip


def finish(config: TrainConfig, cache: Path) -> list[dict]:
    code = processes.start(config, cache).wait()
    assert code == 0, Path(f"{config.output}.log").read_text()
    return processes.metrics(config.output)


def last_checkpoint(folder: Path) -> int:
    steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(steps, default=0)


def kill_at(step: int, wait: float, config: TrainConfig, cache: Path) -> None:
    """Start the run, and kill it `wait` seconds after it has done `step`."""
    process = processes.start(config, cache)
    while processes.last_step(Path(config.output)) < step:
        assert process.poll() is None, Path(f"{config.output}.log").read_text()
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"


def half_written(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*tmp*"))


def check(config: TrainConfig, tmp_path: Path, *, kills: int, seed: int) -> int:
    """Kill and restart; compare with the run that was left alone. How many kills hit a save?"""
    cache, moments = tmp_path / "cache", random.Random(seed)
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    killed = dataclasses.replace(config, output=str(tmp_path / "killed"))
    expected = finish(whole, cache)
    folder, hits = Path(killed.output), 0
    for n in range(kills):
        kill_at(
            max(processes.last_step(folder), n * config.num_steps // (kills + 1))
            + moments.randrange(1, 5),
            moments.uniform(0, 0.15),
            killed,
            cache,
        )
        hits += half_written(folder)
        # One checkpoint may be in the making while the next steps run, and they wait for it.
        assert processes.last_step(folder) - last_checkpoint(folder) <= 2 * EVERY
    assert finish(killed, cache) == expected
    steps = [row["step"] for row in expected if row["kind"] == "train"]
    assert steps == list(range(1, config.num_steps + 1))
    assert not half_written(folder)
    return hits


@pytest.mark.takes(150, "four processes train, one after the other")
@pytest.mark.races
def test_killed_twice(config, tmp_path):
    check(dataclasses.replace(config, num_steps=24), tmp_path, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
@pytest.mark.races
def test_killed_ten_times(config, tmp_path, seed):
    assert check(dataclasses.replace(config, num_steps=200), tmp_path, kills=10, seed=seed) >= 1


@pytest.mark.slow
def test_a_save_that_fails_half_way_is_said_and_leaves_nothing_behind(config, tmp_path):
    # A limit on file sizes stops a save in the middle, as a disk that fills up meanwhile does.
    config = dataclasses.replace(config, output=str(tmp_path / "run"))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({50_000}, -1))"
    done = subprocess.run(
        [sys.executable, "-c", limit + processes.PROGRAM, json.dumps(schema.to_dict(config))],
        cwd=processes.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "train.core.state.DiskFull: no space left" in done.stderr
    assert last_checkpoint(tmp_path / "run") == 0
    rows = finish(config, tmp_path / "cache")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert not half_written(tmp_path / "run")
