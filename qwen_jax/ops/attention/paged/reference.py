"""Attention over pages in plain jax.numpy, which other implementations are tested against.

A query's arithmetic does not depend on other queries: rows are computed one by one, queries in
tiles of fixed size, keys in blocks of fixed size from position 0, and a block without visible keys
changes neither the maximum nor the sums. In float32 the result is therefore bitwise independent of
other rows and of their number, of the page table's width, of padding, and of a prompt's chunks.
"""

import math

import jax
import jax.numpy as jnp

from qwen_jax.ops.attention import reference
from qwen_jax.ops.attention.paged import kv_pages

TILE = 32  # queries at a time; only scores of one tile and block are in memory
BLOCK = 128  # keys at a time, or one page if that is larger


def decode(
    q_BNH: jax.Array,
    kv_PSCH: kv_pages.Layer,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    heads_K: jax.Array | None = None,
) -> jax.Array:
    """Attention as in `api.decode`; for `heads_K` see `api._own_heads`."""

    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        q_NH, table_M, length = row
        return _attend(q_NH[None], kv_PSCH, table_M, length[None] - 1, heads_K)[0]

    return jax.lax.map(one, (q_BNH, table_BM, lengths_B))


def extend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    kv_PSCH: kv_pages.Layer,
    *,
    table_BM: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    prefix: str,
    heads_K: jax.Array | None = None,
) -> jax.Array:
    """See `api.extend`. Reads the chunk's keys from the pages, as the prefix's.

    Padding sees nothing: zeros.
    """
    del k_BTKH, v_BTKH, prefix
    B, T, N, H = q_BTNH.shape
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, -T % TILE), (0, 0), (0, 0)))
    step_1T = jnp.arange(q_BTNH.shape[1])[None]
    last_BT = jnp.where(step_1T < lengths_B[:, None], starts_B[:, None] + step_1T, -1)
    tiles = q_BTNH.shape[1] // TILE

    def one(tile: tuple[jax.Array, ...]) -> jax.Array:
        q_TNH, last_T, row = tile
        return _attend(q_TNH, kv_PSCH, table_BM[row], last_T, heads_K)

    rows = jnp.arange(B * tiles) // tiles
    o_XTNH = jax.lax.map(one, (q_BTNH.reshape(-1, TILE, N, H), last_BT.reshape(-1, TILE), rows))
    return o_XTNH.reshape(q_BTNH.shape)[:, :T]


def _attend(
    q_TNH: jax.Array,
    kv_PSCH: kv_pages.Layer,
    table_M: jax.Array,
    last_T: jax.Array,
    heads_K: jax.Array | None,
) -> jax.Array:
    """Attention of each query over positions 0..last of one row, [T, N, H].

    arXiv 2205.14135, algorithm 1, by blocks of keys. Outputs with last = -1 are zeros. All sums are
    float32.
    """
    T, N, H = q_TNH.shape
    S = kv_PSCH.shape[1]
    K = kv_PSCH.shape[2] // 2 if heads_K is None else heads_K.shape[0]
    per_block = max(1, BLOCK // S)
    table_M = jnp.pad(table_M, (0, -table_M.shape[0] % per_block))
    q_TKGH = q_TNH.reshape(T, K, N // K, H)

    def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        max_KGT1, sum_KGT1, o_KGTH = carry
        pages_1M = jax.lax.dynamic_slice_in_dim(table_M, index * per_block, per_block)[None]
        k_SKH, v_SKH = (x[0] for x in kv_pages.gather(kv_PSCH, pages_1M, H=H))
        if heads_K is not None:
            k_SKH, v_SKH = (jnp.take(x, heads_K, axis=1) for x in (k_SKH, v_SKH))
        scores_KGTS = jnp.einsum(
            "tkgh,skh->kgts", q_TKGH, k_SKH, preferred_element_type=jnp.float32
        ) / math.sqrt(H)
        position_S = index * per_block * S + jnp.arange(per_block * S)
        seen_11TS = (position_S[None] <= last_T[:, None])[None, None]
        # Values that an earlier request left on a page may be infinite, and 0 times inf is not 0.
        v_SKH = jnp.where((position_S <= jnp.max(last_T))[:, None, None], v_SKH, 0)
        scores_KGTS = jnp.where(seen_11TS, scores_KGTS, reference.MASKED)
        new_KGT1 = jnp.maximum(max_KGT1, scores_KGTS.max(axis=-1, keepdims=True))
        weights_KGTS = jnp.where(seen_11TS, jnp.exp(scores_KGTS - new_KGT1), 0)
        old_KGT1 = jnp.exp(max_KGT1 - new_KGT1)
        sum_KGT1 = sum_KGT1 * old_KGT1 + weights_KGTS.sum(axis=-1, keepdims=True)
        part_KGTH = jnp.einsum(
            "kgts,skh->kgth",
            weights_KGTS.astype(v_SKH.dtype),
            v_SKH,
            preferred_element_type=jnp.float32,
        )
        return new_KGT1, sum_KGT1, o_KGTH * old_KGT1 + part_KGTH

    column = (K, N // K, T, 1)
    carry = (
        jnp.full(column, reference.MASKED, jnp.float32),
        jnp.zeros(column, jnp.float32),
        jnp.zeros((*column[:-1], H), jnp.float32),
    )
    num_blocks = jnp.max(last_T) // (per_block * S) + 1
    _, sum_KGT1, o_KGTH = jax.lax.fori_loop(0, num_blocks, block, carry)
    # The maximum's own weight is 1: only a query without visible keys has a smaller sum.
    o_KGTH /= jnp.maximum(sum_KGT1, 1)
    return jnp.moveaxis(o_KGTH, 2, 0).reshape(T, N, H).astype(q_TNH.dtype)
