"""Jobs that are killed at any moment: after the last start every line is answered once."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infer.batch import batch_job, job_files
from tests.infer import fake_engine

ROOT = Path(__file__).parents[3]
LINES = [
    {"custom_id": f"id {i}", "prompt": f"prompt {i}", "temperature": 1.0, "max_tokens": 1 + i % 40}
    for i in range(400)
]
REFUSED = {"custom_id": "refused", "prompt": ""}  # every start writes and drops it anew


def start(folder: Path, order: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.infer.batch.batch_process"]
    return subprocess.Popen([*command, folder / "in.jsonl", folder / "out.jsonl", order], cwd=ROOT)


def kill(process: subprocess.Popen, output: Path, *, size: int, pause: float) -> None:
    """Once the output has reached a size, and a pause is over."""
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 60:
        if output.exists() and output.stat().st_size >= size:
            break
        time.sleep(0.001)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()


def killed(folder: Path, *, times: int, seed: int, order: str) -> None:
    rng = random.Random(seed)
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [REFUSED, *LINES]))
    alone = batch_job.run(fake_engine.service(), folder / "in.jsonl", folder / "alone.jsonl")
    whole = alone.path.stat().st_size
    output = folder / "out.jsonl"
    # The first moments are before anything is there, the others spread over the work.
    kills = 0
    for count in range(times):
        size = rng.randrange(whole * count // times, whole * (count + 1) // times)
        process = start(folder, order)
        kill(process, output, size=size, pause=rng.choice([0.0, rng.random() * 0.05]))
        kills += process.returncode == -signal.SIGKILL
    assert kills >= times - 2  # the last may come too late
    process = start(folder, order)
    assert process.wait() == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    by_id = {record["custom_id"]: record for record in records}
    assert len(records) == len(by_id) == len(LINES) + 1
    want = [json.loads(line) for line in alone.path.read_text().splitlines()]
    assert by_id == {record["custom_id"]: record for record in want}
    if order == "input":
        assert [r["custom_id"] for r in records] == ["refused", *(r["custom_id"] for r in LINES)]


@pytest.mark.races
def test_a_killed_job_answers_each_line_once(tmp_path):
    killed(tmp_path, times=3, seed=0, order="arrival")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["arrival", "input"])
@pytest.mark.races
def test_a_job_killed_ten_times_answers_each_line_once(tmp_path, order):
    killed(tmp_path, times=10, seed=1, order=order)


def test_an_output_cut_at_any_byte_is_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(job_files.os, "fsync", lambda file: None)
    lines = [{"prompt": ""}, *({"prompt": f"世 {i}", "max_tokens": 2} for i in range(2))]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    path = tmp_path / "out.jsonl"
    batch_job.run(fake_engine.service(), tmp_path / "in.jsonl", path)
    content = path.read_bytes()
    want = set(content.splitlines())
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        batch_job.run(fake_engine.service(), tmp_path / "in.jsonl", path)
        got = path.read_bytes().splitlines()
        assert len(got) == 3 and set(got) == want
