"""Blocks of a ring, one by one: every implementation's equal the reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partitioning import ring
from qwen_jax.ops.attention import cudnn, reference, splash

B, N, K = 2, 4, 2

# Ids of queries and of the keys before them: one document in both, none, one that is all of both.
QUERY_IDS = [[3, 3, 4, 4], [5, 5, 5, 5]]
KEY_IDS = [[1, 2, 2, 3], [1, 1, 2, 4]]
ONE_DOCUMENT = [[7, 7, 7, 7], [7, 7, 7, 8]]


def _inputs(T: int, S: int, H: int):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    q, k, v, do = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return q / H**0.5, k, v, do


def _mask(kind: str, *, T: int, S: int) -> ring.BlockMask:
    wide = lambda ids, length: jnp.repeat(jnp.asarray(ids), length // 4, axis=1)  # noqa: E731
    return {
        "causal": ring.BlockMask(True),
        "causal, packed": ring.BlockMask(True, wide(QUERY_IDS, T), wide(QUERY_IDS, S)),
        "behind": ring.BlockMask(False),
        "behind, packed": ring.BlockMask(False, wide(QUERY_IDS, T), wide(KEY_IDS, S)),
        "behind, one document": ring.BlockMask(
            False, wide(ONE_DOCUMENT, T), wide([[7] * 4] * 2, S)
        ),
    }[kind]


def _rows(q, k, v, do, *, mask: ring.BlockMask) -> ring.Rows:
    """As if the block's queries had seen other keys as well."""
    o, lse = reference.block_forward(q, k, v, mask=mask)
    lse = jnp.logaddexp(jnp.maximum(lse, -10.0), 0.3)
    return ring.Rows(o, do, lse, jnp.einsum("btnh,btnh->bnt", o, do))


def _assert_equal_blocks(blocks: ring.Blocks, kind: str, *, T: int, S: int, H: int) -> None:
    q, k, v, do = _inputs(T, S, H)
    mask = _mask(kind, T=T, S=S)
    want, want_lse = reference.block_forward(q, k, v, mask=mask)
    got, got_lse = blocks.forward(q, k, v, mask=mask)
    seen = np.asarray(want_lse > -1e30)
    assert np.isfinite(got).all()
    assert (np.asarray(got_lse)[~seen] < -1e30).all()
    np.testing.assert_allclose(np.asarray(got_lse)[seen], np.asarray(want_lse)[seen], atol=1e-5)
    of_seen = np.swapaxes(seen, 1, 2)
    np.testing.assert_allclose(np.asarray(got)[of_seen], np.asarray(want)[of_seen], atol=1e-5)
    rows = _rows(q, k, v, do, mask=mask)
    ours = blocks.backward(q, k, v, mask=mask, rows=rows)
    theirs = reference.block_backward(q, k, v, mask=mask, rows=rows)
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "T", "S", "H"),
    [
        ("behind, packed", 48, 96, 64),
        pytest.param("causal", 256, 256, 128, marks=pytest.mark.slow),
        pytest.param("causal, packed", 48, 48, 64, marks=pytest.mark.slow),
        pytest.param("behind", 256, 128, 64, marks=pytest.mark.slow),
        pytest.param("behind, one document", 96, 48, 128, marks=pytest.mark.slow),
    ],
)
def test_splash_in_the_interpreter(kind, T, S, H):
    interpreted = [
        jax.jit(functools.partial(f, interpret=True))
        for f in (splash.block_forward, splash.block_backward)
    ]
    _assert_equal_blocks(ring.Blocks(*interpreted), kind, T=T, S=S, H=H)


def _first(q, k, lengths_B) -> ring.BlockMask:
    """The first so many queries see the first so many keys."""
    of_q, of_k = (
        jnp.arange(x.shape[1])[None] < length[:, None]
        for x, length in zip((q, k), lengths_B, strict=True)
    )
    return ring.BlockMask(False, jnp.where(of_q, 1, 2), jnp.where(of_k, 1, 3))


@pytest.mark.parametrize("kind", ["behind", "behind, packed", "behind, one document"])
def test_cudnn_takes_packing_as_lengths(kind, monkeypatch):
    """cuDNN's calls are played by the reference, with NaN where a kernel may leave anything."""

    def forward(q, k, v, mask, *lengths):
        mask = _first(q, k, lengths) if lengths else mask
        o, lse = reference.block_forward(q, k, v, mask=mask)
        unseen = lse < -1e30
        o = jnp.where(jnp.swapaxes(unseen, 1, 2)[..., None], jnp.nan, o)
        return o, jnp.where(unseen, jnp.nan, lse)

    def backward(q, k, v, rows, mask, *lengths):
        mask = _first(q, k, lengths) if lengths else mask
        return reference.block_backward(q, k, v, mask=mask, rows=rows)

    monkeypatch.setattr(cudnn, "_forward", forward)
    monkeypatch.setattr(cudnn, "_backward", backward)
    blocks = ring.Blocks(cudnn.block_forward, cudnn.block_backward)
    _assert_equal_blocks(blocks, kind, T=16, S=8, H=16)
