"""Functions inside Triton kernels: attention of one row's queries over blocks of its keys.

Letters as in `kv_pages.py`; R is the queries of one row, and S also the positions of a block.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.ops.attention import reference
from qwen_jax.ops.attention.paged import kv_pages

ROWS = 16  # fewest rows of a product that a tensor core's instruction takes
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes of the work of decoding; `benchmarks/paged_attention.py` compares them.

    block: keys read at a time. warps, stages: Triton's options of a program. programs: wanted
    number of programs over all rows, heads and splits. min_keys: fewest keys of a split.
    """

    block: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2048
    min_keys: int = 256


def blocks_of_split(length: jax.Array, *, splits: int, tuning: Tuning) -> tuple:
    """The number of a row's blocks of keys, and the number of blocks of a split."""
    blocks = pl.cdiv(length, tuning.block)
    least = max(1, tuning.min_keys // tuning.block)
    return blocks, jnp.maximum(least, pl.cdiv(blocks, splits))


@dataclass(frozen=True)
class Split:
    """One split of a row for one head: blocks first..last - 1 of the row's `blocks`."""

    row: jax.Array
    head: jax.Array
    index: jax.Array
    length: jax.Array
    first: jax.Array
    last: jax.Array
    blocks: jax.Array


def split(row, head, index, length, *, splits: int, tuning: Tuning) -> Split:
    """Split number `index` of a row of this length; a split beyond the row has no blocks."""
    blocks, per_split = blocks_of_split(length, splits=splits, tuning=tuning)
    first = index * per_split
    last = jnp.minimum(first + per_split, blocks)
    return Split(row, head, index, length, first, last, blocks)


def read_first(kv_PSCH, table_BM, part: Split, *, new: bool, tuning: Tuning) -> tuple:
    """Keys and values of the split's first block, for `over_blocks`; zeros if it has no block."""
    first = jnp.where(part.first < part.last, part.first, 0)
    position_S = first * tuning.block + jnp.arange(tuning.block)
    seen_S = (position_S < part.length - int(new)) & (part.first < part.last)
    return tuple(
        _read(kv_PSCH, table_BM, part.row, first * tuning.block, c, seen_S)
        for c in (2 * part.head, 2 * part.head + 1)
    )


def over_blocks(
    q_RH,
    new: tuple[jax.Array, ...],
    kv_PSCH,
    new_PSCH,
    table_BM,
    part: Split,
    first_block: tuple | None,
    *,
    ends_R,
    tuning: Tuning,
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries over one split of their row, [R, H], and its log2-sum-exp, [R].

    Query r sees positions below ends_R. new: the key and value at the row's end, if they are not on
    its page yet; the split with the row's end uses them, and writes them to the pages new_PSCH.
    first_block: the result of `read_first`, or None.
    """
    R, H = q_RH.shape
    b, head, length = part.row, part.head, part.length
    num_read = length - 1 if new else length
    # Scores are exponents of 2, which the hardware computes faster than those of e.
    scale = LOG2_E / math.sqrt(H)

    def block(index, carry, first_block=None):
        max_R, sum_R, o_RH = carry
        position_S = index * tuning.block + jnp.arange(tuning.block)
        (k_SH, k_scale_1S), (v_SH, v_scale_1S) = first_block or (
            _read(kv_PSCH, table_BM, b, index * tuning.block, c, position_S < num_read)
            for c in (2 * head, 2 * head + 1)
        )
        scores_RS = _dot(q_RH, k_SH.astype(q_RH.dtype), transposed=True) * k_scale_1S * scale
        seen_RS = position_S[None, :] < ends_R[:, None]
        scores_RS = jnp.where(seen_RS, scores_RS, reference.MASKED)
        new_R = jnp.maximum(max_R, jnp.max(scores_RS, axis=1))
        weights_RS = jnp.where(seen_RS, jnp.exp2(scores_RS - new_R[:, None]), 0.0)
        old_R = jnp.exp2(max_R - new_R)
        sum_R = sum_R * old_R + jnp.sum(weights_RS, axis=1)
        part_RH = _dot((weights_RS * v_scale_1S).astype(q_RH.dtype), v_SH.astype(q_RH.dtype))
        return new_R, sum_R, o_RH * old_R[:, None] + part_RH

    carry = (
        jnp.full(R, reference.MASKED, jnp.float32),
        jnp.zeros(R, jnp.float32),
        jnp.zeros((R, H), jnp.float32),
    )
    if new:
        at_end = part.last == part.blocks
        carry = _new_key(q_RH, *new, carry, at_end=at_end, scale=scale)
        _write(new_PSCH, table_BM, b, length - 1, head, *new, at_end=at_end)
    begin = part.first
    if first_block is not None:
        carry, begin = block(begin, carry, first_block), begin + 1
    max_R, sum_R, o_RH = jax.lax.fori_loop(begin, part.last, block, carry)
    # A query without visible keys in the split has sums of 0 and a log-sum-exp of -inf.
    o_RH = o_RH / jnp.where(sum_R > 0, sum_R, 1.0)[:, None]
    return o_RH, max_R + jnp.log2(sum_R)


def _new_key(q_RH, k_H, v_H, empty, *, at_end, scale: float) -> tuple:
    """Maximum, sum and o of the new key alone in the split at a row's end; else `empty`."""
    wide = [x.astype(jnp.float32) for x in (q_RH, k_H, v_H)]
    score_R = jnp.sum(wide[0] * wide[1][None, :], axis=1) * scale
    o_RH = jnp.broadcast_to(wide[2][None, :], q_RH.shape)
    alone = (score_R, jnp.ones_like(score_R), o_RH)
    return tuple(jnp.where(at_end, x, y) for x, y in zip(alone, empty, strict=True))


def _write(new_PSCH, table_BM, b, position, head, k_H, v_H, *, at_end) -> None:
    """Writes one head's new key and value to their page, in the program at the row's end."""
    S = new_PSCH.shape[1]

    @pl.when(at_end)
    def _():
        page = table_BM[b, position // S]
        for channel, x_H in ((2 * head, k_H), (2 * head + 1, v_H)):
            new_PSCH[page, position % S, channel, :] = x_H


def _read(kv_PSCH, table_BM, b, start, channel, seen_S) -> tuple:
    """Keys or values [block, H] of one head from position `start`, and their scales [1, block].

    `start` is a multiple of the block; the scale of plain pages is 1. Positions that are not seen
    are zeros: values that an earlier request left on a page may be infinite.
    """
    block, (S, H) = seen_S.shape[0], (kv_PSCH.shape[1], kv_PSCH.shape[3])

    def wide(x_S: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_S[:, None], (block, H))

    if block <= S:
        scale_index = (table_BM[b, start // S], pl.ds(start % S, block), channel)
        place = scale_index
    else:
        position_S = start + jnp.arange(block)
        scale_index = (table_BM[b, position_S // S], position_S % S, jnp.full(block, channel))
        lane_SH = jnp.broadcast_to(jnp.arange(H)[None, :], (block, H))
        place = (*map(wide, scale_index), lane_SH)
    quantised = isinstance(kv_PSCH, kv_pages.Quantised)
    values_PSCH = kv_PSCH.values_PSCH if quantised else kv_PSCH
    values_SH = triton.load(values_PSCH.at[place], mask=wide(seen_S), other=0)
    if not quantised:
        return values_SH, 1.0
    scales_S = triton.load(kv_PSCH.scales_PSC.at[scale_index], mask=seen_S, other=0.0)
    return values_SH, scales_S[None, :]


def _dot(a, b, *, transposed: bool = False) -> jax.Array:
    """The product a b, or a b^T, summed in float32; float32 arguments are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, trans_b=transposed, precision=precision)
