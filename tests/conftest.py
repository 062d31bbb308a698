"""Settings for every test; what needs several devices is left to a process of its own."""

import os

import jax

# `test_multidevice.py` sets it, and starts that process; eight devices must be asked for before jax
# first looks for one.
MULTIDEVICE = "QWEN_JAX_MULTIDEVICE" in os.environ
if MULTIDEVICE:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
collect_ignore = [] if MULTIDEVICE else ["multidevice"]

# A silent broadcast over a missing dimension is a bug more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")
