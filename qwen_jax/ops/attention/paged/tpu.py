"""Attention over pages on a TPU: the ragged paged attention kernel that JAX ships.

The kernel takes the queries of all rows in one array, row after row, and each row's number of keys,
for decoding and for chunks alike. It copies pages into vector memory two blocks at a time, all
heads of a page at once. That is why pages hold keys beside values, and why heads are padded to 128.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

from qwen_jax.ops.attention.paged import kv_pages

# The library's table of block sizes knows other pages and heads than ours, and its default of 128
# pages at a time exceeds a v5e's vector memory.
BUFFER_BYTES = 4 * 2**20  # both buffers of keys and values; the other arrays fit 16 MiB beside it
DECODE_QUERIES = 8  # queries at a time; a row is multiplied with all of them and takes its own
EXTEND_QUERIES = 32


def unsupported(q: jax.Array, kv_PSCH: kv_pages.Layer) -> str | None:
    """The reason why the kernel cannot take these queries and pages on any TPU; None: it can."""
    if isinstance(kv_PSCH, kv_pages.Quantised):
        return "it takes no scale for each position; use storage='plain'"
    width = kv_PSCH.shape[3]
    if width % kv_pages.LANES:
        return (
            f"pages have heads of {width}, not a multiple of {kv_pages.LANES}, as "
            "kv_pages.create makes them for a TPU"
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
    """Attention as in `api.decode`; for `heads_K` see `api._own_heads`."""
    # The kernel starts to copy a row's first block before it reaches the row: no row may be empty.
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
    """Attention as in `api.extend`; for `heads_K` see `api._own_heads`.

    Padding is computed too: it comes after a row's tokens, which do not see it.
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
    """Causal attention [X, N, H] of the last X / B positions of every row's lengths_B."""
    (X, N, H), (C, width) = q_XNH.shape, kv_PSCH.shape[2:]
    B, M = table_BM.shape
    q_XNH = jnp.pad(q_XNH, ((0, 0), (0, 0), (0, width - H)))
    reads_KN = None if heads_K is None else _heads_read(heads_K, N=N, K=C // 2)
    if reads_KN is not None:
        # Pages hold more heads than these queries read: each query is repeated for every head.
        q_XKNH = jnp.where(reads_KN[None, :, :, None], q_XNH[:, None], 0)
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
    if reads_KN is not None:
        o_XKNH = o_XNH.reshape(X, C // 2, N, width)
        o_XNH = jnp.sum(jnp.where(reads_KN[None, :, :, None], o_XKNH, 0), axis=1)
    return o_XNH[:, :, :H]


def _heads_read(heads_K: jax.Array, *, N: int, K: int) -> jax.Array:
    """Booleans [K, N]: query head n reads the pages' head k."""
    head_N = jnp.repeat(heads_K, N // heads_K.shape[0], total_repeat_length=N)
    return head_N[None, :] == jnp.arange(K)[:, None]


def _pages_per_block(kv_PSCH: jax.Array, *, M: int) -> int:
    """Number of pages copied at a time: two buffers of them take at most `BUFFER_BYTES`."""
    page = math.prod(kv_PSCH.shape[1:]) * kv_PSCH.dtype.itemsize
    return max(1, min(M, BUFFER_BYTES // (2 * page)))
