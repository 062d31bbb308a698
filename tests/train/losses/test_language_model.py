"""Chunked cross-entropy equals the plain one, in value and gradient, and never holds the logits."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.models import qwen2_5
from partitioning import gradients
from qwen_jax.model import transformer
from train.losses import language_model

B, T, D, V = 3, 13, 8, 29


def _inputs(dtype=jnp.float32, seed=0, width=D):
    random = np.random.default_rng(seed)
    hidden_BTD = jnp.asarray(random.normal(size=(B, T, width)), dtype)
    kernel_DV = jnp.asarray(random.normal(size=(width, V)) * (D / width) ** 0.5, jnp.float32)
    targets_BT = jnp.asarray(random.integers(0, V, (B, T)), jnp.int32)
    weights_BT = jnp.asarray(random.integers(0, 3, (B, T)), jnp.float32)
    return hidden_BTD, kernel_DV, targets_BT, weights_BT


def _plain(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss):
    """(loss, cross-entropy, right, weight) from logits that exist all at once."""
    logits_BTV = hidden_BTD.astype(jnp.float32) @ kernel_DV.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    entropy_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(weights_BT * entropy_BT)
    right = jnp.sum(weights_BT * (jnp.argmax(logits_BTV, axis=-1) == targets_BT))
    return entropy + z_loss * jnp.sum(weights_BT * log_z_BT**2), entropy, right, weights_BT.sum()


@functools.partial(jax.jit, static_argnames=("z_loss", "chunk"))
def _both(hidden_BTD, kernel_DV, targets_BT, weights_BT, *, z_loss, chunk):
    def ours(hidden_BTD, kernel_DV):
        sums = language_model.cross_entropy(
            hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss=z_loss, chunk=chunk
        )
        return 0.37 * sums.loss, sums  # a cotangent that is not 1

    def theirs(hidden_BTD, kernel_DV):
        sums = _plain(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss)
        return 0.37 * sums[0], sums

    run = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    return run(ours)(hidden_BTD, kernel_DV), run(theirs)(hidden_BTD, kernel_DV)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, 1000])
def test_equals_plain_cross_entropy(chunk, z_loss):
    ((_, got), got_gradients), ((_, want), want_gradients) = _both(
        *_inputs(), z_loss=z_loss, chunk=chunk
    )
    np.testing.assert_allclose(
        [got.loss, got.cross_entropy, got.num_correct, got.weight], want, rtol=2e-6
    )
    for ours, theirs in zip(got_gradients, want_gradients, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [5, 13])
def test_the_kernels_gradient_in_pieces(chunk, dtype):
    """A width of 1,024 outweighs 39 tokens: two pieces of 512 rows."""
    pieces = {"rows": B, "length": T, "devices": 1, "itemsize": jnp.dtype(dtype).itemsize}
    plan = gradients.plan_output_gradient(hidden_size=1024, chunk=chunk, **pieces)
    assert plan == gradients.OutputGradient(chunk=chunk, piece=512)
    ((_, got), got_gradients), ((_, want), want_gradients) = _both(
        *_inputs(dtype, width=1024), z_loss=1e-2, chunk=chunk
    )
    near = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(got.loss, want[0], rtol=near)
    for ours, theirs in zip(got_gradients, want_gradients, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) < near * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "devices", "plan"),
    [
        (4096, 3584, 64, gradients.OutputGradient(512, 8)),  # 7B: 1.2 GB rather than 2.2
        (4096, 3584, 256, gradients.OutputGradient(512, 2)),
        (4096, 8192, 128, gradients.OutputGradient(512, 4)),
        (
            8192,
            3584,
            64,
            gradients.OutputGradient(1024, None),
        ),  # longer rows: the sum is the smaller
        (4096, 896, 16, gradients.OutputGradient(1024, None)),
        (96, 128, 4, gradients.OutputGradient(96, None)),  # too small for pieces
    ],
)
def test_the_plan_that_takes_less_memory(tokens, hidden_size, devices, plan):
    got = gradients.plan_output_gradient(
        rows=1, length=tokens, hidden_size=hidden_size, chunk=1024, devices=devices, itemsize=2
    )
    assert got == plan


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 7]))
def test_any_batch(seed, chunk):
    ((_, got), gradients), ((_, want), wanted) = _both(
        *_inputs(seed=seed), z_loss=1e-3, chunk=chunk
    )
    np.testing.assert_allclose(got.loss, want[0], rtol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_the_same_sums():
    inputs = _inputs()
    got = language_model.cross_entropy(*inputs, z_loss=1e-2, chunk=4)
    want = _plain(*inputs, 1e-2)
    np.testing.assert_allclose(
        [got.loss, got.cross_entropy, got.num_correct, got.weight], want, rtol=2e-6
    )


def test_a_token_of_weight_zero_counts_for_nothing():
    hidden_BTD, kernel_DV, targets_BT, weights_BT = _inputs()
    weights_BT = weights_BT.at[:, ::2].set(0)
    base = _both(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss=1e-2, chunk=5)[0]
    # Another target there, even one outside the vocabulary, and another hidden state.
    strange_BT = targets_BT.at[:, ::2].set(-100)
    moved_BTD = hidden_BTD.at[:, ::2].add(3.0)
    other = _both(moved_BTD, kernel_DV, strange_BT, weights_BT, z_loss=1e-2, chunk=5)[0]
    jax.tree.map(np.testing.assert_array_equal, base, other)
    assert (np.asarray(base[1][0])[:, ::2] == 0).all()


def test_all_weights_zero():
    hidden_BTD, kernel_DV, targets_BT, weights_BT = _inputs()
    ((loss, sums), gradients), _ = _both(
        hidden_BTD, kernel_DV, targets_BT, 0 * weights_BT, z_loss=1e-2, chunk=5
    )
    assert loss == sums.weight == 0
    assert all((np.asarray(g) == 0).all() for g in gradients)


def test_a_weighted_target_outside_the_vocabulary_is_not_overlooked():
    hidden_BTD, kernel_DV, targets_BT, weights_BT = _inputs()
    targets_BT, weights_BT = targets_BT.at[0, 0].set(V), weights_BT.at[0, 0].set(1)
    got = language_model.cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk=5)
    assert not math.isfinite(got.loss)


def test_bfloat16_hidden_states():
    """Gradients come back in each input's own dtype, and are those of float32 arithmetic nearly."""
    inputs = _inputs(jnp.bfloat16)
    ((_, got), got_gradients), ((_, want), want_gradients) = _both(*inputs, z_loss=1e-3, chunk=5)
    np.testing.assert_allclose(got.loss, want[0], rtol=5e-3)
    assert [g.dtype for g in got_gradients] == [jnp.bfloat16, jnp.float32]
    for ours, theirs in zip(got_gradients, want_gradients, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


def test_a_mean_is_not_scaled_by_a_rounded_weight():
    """1 / 3 in bfloat16 is 0.2% too large; a gradient's scale must not inherit that."""
    hidden_BTD, kernel_DV, targets_BT, weights_BT = _inputs(jnp.bfloat16)

    def gradient(scale):
        def loss(hidden_BTD):
            sums = language_model.cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT)
            return sums.loss * scale

        return jax.grad(loss)(hidden_BTD)

    want = (gradient(1.0).astype(jnp.float32) / 3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gradient(1 / 3), want)


