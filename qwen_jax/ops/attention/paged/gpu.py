"""Attention over pages on a GPU: our own kernel for decoding, cuDNN for chunks of prompts.

A decoding row reads its keys and values once and does little else, so what counts is that every
multiprocessor reads all the time. The kernel looks pages up in the row's table as it goes, where
they lie: nothing is gathered. One program reads one key-value head over a part of one row's
positions (a split) for the G query heads that share it, of one query or a few, padded to the 16
rows that a tensor core takes. How a row is split depends on its own length and on shapes alone, so
that neighbours do not change how its sums are rounded. A second small kernel merges the splits by
their log-sum-exp (arXiv 2205.14135 for the softmax in blocks; splits as in Flash-Decoding).
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
from qwen_jax.ops.attention import api, cudnn, reference
from qwen_jax.ops.attention.paged import kv_pages, triton_blocks
from qwen_jax.ops.attention.paged.triton_blocks import ROWS, Tuning

FEW = 64  # rows of a product, at most: a program's registers hold their sums


TUNING = Tuning()


def unsupported_decode(q_BNH: jax.Array, kv_PSCH: kv_pages.Layer) -> str | None:
    """The reason why the kernel cannot take these queries and pages on any GPU; None: it can."""
    H, S = q_BNH.shape[-1], kv_PSCH.shape[1]
    for name, size in (("head_dim", H), ("page_size", S)):
        if size < ROWS or size & (size - 1):
            return f"{name} {size} is not a power of two from {ROWS}"
    if q_BNH.dtype != kv_PSCH.dtype:
        return f"queries are {q_BNH.dtype}, but pages {kv_PSCH.dtype}"
    size = math.prod(kv_PSCH.shape)
    if isinstance(kv_PSCH, kv_pages.Quantised) and 2**31 < size <= 2**32:
        # Triton's offsets are signed 32 bits for arrays of up to 2^32 bytes.
        return f"a layer's pages hold {size} int8; use at most {2**31}"
    return None


def unsupported_extend(q_BTNH: jax.Array, kv_PSCH: kv_pages.Layer) -> str | None:
    """The reason why neither the kernel nor cuDNN can take this call; None: one of them can."""
    reason = unsupported_decode(q_BTNH, kv_PSCH)
    if reason is None and _are_few(q_BTNH, kv_PSCH.shape[2] // 2):
        return None
    return cudnn.unsupported(q_BTNH)


def _are_few(q_BTNH: jax.Array, K: int) -> bool:
    """Whether a chunk's queries are so few that its time is that of reading keys."""
    return q_BTNH.shape[1] * q_BTNH.shape[2] // K <= FEW


