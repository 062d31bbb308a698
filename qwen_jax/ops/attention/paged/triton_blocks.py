"""Parts of Triton kernels: attention of one row's queries over some of its pages' blocks of keys.

Letters as in `qwen_jax/ops/attention/paged/kv_pages.py`; here R is queries of one row, and S
positions of a block.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.ops.attention import reference
from qwen_jax.ops.attention.paged import kv_pages

ROWS = 16  # of a product, at least: what a tensor core's instruction takes
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the work of decoding is cut; `benchmarks/paged_attention.py` compares them.

    block: keys read at a time. warps, stages: of one program, Triton's. programs: how many are
    wanted at least, over all rows, heads and splits. min_keys: a shorter split does not pay.
    """

    block: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2048
    min_keys: int = 256


def blocks_of_split(length: jax.Array, *, splits: int, tuning: Tuning) -> tuple:
    """(blocks of keys that a row has, how many of them a split takes)."""
    blocks = pl.cdiv(length, tuning.block)
    least = max(1, tuning.min_keys // tuning.block)
    return blocks, jnp.maximum(least, pl.cdiv(blocks, splits))


@dataclass(frozen=True)
class Split:
    """One of a row's splits, over blocks first .. last of all its `blocks`, for one head."""

    row: jax.Array
    head: jax.Array
    index: jax.Array
    length: jax.Array
    first: jax.Array
    last: jax.Array
    blocks: jax.Array


def split(row, head, index, length, *, splits: int, tuning: Tuning) -> Split:
    """Split number `index` of a row of this length; one beyond the row has no blocks."""
    blocks, per_split = blocks_of_split(length, splits=splits, tuning=tuning)
    first = index * per_split
    last = jnp.minimum(first + per_split, blocks)
    return Split(row, head, index, length, first, last, blocks)


def read_first(kv_PSCH, table_BM, part: Split, *, new: bool, tuning: Tuning) -> tuple:
    """Keys and values of the split's first block, for `over_blocks`; zeros if it has none."""
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
    kept_PSCH,
    table_BM,
    part: Split,
    held: tuple | None,
    *,
    ends_R,
    tuning: Tuning,
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries over one split of their row: [R, H], and its log2-sum-exp [R].

    Query r sees positions below ends_R. A new key and value, those at the row's end, are given and
    not read: whose split has the end takes them, and writes them to the pages kept_PSCH. held: what
    `read_first` gave, where that was asked for.
    """
    tall, H = q_RH.shape
    b, head, length = part.row, part.head, part.length
    num_read = length - 1 if new else length
    # Products with keys are exponents of two, as the hardware takes them.
    scale = LOG2_E / math.sqrt(H)

    def block(index, carry, held=None):
        max_R, sum_R, o_RH = carry
        position_S = index * tuning.block + jnp.arange(tuning.block)
        (k_SH, k_scale_1S), (v_SH, v_scale_1S) = held or (
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
        jnp.full(tall, reference.MASKED, jnp.float32),
        jnp.zeros(tall, jnp.float32),
        jnp.zeros((tall, H), jnp.float32),
    )
    if new:
        at_end = part.last == part.blocks
        carry = _first(q_RH, *new, carry, at_end=at_end, scale=scale)
        _write(kept_PSCH, table_BM, b, length - 1, head, *new, at_end=at_end)
    begin = part.first
    if held is not None:
        carry, begin = block(begin, carry, held), begin + 1
    max_R, sum_R, o_RH = jax.lax.fori_loop(begin, part.last, block, carry)
    # A query may see nothing of the split: then its sums are 0, and its log-sum-exp -inf.
    o_RH = o_RH / jnp.where(sum_R > 0, sum_R, 1.0)[:, None]
    return o_RH, max_R + jnp.log2(sum_R)


def _first(q_RH, k_H, v_H, empty, *, at_end, scale: float) -> tuple:
    """(maximum, sum, o) of the new key alone, in the split at a row's end; elsewhere `empty`."""
    wide = [x.astype(jnp.float32) for x in (q_RH, k_H, v_H)]
    score_R = jnp.sum(wide[0] * wide[1][None, :], axis=1) * scale
    o_RH = jnp.broadcast_to(wide[2][None, :], q_RH.shape)
    alone = (score_R, jnp.ones_like(score_R), o_RH)
    return tuple(jnp.where(at_end, x, y) for x, y in zip(alone, empty, strict=True))


def _write(kept_PSCH, table_BM, b, position, head, k_H, v_H, *, at_end) -> None:
    """The new key and value of one head to their place, by the program at the row's end."""
    S = kept_PSCH.shape[1]

    @pl.when(at_end)
    def _():
        page = table_BM[b, position // S]
        for channel, x_H in ((2 * head, k_H), (2 * head + 1, v_H)):
            kept_PSCH[page, position % S, channel, :] = x_H


def _read(kv_PSCH, table_BM, b, start, channel, seen_S) -> tuple:
    """Keys or values [block, H] of one head from position `start`, a multiple of the block.

    And the scales [1, block] of quantised ones, 1 of others. Zeros where nothing is seen: what an
    earlier owner left on a page may be infinite.
    """
    block, (S, H) = seen_S.shape[0], (kv_PSCH.shape[1], kv_PSCH.shape[3])

    def wide(x_S: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_S[:, None], (block, H))

    if block <= S:
        of_scales = (table_BM[b, start // S], pl.ds(start % S, block), channel)
        place = of_scales
    else:
        position_S = start + jnp.arange(block)
        of_scales = (table_BM[b, position_S // S], position_S % S, jnp.full(block, channel))
        lane_SH = jnp.broadcast_to(jnp.arange(H)[None, :], (block, H))
        place = (*map(wide, of_scales), lane_SH)
    quantised = isinstance(kv_PSCH, kv_pages.Quantised)
    values_PSCH = kv_PSCH.values_PSCH if quantised else kv_PSCH
    values_SH = triton.load(values_PSCH.at[place], mask=wide(seen_S), other=0)
    if not quantised:
        return values_SH, 1.0
    scales_S = triton.load(kv_PSCH.scales_PSC.at[of_scales], mask=seen_S, other=0.0)
    return values_SH, scales_S[None, :]


def _dot(a, b, *, transposed: bool = False) -> jax.Array:
    """a b, or a b^T, summed in float32; float32 arguments are not rounded to fewer bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, trans_b=transposed, precision=precision)
