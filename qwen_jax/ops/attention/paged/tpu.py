"""Attention over pages on a TPU: the ragged paged attention kernel that JAX ships.

One kernel serves decoding and chunks: queries of all rows in one array, row after row, each with
the length of its keys. It copies pages into vector memory two blocks at a time, all heads of a page
at once, which is why pages keep keys beside values, and why heads are padded to 128.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

from qwen_jax.ops.attention.paged import kv_pages

# The library's table of block sizes knows other pages and heads than ours, and its default of 128
# pages at a time exceeds a v5e's vector memory.
BUFFER_BYTES = 4 * 2**20  # of keys and values, both buffers: beside it fit 16 MiB's other arrays
DECODE_QUERIES = 8  # at a time; each row is multiplied with all of them, and keeps its own
EXTEND_QUERIES = 32


def unsupported(q: jax.Array, kv_PSCH: kv_pages.Layer) -> str | None:
    """The reason why the kernel cannot take these queries and pages on any TPU; None: it can."""
    if isinstance(kv_PSCH, kv_pages.Quantised):
        return "it knows no scales of single positions"
    width = kv_PSCH.shape[3]
    if width % kv_pages.LANES:
        return (
            f"pages have heads of {width}, not a multiple of {kv_pages.LANES}, as "
            "paged_cache.create makes them for a TPU"
        )
    if q.dtype != kv_PSCH.dtype:
        return f"queries are {q.dtype}, but pages {kv_PSCH.dtype}"
    return None


def decode(
    q_BNH: jax.Array,
    kv_PSCH: jax.Array,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    heads_K: jax.Array | None = None,
) -> jax.Array:
    """See `qwen_jax.ops.attention.paged.api.decode`, and `heads_K` in `paged._own_heads`."""
    # The kernel has a block of every row under way before the row: none may be empty.
    lengths = jnp.maximum(1, lengths_B)
    o_BNH = _attend(q_BNH, kv_PSCH, table_BM, lengths, heads_K, queries=DECODE_QUERIES)
    return jnp.where((lengths_B > 0)[:, None, None], o_BNH, 0)


def extend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    kv_PSCH: jax.Array,
    *,
    table_BM: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    prefix: str,
    heads_K: jax.Array | None = None,
) -> jax.Array:
    """See `qwen_jax.ops.attention.paged.api.extend`, and `heads_K` in `paged._own_heads`.

    Padding is computed too: it lies behind a row's tokens, which do not see it.
    """
    del k_BTKH, v_BTKH, lengths_B, prefix
    B, T, N, H = q_BTNH.shape
    q_XNH = q_BTNH.reshape(B * T, N, H)
    o_XNH = _attend(q_XNH, kv_PSCH, table_BM, starts_B + T, heads_K, queries=EXTEND_QUERIES)
    return o_XNH.reshape(q_BTNH.shape)


def _attend(
    q_XNH: jax.Array,
    kv_PSCH: jax.Array,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    heads_K: jax.Array | None,
    *,
    queries: int,
) -> jax.Array:
    """The last X / B positions of every row's `lengths_B`, causally, in one array of queries."""
    (X, N, H), (C, width) = q_XNH.shape, kv_PSCH.shape[2:]
    B, M = table_BM.shape
    q_XNH = jnp.pad(q_XNH, ((0, 0), (0, 0), (0, width - H)))
    mine_KN = None if heads_K is None else _owners(heads_K, N=N, K=C // 2)
    if mine_KN is not None:
        # Pages hold more heads than these queries read: each query stands before every head.
        q_XKNH = jnp.where(mine_KN[None, :, :, None], q_XNH[:, None], 0)
        q_XNH = q_XKNH.reshape(X, -1, width)
    o_XNH = ragged.ragged_paged_attention(
        q_XNH,
        kv_PSCH,
        lengths_B.astype(jnp.int32),
        table_BM,
        jnp.arange(B + 1, dtype=jnp.int32) * (X // B),
        jnp.full(1, B, jnp.int32),
        sm_scale=1 / math.sqrt(H),
        num_kv_pages_per_block=_pages_per_block(kv_PSCH, M=M),
        num_queries_per_block=min(queries, X),
    )
    if mine_KN is not None:
        o_XKNH = o_XNH.reshape(X, C // 2, N, width)
        o_XNH = jnp.sum(jnp.where(mine_KN[None, :, :, None], o_XKNH, 0), axis=1)
    return o_XNH[:, :, :H]


def _owners(heads_K: jax.Array, *, N: int, K: int) -> jax.Array:
    """[K, N] booleans: whether query head n reads the pages' head k."""
    head_N = jnp.repeat(heads_K, N // heads_K.shape[0], total_repeat_length=N)
    return head_N[None, :] == jnp.arange(K)[:, None]


def _pages_per_block(kv_PSCH: jax.Array, *, M: int) -> int:
    """Pages copied at a time: two buffers of them take `BUFFER_BYTES`."""
    page = math.prod(kv_PSCH.shape[1:]) * kv_PSCH.dtype.itemsize
    return max(1, min(M, BUFFER_BYTES // (2 * page)))
