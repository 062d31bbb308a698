"""Settings for every test; what needs several devices is left to a process of its own."""

import os

import hypothesis
import jax
import pytest

from tests.support import timing

# `test_multidevice.py` sets it, and starts that process; eight devices must be asked for before jax
# first looks for one.
MULTIDEVICE = "QWEN_JAX_MULTIDEVICE" in os.environ
if MULTIDEVICE:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
collect_ignore = [] if MULTIDEVICE else ["multidevice"]

# Most of the tests' time goes into compiling small programs that run for milliseconds, a large part
# of it into fusion emitters. `test_full_optimization.py` sets the variable, to compile as users do.
NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
flags = os.environ.get("XLA_FLAGS", "").replace(NO_EMITTERS, "")
if "QWEN_JAX_FULL_OPTIMIZATION" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    flags = f"{NO_EMITTERS} {flags}"
os.environ["XLA_FLAGS"] = flags.strip()
# On a busy machine one example may take any time; `timing` bounds the CPU seconds of a whole test.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")
# A silent broadcast over a missing dimension is a bug more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs compiled by one worker or subprocess serve all of them, and the next run.
CACHE = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


def pytest_addoption(pluginmanager):
    pluginmanager.register(timing)


def pytest_configure(config):
    own = config.rootpath / ".pytest_cache" / "jax"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(own))
    for name, value in (CACHE | {"jax_compilation_cache_dir": folder}).items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def _forget_executables():
    """Drops a module's compiled programs: a process may map only 65,530 regions on Linux, and XLA,
    which maps some for each program, dies of a segmentation fault beyond."""
    yield
    jax.clear_caches()
