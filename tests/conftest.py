"""Settings for every test; what runs elsewhere is left out of this process."""

import os

import jax

# A silent broadcast over a missing dimension is a bug more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")

# These need eight devices, which must be asked for before jax starts: test_multidevice.py runs
# them in a process of their own.
collect_ignore = [] if "QWEN_JAX_MULTIDEVICE" in os.environ else ["multidevice"]
