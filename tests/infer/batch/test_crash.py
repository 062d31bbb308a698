"""Jobs that are killed at any moment: after the last start every line is answered once."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infer.batch import batch_job, job_files
from tests.infer import fake_engine
from tests.infer.batch import batch_process

ROOT = Path(__file__).parents[3]
LINES = [
    {"custom_id": f"id {i}", "prompt": f"prompt {i}", "temperature": 1.0, "max_tokens": 1 + i % 40}
    for i in range(400)
]
REFUSED = {"custom_id": "refused", "prompt": ""}  # every start writes and drops it anew
ATTEMPTS = 20  # to hit one running job


def start(folder: Path, order: str) -> subprocess.Popen:
    """A process with the job, which has just begun."""
    command = [sys.executable, "-m", "tests.infer.batch.batch_process"]
    process = subprocess.Popen(
        [*command, folder / "in.jsonl", folder / "out.jsonl", order],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if line.strip() != batch_process.STARTED:
        process.kill()
        raise AssertionError(f"the job did not start: {line!r}, status {process.wait()}")
    return process


def killed_at_work(process: subprocess.Popen, output: Path, *, size: int, pause: float) -> bool:
    """Kills the process when the output has reached a size and a pause is over.

    True where the kill hit the running job, False where the job was already done.
    """
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if output.exists() and output.stat().st_size >= size:
            break
        time.sleep(0.001)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    return process.returncode == -signal.SIGKILL and batch_process.ENDED not in rest


def kill_running_job(
    folder: Path, saved: Path, order: str, *, size: int, pauses: Iterator[float]
) -> None:
    """Leaves the folder as a kill at the output's size does; a job that was faster runs again."""
    shutil.copytree(folder, saved)
    for _ in range(ATTEMPTS):
        if killed_at_work(
            start(folder, order), folder / "out.jsonl", size=size, pause=next(pauses)
        ):
            shutil.rmtree(saved)
            return
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
    raise AssertionError(f"{ATTEMPTS} jobs ended before the kill at {size} bytes")


def killed(path: Path, *, times: int, seed: int, order: str) -> None:
    rng = random.Random(seed)
    (folder := path / "job").mkdir()
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [REFUSED, *LINES]))
    alone = batch_job.run(fake_engine.service(), folder / "in.jsonl", path / "alone.jsonl")
    whole = alone.path.stat().st_size
    output = folder / "out.jsonl"
    pauses = iter(lambda: rng.choice([0.0, rng.random() * 0.05]), None)
    # The first kill may come before there is any output; the others spread over the work.
    for count in range(times):
        size = rng.randrange(whole * count // times, whole * (count + 1) // times)
        kill_running_job(folder, path / "saved", order, size=size, pauses=pauses)
    process = start(folder, order)
    process.communicate()
    assert process.returncode == 0
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
