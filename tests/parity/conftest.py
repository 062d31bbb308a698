"""Parity is judged in float32 at the highest matmul precision."""

import jax
import pytest


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
