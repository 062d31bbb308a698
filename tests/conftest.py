"""Settings for every test; what needs several devices is left to a process of its own."""

import os

import jax
import pytest

# `test_multidevice.py` sets it, and starts that process; eight devices must be asked for before jax
# first looks for one.
MULTIDEVICE = "QWEN_JAX_MULTIDEVICE" in os.environ
if MULTIDEVICE:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
collect_ignore = [] if MULTIDEVICE else ["multidevice"]

# Half of the tests' time went into compiling small programs that run for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)
# A silent broadcast over a missing dimension is a bug more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _forget_executables():
    """Drops a module's compiled programs: a process may map only 65,530 regions on Linux, and XLA,
    which maps some for each program, dies of a segmentation fault beyond."""
    yield
    jax.clear_caches()
