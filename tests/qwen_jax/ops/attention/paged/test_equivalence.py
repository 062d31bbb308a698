"""Attention over pages equals attention over the same keys in one piece, and is each row's own."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.attention import api, reference
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import kv_pages
from tests.qwen_jax.ops.attention.paged import paged_cases as cases

# (query heads, key-value heads, head size)
HEADS = [(14, 2, 64), (28, 4, 128)]
STARTS_B = np.array([0, 45, 130, 7], np.int32)
LENGTHS_B = np.array([37, 40, 3, 0], np.int32)


decode = jax.jit(paged.decode, static_argnames="implementation")
extend = jax.jit(paged.extend, static_argnames=("prefix", "implementation"))

CASES = [(HEADS[0], "float32", 1e-6), (HEADS[1], "bfloat16", 1e-2)]


@pytest.mark.parametrize(("heads", "dtype", "tolerance"), CASES)
def test_decode_equals_attention_over_contiguous_keys(heads, dtype, tolerance):
    N, K, H = heads
    lengths_B = np.array([1, 64, 150, 0, 131], np.int32)
    k, v = (
        cases.draw(5, 150, K, H, dtype=dtype, seed=1),
        cases.draw(5, 150, K, H, dtype=dtype, seed=2),
    )
    q = cases.draw(5, N, H, dtype=dtype)
    kv, table = cases.paged(k, v, page_size=16)
    got = decode(q, kv, table_BM=table, lengths_B=lengths_B, implementation="reference")
    seen_BTS = np.arange(150)[None, None] < lengths_B[:, None, None]
    wide = [x.astype(jnp.float32) for x in (q[:, None], k, v)]
    want = jax.jit(reference.weighted_values)(*wide, visible_BTS=seen_BTS)[:, 0]
    assert got.dtype == q.dtype
    active = lengths_B > 0
    got, want = np.asarray(got), np.asarray(want)
    cases.assert_close(got[active], want[active], tolerance)
    np.testing.assert_array_equal(got[~active], 0)


@pytest.mark.parametrize(("heads", "dtype", "tolerance"), CASES)
def test_extend_equals_attention_over_whole_prompts(heads, dtype, tolerance):
    N, K, H = heads
    T, S = 40, 176
    q, k, v = (cases.draw(4, S, n, H, dtype=dtype, seed=seed) for seed, n in enumerate((N, K, K)))
    kv, table = cases.paged(k, v, page_size=16)
    got = _extend_at(q, k, v, kv, table, STARTS_B, LENGTHS_B, T=T)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = jax.jit(reference.attention)(*wide, mask=api.Mask(causal=True))
    got, want = np.asarray(got), np.asarray(want)
    for b, (start, length) in enumerate(zip(STARTS_B, LENGTHS_B, strict=True)):
        if length:
            cases.assert_close(got[b, :length], want[b, start : start + length], tolerance)
    assert np.isfinite(got.astype(np.float32)).all()


def _extend_at(q, k, v, kv, table, starts_B, lengths_B, *, T: int, prefix="pages"):
    cut = np.asarray(starts_B)[:, None] + np.arange(T)
    chunks = [x[np.arange(len(cut))[:, None], cut] for x in (q, k, v)]
    return extend(
        *chunks,
        kv,
        table_BM=table,
        starts_B=starts_B,
        lengths_B=lengths_B,
        prefix=prefix,
        implementation="reference",
    )


@pytest.mark.parametrize("name", [name for name in paged.DECODE.names if name != "reference"])
def test_every_registered_decode_equals_the_reference(name, monkeypatch):
    """Kernels run in Pallas's interpreter, over pages as their platform has them."""
    lengths_B = jnp.array([70, 0, 5], jnp.int32)
    q, k, v = cases.draw(3, 16, 64), *(cases.draw(3, 70, 2, 64, seed=seed) for seed in (1, 2))
    kv, table = cases.paged(k, v, page_size=16)
    rows = {"table_BM": table, "lengths_B": lengths_B}
    want = decode(q, kv, **rows, implementation="reference")
    compute, interpreter = paged.DECODE[name].compute, contextlib.nullcontext()
    if "tpu" in paged.DECODE[name].platforms:
        kv = jnp.pad(jnp.nan_to_num(kv), ((0, 0), (0, 0), (0, 0), (0, kv_pages.LANES - 64)))
        interpreter = cases.interpreted_tpu(monkeypatch)
    else:
        compute = functools.partial(compute, interpret=True)
    with interpreter:
        got = jax.jit(compute)(q, kv, **rows)
    cases.assert_close(got, want, 1e-6)
    np.testing.assert_array_equal(got[1], 0)


def test_int8_is_within_a_hundredth():
    q, k, v = cases.draw(5, 14, 64), *(cases.draw(5, 150, 2, 64, seed=seed) for seed in (1, 2))
    lengths_B = np.array([1, 64, 150, 0, 131], np.int32)
    got, want = (
        decode(q, kv, table_BM=table, lengths_B=lengths_B, implementation="reference")
        for kv, table in (
            cases.paged(k, v, page_size=16, storage=storage) for storage in ("int8", "plain")
        )
    )
    cases.assert_close(got, want, 1e-2)


def test_a_row_is_bitwise_its_own():
    """Other rows' contents and lengths, and how many there are, change nothing."""
    N, K, H = HEADS[0]
    q = cases.draw(5, N, H)
    k, v = cases.draw(5, 300, K, H, seed=1), cases.draw(5, 300, K, H, seed=2)
    kv, table = cases.paged(k, v, page_size=16)

    def run(rows, lengths, pages=table.shape[1]):
        return np.asarray(
            decode(
                q[rows,],
                kv,
                table_BM=table[rows, :pages],
                lengths_B=jnp.asarray(lengths, jnp.int32),
                implementation="reference",
            )
        )

    alone = run([1], [77])[0]
    np.testing.assert_array_equal(run([4, 3, 2, 1, 0], [0, 300, 1, 77, 9])[3], alone)
    np.testing.assert_array_equal(run([1, 1], [77, 77], pages=5)[1], alone)


def test_a_prompt_is_bitwise_the_same_however_it_is_cut():
    N, K, H = HEADS[0]
    q, k, v = (cases.draw(2, 240, n, H, seed=seed) for seed, n in enumerate((N, K, K)))
    kv, table = cases.paged(k, v, page_size=16)
    whole = _extend_at(
        q, k, v, kv, table, np.array([0, 0]), np.array([240, 9]), T=240, prefix="none"
    )
    for start, length, T in [(37, 140, 160), (201, 3, 16)]:
        starts, lengths = np.array([start, 3]), np.array([length, 2])
        part = _extend_at(q, k, v, kv, table, starts, lengths, T=min(T, 240 - start))
        np.testing.assert_array_equal(part[0, :length], whole[0, start : start + length])


def test_what_cannot_run_is_refused_by_name():
    kv, table = jnp.zeros((2, 16, 4, 64)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="unknown paged attention implementation 'flash'"):
        paged.decode(
            cases.draw(1, 4, 64), kv, table_BM=table, lengths_B=jnp.ones(1), implementation="flash"
        )
