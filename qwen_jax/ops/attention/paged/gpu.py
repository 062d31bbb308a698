"""Attention over pages on a GPU: our own kernel for decoding, cuDNN for chunks of prompts.

Decoding a row reads its keys and values once and computes little, so it is fastest if every
multiprocessor reads all the time. The kernel looks pages up in the row's page table while it reads,
and gathers nothing. One program reads one key-value head over a part of one row's positions (a
split) for the G query heads that share it, of one query or a few, padded to the 16 rows that a
tensor core takes. The splits of a row depend on its own length and on shapes alone, so that other
rows do not change the rounding of its sums. A second small kernel merges the splits by their
log-sum-exp (arXiv 2205.14135 for the softmax in blocks; splits as in Flash-Decoding).
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

FEW = 64  # most rows of a product: a program's registers hold their sums

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
    """Whether a chunk has so few queries that reading the keys takes most of its time."""
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
    """Attention as in `api.decode`; for `heads_K` see `api._own_heads`.

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
    """Attention and pages as in `api.append`; the program that reads a row's end also writes it."""
    rows = Rows(table_BM, lengths_B, lengths_B - 1, _all_heads(None, kv_PSCH))
    new = (k_BKH.astype(kv_PSCH.dtype), v_BKH.astype(kv_PSCH.dtype))
    o_B1NH, new_PSCH = _read_rows(
        q_BNH[:, None], kv_PSCH, rows, new, tuning=tuning, interpret=interpret
    )
    return o_B1NH[:, 0], new_PSCH


@dataclass(frozen=True)
class Rows:
    """The rows of a call: lengths_B positions each, whose first query is at position firsts_B."""

    table_BM: jax.Array
    lengths_B: jax.Array
    firsts_B: jax.Array
    heads_K: jax.Array


jax.tree_util.register_dataclass(Rows, ["table_BM", "lengths_B", "firsts_B", "heads_K"], [])


def _all_heads(heads_K: jax.Array | None, kv_PSCH: kv_pages.Layer) -> jax.Array:
    """The indices heads_K of the pages' heads that are read; None: all heads, in order."""
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
    """Outputs [B, T, N, H] of queries at positions firsts_B + t, and the pages with `new` written.

    Query t sees positions 0..firsts_B + t of its row. new: a key and a value of every row, or
    nothing; then only the outputs are returned.
    """
    (B, T, N, H), S, M = q_BTNH.shape, kv_PSCH.shape[1], rows.table_BM.shape[1]
    K = rows.heads_K.shape[0]
    padded_rows = max(ROWS, pl.next_power_of_2(T * N // K))
    tuning = dataclasses.replace(tuning, block=min(tuning.block, M * S))
    # Blocks are read whole: the page table is padded to a multiple of a block.
    table_BM = jnp.pad(rows.table_BM, ((0, 0), (0, -M % max(1, tuning.block // S))))
    rows = dataclasses.replace(rows, table_BM=table_BM)
    X = num_splits(B * K, M * S, tuning=tuning)
    pages = (jax.ShapeDtypeStruct(kv_PSCH.shape, kv_PSCH.dtype),) if new else ()
    o_BKXRH, lse_BKXR, *new_pages = pl.pallas_call(
        functools.partial(_split, group=N // K, splits=X, tuning=tuning),
        grid=(K, X, B),  # heads of one row are neighbours: they read the same pages
        out_shape=(
            jax.ShapeDtypeStruct((B, K, X, padded_rows, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, X, padded_rows), jnp.float32),
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
    return o_BTNH, *new_pages


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
    """Attention as in `api.extend`; for `heads_K` see `api._own_heads`.

    A few queries a row, as when draft tokens are verified, are computed by the decode kernel. More
    queries are computed by two calls of cuDNN: the chunk's own keys, causally, and the prefix,
    which is gathered from all pages of the page table. The two outputs are merged by their
    log-sum-exp in float32.
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
    own = cudnn.partial_forward(q_BTNH, k_BTKH, v_BTKH, lengths_B=None)
    before = cudnn.partial_forward(q_BTNH, k_BSKH, v_BSKH, lengths_B=starts_B)
    # float32 island: weights of the two parts are exponentials.
    o_BTNH, _ = ring.merge((own[0].astype(jnp.float32), own[1]), before)
    return o_BTNH.astype(q_BTNH.dtype)


def num_splits(programs: int, keys: int, *, tuning: Tuning) -> int:
    """Number of splits of every row, a power of two that occupies the GPU.

    programs: number of programs without splits. keys: most keys of a row; a split has
    `tuning.min_keys` or more.
    """
    wanted = pl.cdiv(tuning.programs, programs)
    useful = pl.cdiv(keys, tuning.min_keys)
    return pl.next_power_of_2(max(1, min(wanted, useful, 128)))


def _split(
    q_BTNH,
    kv_PSCH,
    rows,
    new,
    o_BKXRH,
    lse_BKXR,
    *new_pages,
    group: int,
    splits: int,
    tuning: Tuning,
):
    """Kernel body: the queries of one key-value head over one split of a row's keys.

    R rows are the G query heads of each query. A new key and value, the row's last, are taken from
    `new` and written to the row's page.
    """
    k, x, b = (pl.program_id(i) for i in range(3))
    padded_rows = o_BKXRH.shape[3]
    length = rows.lengths_B[b]
    num_read = length - 1 if new else length
    part = triton_blocks.split(b, rows.heads_K[k], x, length, splits=splits, tuning=tuning)

    @pl.when(part.first < part.last)
    def _():
        row_R = jnp.arange(padded_rows)
        real_R = row_R < q_BTNH.shape[1] * group
        row_R = jnp.where(real_R, row_R, 0)
        q_RH = q_BTNH[b, row_R // group, k * group + row_R % group, :]
        o_RH, lse_R = triton_blocks.over_blocks(
            q_RH,
            tuple(side[b, k, :] for side in new),
            kv_PSCH,
            new_pages[0] if new else None,
            rows.table_BM,
            part,
            None,
            # A query sees its own and earlier positions, of those that there are to read.
            ends_R=jnp.minimum(rows.firsts_B[b] + row_R // group + 1, num_read),
            tuning=tuning,
        )
        triton.store(o_BKXRH.at[b, k, x], o_RH, mask=jnp.broadcast_to(real_R[:, None], o_RH.shape))
        triton.store(lse_BKXR.at[b, k, x], lse_R, mask=real_R)


def _merge(o_BKXRH, lse_BKXR, lengths_B, o_BTNH, *, group: int, splits: int, tuning: Tuning):
    """Kernel body: the merge of one query head's splits, of those that its row's length reaches."""
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
    """Options of `pallas_call` for a Triton kernel."""
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return {"interpret": interpret, "compiler_params": params}
