"""Progress of a job: lines done, speed, and remaining time."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import progress as rich_progress

_WINDOW = 15.0  # seconds of which a rate is the mean
_BETWEEN_BARS, _BETWEEN_LINES = 0.2, 30.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A job's progress: lines done, lines in total, and tokens generated a second."""

    finished: int
    total: int
    failed: int
    tokens: int
    tokens_per_second: float
    seconds_left: float | None  # None: nothing to estimate it from


Report = Callable[[Progress], None]


class Meter:
    """Counts lines and tokens.

    The remaining time is that of the remaining lines at the pace so far. A line in progress
    counts as a part of a line: its tokens over the mean tokens of the finished lines.
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._total = total
        self._finished = self._failed = 0
        self._tokens = self._tokens_finished = 0
        self._marks = collections.deque([(self._began, 0)])  # time and tokens, in the window

    def add_tokens(self, count: int) -> None:
        self._tokens += count

    def finish(self, tokens: int) -> None:
        """Counts a line as answered; `add_tokens` has already counted all its `tokens`."""
        self._finished += 1
        self._tokens_finished += tokens

    def fail(self) -> None:
        self._finished += 1
        self._failed += 1

    def read(self) -> Progress:
        now = self._clock()
        self._marks.append((now, self._tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW:
            self._marks.popleft()
        then, tokens = self._marks[0]
        return Progress(
            finished=self._finished,
            total=self._total,
            failed=self._failed,
            tokens=self._tokens,
            tokens_per_second=(self._tokens - tokens) / max(now - then, 1e-9),
            seconds_left=self._seconds_left(now),
        )

    def _seconds_left(self, now: float) -> float | None:
        done = float(self._finished)
        answered = self._finished - self._failed
        if self._tokens_finished:
            under_way = self._tokens - self._tokens_finished
            done += under_way * answered / self._tokens_finished
        # Refused lines take no time, and say nothing of the others.
        done, total = done - self._failed, self._total - self._failed
        if done <= 0:
            return 0.0 if total == 0 else None
        return (now - self._began) * max(0.0, total / done - 1)


@contextlib.contextmanager
def bar() -> Iterator[Report]:
    """Shows a bar on a terminal; elsewhere, as in a pod's log, a line now and then."""
    if not sys.stderr.isatty():
        yield _every(_BETWEEN_LINES, lambda p: print(describe(p), file=sys.stderr, flush=True))
        return
    columns = (
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rest]}"),
    )
    with rich_progress.Progress(*columns) as shown:
        task = shown.add_task("", total=None, rest="")

        def show(p: Progress) -> None:
            shown.update(task, completed=p.finished, total=p.total, rest=_rest(p))

        yield _every(_BETWEEN_BARS, show)


def describe(p: Progress) -> str:
    """The progress as one line of text."""
    return f"{p.finished} of {p.total} lines, {_rest(p)}"


def _rest(p: Progress) -> str:
    left = "?" if p.seconds_left is None else _duration(p.seconds_left)
    failed = f"{p.failed} refused, " if p.failed else ""
    return f"{failed}{p.tokens_per_second:.0f} tokens/s, {left} left"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _every(seconds: float, show: Report) -> Report:
    last, is_over = -seconds, False

    def report(p: Progress) -> None:
        nonlocal last, is_over
        now, ends = time.monotonic(), p.finished == p.total and not is_over
        if now - last >= seconds or ends:
            last, is_over = now, is_over or ends
            show(p)

    return report
