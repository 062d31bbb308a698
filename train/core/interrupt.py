"""SIGTERM and SIGINT as a question asked between steps."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def catch() -> Iterator[Callable[[int], bool]]:
    """Context that yields a function of n: whether the run was asked to stop before step n.

    A second SIGINT interrupts at once. With several processes, JAX's preemption service, which has
    caught SIGTERM since the start, lets all of them stop at the same step when one is told to;
    SIGINT is handed on to it. Outside the main thread Python cannot catch signals.
    """
    if jax.process_count() > 1:
        with _first_interrupt_terminates():
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


@contextmanager
def _first_interrupt_terminates() -> Iterator[None]:
    def hand_on(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
