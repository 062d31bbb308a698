"""Speed by a clock that the test turns, what is written, and what a resumed run cuts off."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs.data import DataConfig
from configs.models import qwen2_5
from configs.train import TrainConfig
from qwen_jax.analysis import flops
from train.core import metrics

ROOT = Path(__file__).parents[3]
CFG = qwen2_5.preset("tiny")
CONFIG = TrainConfig(batch_size=4, data=DataConfig(sequence_length=100))


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_speed_leaves_out_compilation_and_pauses(clock):
    meter = metrics.Meter(CFG, CONFIG)
    clock[0] = 50.0  # compiling
    meter.step()
    assert meter.read() == {}
    for _ in range(10):
        clock[0] += 0.5
        meter.step()
    with meter.pause():
        clock[0] += 100.0  # evaluating
    values = meter.read()
    assert values["tokens_per_second"] == pytest.approx(400 * 10 / 5)
    per_token = flops.train_per_token(CFG, length=100, attention="causal")
    assert values["tflops_causal"] == pytest.approx(800 * per_token / 1e12)
    assert values["tflops_full"] > values["tflops_causal"]
    assert "mfu_causal" not in values  # nobody knows this CPU's peak
    clock[0] += 1.0
    meter.step()
    assert meter.read()["tokens_per_second"] == pytest.approx(400)


def test_mfu_where_the_peak_is_known(clock, monkeypatch):
    monkeypatch.setattr(metrics.flops, "peak", lambda kind: 1e9)
    meter = metrics.Meter(CFG, CONFIG)
    meter.step()
    clock[0] = 1.0
    meter.step()
    values = meter.read()
    for name in ("causal", "full"):
        assert values[f"mfu_{name}"] == pytest.approx(values[f"tflops_{name}"] * 1e3)


def row(step: int, **values) -> dict[str, float]:
    return {"loss": 2.0 + step, "learning_rate": 1e-3, **values}


def test_lines_tensorboard_and_words(tmp_path, capsys):
    with metrics.Log(tmp_path, step=0, num_steps=4) as log:
        for step in range(1, 5):
            log.train(step, row(step), show=step % 2 == 0)
        log.evaluation(4, {"loss": 2.5, "cross_entropy": 2.5, "accuracy": 0.25})
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("train", step) for step in range(1, 5)),
        ("eval", 4),
    ]
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert board.read_bytes().count(b"train/loss") == 2
    assert board.read_bytes().count(b"eval/accuracy") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 2/4  loss 4.0000  lr 1.00e-03  eta")
    assert said[-1] == "step 4  held-out loss 2.5000  accuracy 25.00%"


def test_writing_metrics_imports_no_torch_and_does_not_hide_it():
    program = """
import sys
from train.core import metrics
assert "torch" not in sys.modules
import torch
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_rewind_gives_the_last_losses_and_cuts_the_rest(tmp_path):
    with metrics.Log(tmp_path, step=0, num_steps=9) as log:
        for step in range(1, 8):
            log.train(step, row(step), show=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    history = metrics.rewind(tmp_path, 5, keep=3)
    assert history.losses == (5.0, 6.0, 7.0) and history.train["step"] == 5
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert metrics.rewind(tmp_path, 5, keep=3) == history
    assert metrics.rewind(tmp_path, -1, keep=3).losses == ()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.Log(tmp_path, step=0, num_steps=4) as log:
        log.train(1, row(1), show=True)
        log.evaluation(1, row(1))
        log.say("hello")
    assert not list(tmp_path.iterdir())
