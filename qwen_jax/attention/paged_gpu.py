"""Attention over pages on a GPU: our own kernel for decoding, cuDNN for chunks of prompts.

A decoding row reads its keys and values once and does little else, so what counts is that every
multiprocessor reads all the time. The kernel looks pages up in the row's table as it goes, where
they lie: nothing is gathered. One program reads one key-value head over a part of one row's
positions (a split) for the G query heads that share it, G padded to the 16 that a tensor core
takes. How a row is split depends on its own length and on shapes alone, so that neighbours do not
change how its sums are rounded. A second small kernel merges the splits by their log-sum-exp
(arXiv 2205.14135 for the softmax in blocks; splits as in Flash-Decoding).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from partitioning import ring
from qwen_jax import paged_cache
from qwen_jax.attention import api, cudnn, reference

ROWS = 16  # query heads of a product, at least: what a tensor core's instruction takes
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


TUNING = Tuning()


def why_not_decode(q_BNH: jax.Array, kv_PSCH: paged_cache.Layer, *, platform: str) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    if platform != "gpu":
        return f"platform {platform!r} is not 'gpu'"
    H, S = q_BNH.shape[-1], kv_PSCH.shape[1]
    for name, size in (("head_dim", H), ("page_size", S)):
        if size < ROWS or size & (size - 1):
            return f"{name} {size} is not a power of two from {ROWS}"
    if q_BNH.dtype != kv_PSCH.dtype:
        return f"queries are {q_BNH.dtype}, but pages {kv_PSCH.dtype}"
    size = math.prod(kv_PSCH.shape)
    if isinstance(kv_PSCH, paged_cache.Quantised) and 2**31 < size <= 2**32:
        # Triton's offsets are signed 32 bits for arrays of up to 2^32 bytes.
        return f"a layer's pages hold {size} int8; use at most {2**31}"
    return None


def why_not_extend(q_BTNH: jax.Array, kv_PSCH: paged_cache.Layer, *, platform: str) -> str | None:
    """Why cuDNN cannot run this call, or None if it can."""
    del kv_PSCH
    wrong = None if platform == "gpu" else f"platform {platform!r} is not 'gpu'"
    return wrong or cudnn.why_not(q_BTNH)


def decode(
    q_BNH: jax.Array,
    kv_PSCH: paged_cache.Layer,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    heads_K: jax.Array | None = None,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> jax.Array:
    """See `qwen_jax.attention.paged.decode`, and `heads_K` in `paged._own_heads`.

    `interpret` runs the kernels on a CPU, step by step, for tests.
    """
    if heads_K is None:
        heads_K = jnp.arange(kv_PSCH.shape[2] // 2, dtype=jnp.int32)
    rows = (table_BM, lengths_B, heads_K)
    return _decode(q_BNH, kv_PSCH, rows, (), tuning=tuning, interpret=interpret)[0]


def append(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    kv_PSCH: jax.Array,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `qwen_jax.attention.paged.append`. The program that reads a row's end writes it too."""
    rows = (table_BM, lengths_B, jnp.arange(k_BKH.shape[1], dtype=jnp.int32))
    new = (k_BKH.astype(kv_PSCH.dtype), v_BKH.astype(kv_PSCH.dtype))
    return _decode(q_BNH, kv_PSCH, rows, new, tuning=tuning, interpret=interpret)