def decode(
    q_BNH: jax.Array,
    kv_PSCH: kv_pages.Layer,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    heads_K: jax.Array | None = None,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> jax.Array:
    """See `qwen_jax.ops.attention.paged.api.decode`, and `heads_K` in `paged._own_heads`.

    `interpret` runs the kernels on a CPU, step by step, for tests.
    """
    rows = Rows(table_BM, lengths_B, lengths_B - 1, _all_heads(heads_K, kv_PSCH))
    (o_B1NH,) = _read_rows(q_BNH[:, None], kv_PSCH, rows, (), tuning=tuning, interpret=interpret)
    return o_B1NH[:, 0]


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
    """See `api.append`. The program that reads a row's end writes it too."""
    rows = Rows(table_BM, lengths_B, lengths_B - 1, _all_heads(None, kv_PSCH))
    new = (k_BKH.astype(kv_PSCH.dtype), v_BKH.astype(kv_PSCH.dtype))
    o_B1NH, kept_PSCH = _read_rows(
        q_BNH[:, None], kv_PSCH, rows, new, tuning=tuning, interpret=interpret
    )
    return o_B1NH[:, 0], kept_PSCH


@dataclass(frozen=True)
class Rows:
    """lengths_B: positions that a row has in all; firsts_B: that of its first query."""

    table_BM: jax.Array
    lengths_B: jax.Array
    firsts_B: jax.Array
    heads_K: jax.Array


jax.tree_util.register_dataclass(Rows, ["table_BM", "lengths_B", "firsts_B", "heads_K"], [])


def _all_heads(heads_K: jax.Array | None, kv_PSCH: kv_pages.Layer) -> jax.Array:
    return jnp.arange(kv_PSCH.shape[2] // 2, dtype=jnp.int32) if heads_K is None else heads_K


def _read_rows(
    q_BTNH: jax.Array,
    kv_PSCH: kv_pages.Layer,
    rows: Rows,
    new: tuple[jax.Array, ...],
    *,
    tuning: Tuning,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """(o_BTNH, and where a new key and value of every row are given, the pages with them).

    Query t sees positions 0..firsts_B + t of its row.
    """
    (B, T, N, H), S, M = q_BTNH.shape, kv_PSCH.shape[1], rows.table_BM.shape[1]
    K = rows.heads_K.shape[0]
    tall = max(ROWS, pl.next_power_of_2(T * N // K))
    tuning = dataclasses.replace(tuning, block=min(tuning.block, M * S))
    # A block is read whole, so that the table ends with one.
    table_BM = jnp.pad(rows.table_BM, ((0, 0), (0, -M % max(1, tuning.block // S))))
    rows = dataclasses.replace(rows, table_BM=table_BM)
    X = num_splits(B * K, M * S, tuning=tuning)
    pages = (jax.ShapeDtypeStruct(kv_PSCH.shape, kv_PSCH.dtype),) if new else ()
    o_BKXRH, lse_BKXR, *kept = pl.pallas_call(
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
    )(q_BTNH, kv_PSCH, rows, new)
    o_BTNH = pl.pallas_call(
        functools.partial(_merge, group=N // K, splits=X, tuning=tuning),
        grid=(N, T, B),
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        name="paged_decode_merge",
        **_options(interpret, warps=4, stages=1),
    )(o_BKXRH, lse_BKXR, rows.lengths_B)
    return o_BTNH, *kept


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
    interpret: bool = False,
) -> jax.Array:
    """See `qwen_jax.ops.attention.paged.api.extend`, and `heads_K` in `paged._own_heads`.

    A few queries a row, as when a draft is verified, are read for as decoding does. Otherwise two
    calls of cuDNN's: the chunk to itself, causally, and to the prefix, which is gathered out of all
    the table's pages into one piece. They are merged by their log-sum-exp in float32.
    """
    own_K = _all_heads(heads_K, kv_PSCH)
    fits = unsupported_decode(q_BTNH, kv_PSCH) is None
    if fits and _are_few(q_BTNH, own_K.shape[0]):
        ends_B = jnp.where(lengths_B > 0, starts_B + lengths_B, 0)
        rows = Rows(table_BM, ends_B, starts_B, own_K)
        (o_BTNH,) = _read_rows(q_BTNH, kv_PSCH, rows, (), tuning=TUNING, interpret=interpret)
        return o_BTNH
    # Padding lies behind a row's tokens, which do not see it.
    if prefix == "none":
        return cudnn.attention(q_BTNH, k_BTKH, v_BTKH, mask=api.Mask(causal=True))
    k_BSKH, v_BSKH = kv_pages.gather(kv_PSCH, table_BM, H=q_BTNH.shape[3])
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


def _split(
    q_BTNH, kv_PSCH, rows, new, o_BKXRH, lse_BKXR, *kept, group: int, splits: int, tuning: Tuning
):
    """One program: the queries (R, G of each) of a key-value head over one split of a row's keys.

    A new key and value, the row's last, are not read from its page but written to it (`kept`).
    """
    k, x, b = (pl.program_id(i) for i in range(3))
    tall = o_BKXRH.shape[3]
    length = rows.lengths_B[b]
    num_read = length - 1 if new else length
    part = triton_blocks.split(b, rows.heads_K[k], x, length, splits=splits, tuning=tuning)

    @pl.when(part.first < part.last)
    def _():
        row_R = jnp.arange(tall)
        real_R = row_R < q_BTNH.shape[1] * group
        row_R = jnp.where(real_R, row_R, 0)
        q_RH = q_BTNH[b, row_R // group, k * group + row_R % group, :]
        o_RH, lse_R = triton_blocks.over_blocks(
            q_RH,
            tuple(side[b, k, :] for side in new),
            kv_PSCH,
            kept[0] if new else None,
            rows.table_BM,
            part,
            None,
            # Below what a query sees, and within what there is to read.
            ends_R=jnp.minimum(rows.firsts_B[b] + row_R // group + 1, num_read),
            tuning=tuning,
        )
        triton.store(o_BKXRH.at[b, k, x], o_RH, mask=jnp.broadcast_to(real_R[:, None], o_RH.shape))
        triton.store(lse_BKXR.at[b, k, x], lse_R, mask=real_R)


def _merge(o_BKXRH, lse_BKXR, lengths_B, o_BTNH, *, group: int, splits: int, tuning: Tuning):
    """One program: a query head's splits into one, of those that its row's length reaches."""
    n, t, b = (pl.program_id(i) for i in range(3))
    H = o_BTNH.shape[3]
    blocks, per_split = triton_blocks.blocks_of_split(lengths_B[b], splits=splits, tuning=tuning)
    written_X = jnp.arange(splits) * per_split < blocks
    place = (b, n // group, slice(None), t * group + n % group)
    lse_X = triton.load(lse_BKXR.at[place], mask=written_X, other=reference.MASKED)
    weights_X = jnp.where(written_X, jnp.exp2(lse_X - jnp.max(lse_X)), 0)
    mask = jnp.broadcast_to(written_X[:, None], (splits, H))
    o_XH = triton.load(o_BKXRH.at[place], mask=mask, other=0)
    o_H = jnp.sum(o_XH * weights_X[:, None], axis=0)
    # The largest weight is 1: only a row that is not active has a smaller sum.
    o_BTNH[b, t, n] = (o_H / jnp.maximum(jnp.sum(weights_X), 1)).astype(o_BTNH.dtype)


def _options(interpret: bool, *, warps: int, stages: int) -> dict:
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return {"interpret": interpret, "compiler_params": params}
