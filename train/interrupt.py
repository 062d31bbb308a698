"""SIGTERM and SIGINT as a question asked between steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def catch() -> Iterator[Callable[[int], bool]]:
    """Gives a function: has the run been asked to stop before step n?

    A second SIGINT interrupts at once. With several processes, JAX's preemption service lets all of
    them stop at the same step when one is told to, so nothing is caught here; and outside the main
    thread Python cannot catch signals.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked = threading.Event()

    def note(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
