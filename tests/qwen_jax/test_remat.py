"""What is recomputed changes memory, never numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qwen2_5
from qwen_jax import model, remat, stack

CFG = dataclasses.replace(qwen2_5.tiny(), vocab_size=64, num_hidden_layers=2)
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 24))


@functools.cache
def _compiled(policy: str, layer_loop: str):
    def loss(params):
        options = {"remat_policy": policy, "layer_loop": layer_loop}
        hidden_BTD = model.apply(CFG, params, jnp.asarray(TOKENS), **options).hidden_BTD
        return jnp.sum(jnp.sin(hidden_BTD))

    return jax.jit(jax.value_and_grad(loss)).lower(model.shapes(CFG)).compile()


@functools.cache
def _params():
    return model.init(CFG, jax.random.key(0))


@pytest.mark.parametrize(
    ("policy", "layer_loop"),
    [
        ("none", "unrolled"),
        ("dots", "scan"),
        pytest.param("dots", "unrolled", marks=pytest.mark.slow),
        ("full", "scan"),
        pytest.param("full", "unrolled", marks=pytest.mark.slow),
    ],
)
def test_every_policy_gives_the_same_loss_and_gradients(policy, layer_loop):
    want_loss, want = _compiled("none", "scan")(_params())
    loss, got = _compiled(policy, layer_loop)(_params())
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(ours - theirs) < 2e-6 * np.linalg.norm(theirs)


def test_policies_keep_less_and_less():
    kept = [
        _compiled(policy, "scan").memory_analysis().temp_size_in_bytes for policy in remat.POLICIES
    ]
    assert kept[0] > kept[1] > kept[2]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown remat policy 'some'; known: none, dots, full"):
        remat.wrap(lambda x: x, "some")
    with pytest.raises(ValueError, match="unknown layer_loop 'rolled'; known: scan, unrolled"):
        stack.run(CFG, {}, lambda x, layer, i: (x, None), 0, layer_loop="rolled")
