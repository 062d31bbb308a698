"""A window of steps under JAX's profiler, for TensorBoard's profile plugin or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from qwen_jax import storage


@contextlib.contextmanager
def window(
    steps: tuple[int, int] | None, folder: Path
) -> Iterator[Callable[[int, jax.Array], None]]:
    """Context that yields a function to call before each step n, with an array of the state.

    The trace lasts from before the first of `steps` until the last has run on the device.
    """
    tracing = False

    def mark(step: int, before: jax.Array) -> None:
        nonlocal tracing
        if steps is None or tracing == (steps[0] <= step <= steps[1]):
            return
        jax.block_until_ready(before)
        if tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(here)
        tracing = not tracing

    with storage.staged(folder) if steps else contextlib.nullcontext() as here:
        try:
            yield mark
        finally:
            if tracing:
                jax.profiler.stop_trace()
