"""Counts how often Python code opens each file."""

import collections
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_counting: list[collections.Counter] = []


def _count(event: str, arguments: tuple) -> None:
    if event == "open" and _counting and isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0])).resolve()
        for counter in _counting:
            counter[path] += 1


sys.addaudithook(_count)  # which cannot be taken away again: without a counter it does nothing


@contextlib.contextmanager
def counted() -> Iterator[collections.Counter]:
    """How often each path was opened inside the block."""
    counter: collections.Counter = collections.Counter()
    _counting.append(counter)
    try:
        yield counter
    finally:
        _counting.remove(counter)