def test_the_training_loss_never_holds_the_logits():
    """No array [batch, length, vocab] in the traced or the compiled program, nor one as large."""
    cfg = dataclasses.replace(qwen2_5.tiny_untied(), num_hidden_layers=1)
    B, T, chunk = 4, 96, 16
    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    weights_BT = jax.ShapeDtypeStruct((B, T), jnp.float32)

    def loss(params, tokens_BT, weights_BT, *, chunk):
        hidden_BTD = transformer.apply(cfg, params, tokens_BT, remat_policy="full").hidden_BTD
        kernel_DV = transformer.output_kernel(cfg, params)
        sums = language_model.cross_entropy(
            hidden_BTD, kernel_DV, tokens_BT, weights_BT, chunk=chunk
        )
        return sums.loss / sums.weight

    def largest(chunk):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, chunk=chunk)))
        traced = step.trace(transformer.shapes(cfg), tokens_BT, weights_BT)
        text = f"{traced.jaxpr}\n{traced.lower().compile().as_text()}"
        sizes = re.findall(r"\b(?:pred|bool|bf16|[fisu]\d+)\[([\d,]+)\]", text)
        return max(math.prod(map(int, dims.split(","))) for dims in sizes)

    logits = B * T * cfg.vocab_size
    assert largest(chunk) < logits
    assert largest(T) >= logits, "the search would not find them"
