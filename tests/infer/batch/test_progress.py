"""What a job tells of itself while it runs."""

import json

import pytest

from infer.batch import batch_job, progress
from infer.batch.progress import Meter
from tests.infer import fake_engine


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_that_of_what_is_left():
    clock = Clock()
    meter = Meter(10, clock=clock)
    assert meter.read().seconds_left is None
    clock.now += 20
    meter.add_tokens(40)
    meter.finish(20)
    # One of ten is answered, and the others under way have as many tokens as another.
    got = meter.read()
    assert (got.finished, got.total, got.failed, got.tokens) == (1, 10, 0, 40)
    assert got.seconds_left == pytest.approx(20 * 8 / 2)
    assert got.tokens_per_second == pytest.approx(2)
    meter.fail()  # costs nothing, and is one less
    assert meter.read().seconds_left == pytest.approx(20 * 7 / 2)
    clock.now += 100
    assert meter.read().tokens_per_second == 0
    for _ in range(8):
        meter.finish(0)
    assert meter.read().seconds_left == 0


def test_lines_without_tokens_count_by_themselves():
    clock = Clock()
    meter = Meter(4, clock=clock)
    clock.now += 5
    meter.finish(0)
    assert meter.read().seconds_left == pytest.approx(15)


def test_a_job_reports(tmp_path):
    lines = [{"prompt": f"{i}", "best_of": 1 + i % 3} for i in range(9)] + [{"prompt": ""}]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    seen = []
    summary = batch_job.run(
        fake_engine.service(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", report=seen.append
    )
    assert [p.finished for p in seen] == sorted(p.finished for p in seen)
    last = seen[-1]
    assert (last.finished, last.total, last.failed, last.seconds_left) == (10, 10, 1, 0)
    assert last.tokens == summary.generated_tokens
    with progress.bar() as report:
        report(last)


def test_a_log_gets_a_line_now_and_then(capsys):
    with progress.bar() as report:
        for finished in (1, 2, 3, 3):
            report(
                progress.Progress(
                    finished=finished, total=3, failed=finished - 1, tokens=5,
                    tokens_per_second=1234.5, seconds_left=3725.0 if finished < 3 else 0.0,
                )
            )  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "1 of 3 lines, 1234 tokens/s, 1:02:05 left",
        "3 of 3 lines, 2 refused, 1234 tokens/s, 0:00:00 left",
    ]
