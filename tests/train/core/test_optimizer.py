"""Schedules against their closed forms; what decays; AdamW against a few lines of numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.models import qwen2_5
from configs.optimizer import OptimizerConfig
from qwen_jax.model import transformer
from train.core import optimizer


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{"peak_learning_rate": 2e-3, "warmup_steps": 10, **changes})


@settings(deadline=None)
@given(st.integers(0, 150))
def test_cosine(count):
    rate = optimizer.schedule(config(schedule="cosine"), num_steps=100)(count)
    if count < 10:
        expected = 2e-3 * (count + 1) / 10
    else:
        progress = min((count - 10) / 90, 1)
        expected = 2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
    assert rate == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(st.integers(0, 150))
def test_wsd(count):
    made = config(schedule="wsd", decay_steps=20)
    rate = optimizer.schedule(made, num_steps=100)(count)
    if count < 10:
        expected = 2e-3 * (count + 1) / 10
    elif count <= 80:
        expected = 2e-3
    else:
        expected = 2e-3 * (1 - 0.9 * min((count - 80) / 20, 1))
    assert rate == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(st.integers(0, 150))
def test_constant(count):
    rate = optimizer.schedule(config(schedule="constant"), num_steps=100)(count)
    assert rate == pytest.approx(2e-3 * min((count + 1) / 10, 1), rel=1e-5)


def test_no_warmup_starts_at_the_peak():
    made = config(schedule="constant", warmup_steps=0)
    assert optimizer.schedule(made, num_steps=5)(0) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "cosine", "warmup_steps": 100}, "warmup_steps=100 .* num_steps=100"),
        ({"schedule": "wsd", "decay_steps": 95}, "decay_steps=95 .* exceed num_steps=100"),
    ],
)
def test_stretches_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        optimizer.schedule(config(**changes), num_steps=100)


def test_matrices_and_embeddings_decay_norms_and_biases_do_not():
    axes = transformer.axes(qwen2_5.preset("tiny-untied"))
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    for path, names in leaves:
        kind = path[-1].key
        assert optimizer.decays(names) == (kind in ("kernel", "weight")), path
    assert len(leaves) == 15


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_one_update_by_hand(moment_dtype):
    made = config(clip_norm=1.0, weight_decay=0.1, moment_dtype=moment_dtype)
    axes = {"kernel": ("embed", "ffn"), "scale": ("embed",)}
    params = {"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), 5.0)}
    gradients = {"kernel": jnp.full((2, 2), 4.0), "scale": jnp.full((2,), -2.0)}
    tx = optimizer.make(made, axes=axes)
    updates, state = tx.update(gradients, tx.init(params), params)
    norm = math.sqrt(4 * 16 + 2 * 4)
    # After one step both moments, bias corrected, are those of the clipped gradient itself.
    for name, decay in (("kernel", 0.1), ("scale", 0.0)):
        g = np.asarray(gradients[name]) / norm
        step = g / (np.abs(g) + made.eps) + decay * np.asarray(params[name])
        tolerance = 1e-5 if moment_dtype == "float32" else 1e-2
        np.testing.assert_allclose(updates[name], step, rtol=tolerance)
    moments = state[1]
    assert moments.mu["kernel"].dtype == moment_dtype
    assert moments.nu["kernel"].dtype == jnp.float32