def _decode(
    q_BNH: jax.Array,
    kv_PSCH: paged_cache.Layer,
    rows: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    *,
    tuning: Tuning,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """(o_BNH, and where a new key and value of every row are given, the pages with them)."""
    (B, N, H), S = q_BNH.shape, kv_PSCH.shape[1]
    table_BM, lengths_B, heads_K = rows
    K = heads_K.shape[0]
    tall = max(ROWS, pl.next_power_of_2(N // K))
    tuning = dataclasses.replace(tuning, block=min(tuning.block, table_BM.shape[1] * S))
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % max(1, tuning.block // S))))
    X = num_splits(B * K, table_BM.shape[1] * S, tuning=tuning)
    pages = (jax.ShapeDtypeStruct(kv_PSCH.shape, kv_PSCH.dtype),) if new else ()
    o_BKXGH, lse_BKXG, *kept = pl.pallas_call(
        functools.partial(_split, group=N // K, splits=X, tuning=tuning),
        grid=(K, X, B),  # heads of one row side by side: they read the same places
        out_shape=(
            jax.ShapeDtypeStruct((B, K, X, tall, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, X, tall), jnp.float32),
            *pages,
        ),
        input_output_aliases={1: 2} if new else {},
        name="paged_append" if new else "paged_decode",
        **_options(interpret, warps=tuning.warps, stages=tuning.stages),
    )(q_BNH, kv_PSCH, table_BM, lengths_B, heads_K, new)
    o_BNH = pl.pallas_call(
        functools.partial(_merge, group=N // K, splits=X, tuning=tuning),
        grid=(N, B),
        out_shape=jax.ShapeDtypeStruct((B, N, H), q_BNH.dtype),
        name="paged_decode_merge",
        **_options(interpret, warps=4, stages=1),
    )(o_BKXGH, lse_BKXG, lengths_B)
    return o_BNH, *kept


def extend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    kv_PSCH: paged_cache.Layer,
    *,
    table_BM: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    past: str,
    heads_K: jax.Array | None = None,
) -> jax.Array:
    """See `qwen_jax.attention.paged.extend`, and `heads_K` in `paged._own_heads`.

    Two calls of cuDNN's: the chunk to itself, causally, and to the past, which is gathered out of
    all the table's pages into one piece. They are merged by their log-sum-exp in float32.
    """
    del lengths_B  # padding lies behind a row's tokens, which do not see it
    if past == "none":
        return cudnn.attention(q_BTNH, k_BTKH, v_BTKH, mask=api.Mask(causal=True))
    k_BSKH, v_BSKH = paged_cache.gather(kv_PSCH, table_BM, H=q_BTNH.shape[3])
    if heads_K is not None:
        k_BSKH, v_BSKH = (jnp.take(x, heads_K, axis=2) for x in (k_BSKH, v_BSKH))
    own = cudnn.part_forward(q_BTNH, k_BTKH, v_BTKH, lengths_B=None)
    before = cudnn.part_forward(q_BTNH, k_BSKH, v_BSKH, lengths_B=starts_B)
    # float32 island: weights of the two parts are exponentials.
    o_BTNH, _ = ring.merge((own[0].astype(jnp.float32), own[1]), before)
    return o_BTNH.astype(q_BTNH.dtype)


def num_splits(programs: int, keys: int, *, tuning: Tuning) -> int:
    """Splits of every row, a power of two: as many as occupy the GPU, each of `min_keys` or more.

    `programs` are there without splitting; `keys` is the most that a row may have.
    """
    wanted = pl.cdiv(tuning.programs, programs)
    useful = pl.cdiv(keys, tuning.min_keys)
    return pl.next_power_of_2(max(1, min(wanted, useful, 128)))


def _blocks_of_split(length: jax.Array, *, splits: int, tuning: Tuning) -> tuple:
    """(blocks of keys that a row has, how many of them a split takes)."""
    blocks = pl.cdiv(length, tuning.block)
    least = max(1, tuning.min_keys // tuning.block)
    return blocks, jnp.maximum(least, pl.cdiv(blocks, splits))


def _split(
    q_BNH, kv_PSCH, table_BM, lengths_B, heads_K, new, o_BKXGH, lse_BKXG, *kept,
    group: int, splits: int, tuning: Tuning,
):  # fmt: skip
    """One program: a key-value head's queries over one split of a row's keys.

    A new key and value, the row's last, are not read from its page but written to it (`kept`).
    """
    k, x, b = (pl.program_id(i) for i in range(3))
    tall, H = o_BKXGH.shape[3:]
    length = lengths_B[b]
    num_read = length - 1 if new else length
    blocks, per_split = _blocks_of_split(length, splits=splits, tuning=tuning)
    first = x * per_split
    last = jnp.minimum(first + per_split, blocks)

    @pl.when(first < blocks)
    def _():
        head = heads_K[k]
        row_G = jnp.arange(tall)
        in_group_G = row_G < group
        q_GH = q_BNH[b, k * group + jnp.where(in_group_G, row_G, 0), :]
        # Products with keys are exponents of two, as the hardware takes them.
        scale = LOG2_E / math.sqrt(H)

        def block(index, carry):
            max_G, sum_G, o_GH = carry
            seen_S = index * tuning.block + jnp.arange(tuning.block) < num_read
            (k_SH, k_scale_1S), (v_SH, v_scale_1S) = (
                _read(kv_PSCH, table_BM, b, index * tuning.block, channel, seen_S)
                for channel in (2 * head, 2 * head + 1)
            )
            scores_GS = _dot(q_GH, k_SH.astype(q_GH.dtype), transposed=True) * k_scale_1S * scale
            scores_GS = jnp.where(seen_S[None, :], scores_GS, reference.MASKED)
            new_G = jnp.maximum(max_G, jnp.max(scores_GS, axis=1))
            weights_GS = jnp.exp2(scores_GS - new_G[:, None])
            old_G = jnp.exp2(max_G - new_G)
            sum_G = sum_G * old_G + jnp.sum(weights_GS, axis=1)
            part_GH = _dot((weights_GS * v_scale_1S).astype(q_GH.dtype), v_SH.astype(q_GH.dtype))
            return new_G, sum_G, o_GH * old_G[:, None] + part_GH

        carry = (
            jnp.full(tall, reference.MASKED, jnp.float32),
            jnp.zeros(tall, jnp.float32),
            jnp.zeros((tall, H), jnp.float32),
        )
        if new:
            at_end = last == blocks
            k_H, v_H = (side[b, k, :] for side in new)
            carry = _first(q_GH, k_H, v_H, carry, at_end=at_end, scale=scale)
            _write(kept[0], table_BM, b, length - 1, head, k_H, v_H, at_end=at_end)
        max_G, sum_G, o_GH = jax.lax.fori_loop(first, last, block, carry)
        mask_GH = jnp.broadcast_to(in_group_G[:, None], o_GH.shape)
        triton.store(o_BKXGH.at[b, k, x], o_GH / sum_G[:, None], mask=mask_GH)
        triton.store(lse_BKXG.at[b, k, x], max_G + jnp.log2(sum_G), mask=in_group_G)


def _first(q_GH, k_H, v_H, empty, *, at_end, scale: float) -> tuple:
    """(maximum, sum, o) of the new key alone, in the split at a row's end; elsewhere `empty`."""
    wide = [x.astype(jnp.float32) for x in (q_GH, k_H, v_H)]
    score_G = jnp.sum(wide[0] * wide[1][None, :], axis=1) * scale
    o_GH = jnp.broadcast_to(wide[2][None, :], q_GH.shape)
    alone = (score_G, jnp.ones_like(score_G), o_GH)
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
    quantised = isinstance(kv_PSCH, paged_cache.Quantised)
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


def _merge(o_BKXGH, lse_BKXG, lengths_B, o_BNH, *, group: int, splits: int, tuning: Tuning):
    """One program: a query head's splits into one, of those that its row's length reaches."""
    n, b = pl.program_id(0), pl.program_id(1)
    H = o_BNH.shape[2]
    blocks, per_split = _blocks_of_split(lengths_B[b], splits=splits, tuning=tuning)
    written_X = jnp.arange(splits) * per_split < blocks
    place = (b, n // group, slice(None), n % group)
    lse_X = triton.load(lse_BKXG.at[place], mask=written_X, other=reference.MASKED)
    weights_X = jnp.where(written_X, jnp.exp2(lse_X - jnp.max(lse_X)), 0)
    mask = jnp.broadcast_to(written_X[:, None], (splits, H))
    o_XH = triton.load(o_BKXGH.at[place], mask=mask, other=0)
    o_H = jnp.sum(o_XH * weights_X[:, None], axis=0)
    # The largest weight is 1: only a row that is not active has a smaller sum.
    o_BNH[b, n] = (o_H / jnp.maximum(jnp.sum(weights_X), 1)).astype(o_BNH.dtype)


def _options(interpret: bool, *, warps: int, stages: int) -> dict:
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return {"interpret": interpret, "compiler_params": params}
