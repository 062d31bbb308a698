"""Documents packed into one row compute what they compute alone, and nothing sees the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.model import transformer
from tests.parity import oracle
from train.losses import language_model

CFG = oracle.shrink("qwen2.5-7b")
LENGTHS = (5, 17, 1, 9)  # documents of a row; what is left of it is padding
T = 40


@pytest.fixture(scope="module")
def theirs():
    return oracle.build(CFG)


def _packed():
    """(tokens, positions, segment ids) [1, T]: positions restart, padding is segment 0."""
    tokens, positions, segments = (np.zeros((1, T), np.int32) for _ in range(3))
    tokens[0] = np.random.default_rng(0).integers(0, CFG.vocab_size, T)
    start = 0
    for number, length in enumerate(LENGTHS, start=1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    positions[0, start:] = np.arange(T - start)
    return tokens, positions, segments


def _hidden(params, tokens, positions=None, segments=None):
    return transformer.apply(
        CFG, params, jnp.asarray(tokens), positions_BT=positions, segment_ids_BT=segments
    ).hidden_BTD


def test_packed_logits_equal_each_document_alone(theirs):
    params = oracle.params(theirs, CFG)
    tokens, positions, segments = _packed()
    packed = transformer.unembed(CFG, params, _hidden(params, tokens, positions, segments))
    assert np.isfinite(packed).all(), "padding must not make NaN"
    for number in range(1, len(LENGTHS) + 1):
        where = segments[0] == number
        alone = oracle.logits(theirs, tokens[:, where].astype(np.int64))
        oracle.assert_close(packed[:, where], alone)
        # Without segment ids the later documents would see the earlier ones.
        if number > 1:
            leaking = transformer.unembed(CFG, params, _hidden(params, tokens, positions))[:, where]
            assert oracle.difference(leaking, alone)[0] > 1e-2


def test_packed_gradients_equal_the_documents_sum(theirs):
    params = oracle.params(theirs, CFG)
    tokens, positions, segments = _packed()
    targets = np.roll(tokens, -1, axis=1)
    last = np.append(segments[0, 1:] != segments[0, :-1], True)
    weights = ((segments > 0) & ~last).astype(np.float32)

    def loss(params, tokens, positions, segments, targets, weights):
        hidden_BTD = _hidden(params, tokens, positions, segments)
        kernel_DV = transformer.output_kernel(CFG, params)
        return language_model.cross_entropy(hidden_BTD, kernel_DV, targets, weights).loss

    # Alone: one document a row, right-padded, with neither segments nor positions of its own.
    rows = [np.zeros((len(LENGTHS), max(LENGTHS)), x.dtype) for x in (tokens, targets, weights)]
    for number, length in enumerate(LENGTHS):
        where = segments[0] == number + 1
        for row, x in zip(rows, (tokens, targets, weights), strict=True):
            row[number, :length] = x[0, where]
    alone_tokens, alone_targets, alone_weights = rows

    gradient = jax.jit(jax.grad(loss))
    packed = gradient(params, tokens, positions, segments, targets, weights)
    alone = gradient(params, alone_tokens, None, None, alone_targets, alone_weights)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(packed), jax.tree.leaves(alone), strict=True
    ):
        norm, _ = oracle.difference(got, want)
        assert norm < 1e-5, f"{jax.tree_util.keystr(path)}: {norm:.2e}"


def test_no_logit_depends_on_the_future_or_on_another_document(theirs):
    """d logits[t] / d embedding[s] is exactly zero unless s <= t and both are in one document."""
    params = oracle.params(theirs, CFG)
    _, positions, segments = _packed()
    tokens = np.arange(T, dtype=np.int32)[None]  # all different: a row of the table is a position

    assert not CFG.tie_word_embeddings, "a tied table would reach every logit directly"

    def logits(table_VD):
        changed = params | {"embed": {"weight": table_VD}}
        return transformer.unembed(CFG, changed, _hidden(changed, tokens, positions, segments))[0]

    out_TV, pull = jax.vjp(logits, params["embed"]["weight"])
    direction_V = np.random.default_rng(1).normal(size=out_TV.shape[1]).astype(np.float32)
    cotangents = jnp.eye(T)[:, :, None] * direction_V[None, None, :]
    (gradients_TVD,) = jax.vmap(pull)(cotangents)
    size_TS = np.abs(np.asarray(gradients_TVD)).max(axis=-1)[:, :T]
    same = segments[0][:, None] == segments[0][None, :]
    seen = np.tril(np.ones((T, T), bool)) & same
    assert (size_TS[~seen] == 0).all()
    assert (size_TS[seen] > 0).all()
