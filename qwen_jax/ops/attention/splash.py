"""Splash attention: JAX's block-sparse Pallas kernel for TPU, with segments of packed rows.

The kernel (arXiv 2205.14135's blocked softmax) skips blocks that the causal mask hides, and keeps
its output and log-sum-exp for the backward pass under the checkpoint name `attention_out`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from partitioning import ring

LANES = 128  # a TPU's vector width: blocks and head sizes are multiples of it
RESIDUAL_NAME = "attention_out"


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask, interpret: bool = False
) -> jax.Array:
    """Attention as in `qwen_jax.ops.attention.api.attention`, without an array of [T, S] scores.

    Lengths are padded to a multiple of 128, and head sizes too (0.5B has 64). `interpret` runs the
    kernel on a CPU, step by step, for tests.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    q_ids_BT, kv_ids_BS = _ids(mask, B=B, T=T, S=S)
    kernel = _kernel(T, S, N, causal=mask.causal, results="o", interpret=interpret)
    segments = _segments(q_ids_BT, kv_ids_BS, B=B, T=T, S=S, causal=mask.causal)
    q_BNTH, k_BKSH, v_BKSH = map(_widen, (q_BTNH / math.sqrt(H), k_BSKH, v_BSKH))
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return _narrow(o_BNTH, like=q_BTNH)


def block_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: ring.BlockMask,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of one block of keys, as in `partitioning.ring.Blocks`."""
    (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
    kernel = _kernel(T, S, N, causal=mask.causal, results="o, lse", interpret=interpret)
    segments = _segments(mask.q_ids_BT, mask.kv_ids_BS, B=B, T=T, S=S, causal=mask.causal)
    o_BNTH, (lse_BNT,) = jax.vmap(kernel)(*map(_widen, (q_BTNH, k_BSKH, v_BSKH)), segments)
    return _narrow(o_BNTH, like=q_BTNH), lse_BNT[:, :, :T]


def block_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: ring.BlockMask,
    rows: ring.Rows,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of one block's q, k and v, as in `partitioning.ring.Blocks`.

    They come from the two kernels of the library's own backward pass. These are private functions:
    the public kernel's gradient takes no log-sum-exp that other blocks of keys contributed to.
    """
    (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
    kernel = _kernel(T, S, N, causal=mask.causal, results="o, lse", interpret=interpret)
    tiles = kernel.kwargs["block_sizes"]
    shared = {
        "is_mqa": False,
        "q_layout": tiles.q_layout,
        "k_layout": tiles.k_layout,
        "v_layout": tiles.v_layout,
        **{
            name: kernel.kwargs[name]
            for name in ("mask_value", "attn_logits_soft_cap", "mask_function", "interpret")
        },
    }

    def one_row(q, k, v, segments, lse, do, di):
        operands = q, k, v, segments, None, lse, do, di
        dq = kernels._splash_attention_bwd_dq(
            *operands,
            bq=tiles.block_q_dq,
            bkv=tiles.block_kv_dq,
            mask_info=kernel.dq_mask_info,
            **shared,
        )
        _, dk, dv = kernels._splash_attention_bwd_dkv(
            *operands,
            bq=tiles.block_q_dkv,
            bkv=tiles.block_kv_dkv,
            bkv_compute=tiles.block_kv_dkv_compute,
            mask_info=kernel.dkv_mask_info,
            use_fused_bwd_kernel=False,
            **shared,
        )
        return dq, dk, dv

    segments = _segments(mask.q_ids_BT, mask.kv_ids_BS, B=B, T=T, S=S, causal=mask.causal)
    lse_BNT, di_BNT = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -T % LANES))) for x in (rows.lse_BNT, rows.di_BNT)
    )
    operands = *map(_widen, (q_BTNH, k_BSKH, v_BSKH)), segments, lse_BNT, _widen(rows.do_BTNH)
    gradients = jax.vmap(one_row)(*operands, di_BNT)
    return tuple(
        _narrow(x, like=like) for x, like in zip(gradients, (q_BTNH, k_BSKH, v_BSKH), strict=True)
    )


def block_sizes(T: int, S: int) -> kernels.BlockSizes:
    """Tile sizes of queries and keys: the largest up to 1,024 that divide the lengths.

    Larger tiles read keys and values less often; tiles of 1,024 x 1,024 fit beside their buffers
    into the 16 MiB of vector memory that XLA grants a kernel by default on every generation.
    """
    q, kv = _tile(T, 1024), _tile(S, 1024)
    compute = min(kv, 512)
    return kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        block_q_dq=q,
        block_kv_dq=kv,
    )


def _tile(length: int, limit: int) -> int:
    """The largest LANES 2^i that divides `length`, a multiple of LANES, up to `limit`."""
    return min(limit, LANES * ((length // LANES) & -(length // LANES)))


def _kernel(
    T: int, S: int, N: int, *, causal: bool, results: Literal["o", "o, lse"], interpret: bool
):
    """The kernel for N heads; only the kernel whose result is `o` alone has a gradient."""
    shape = (T + -T % LANES, S + -S % LANES)
    one = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([one] * N),
        block_sizes=block_sizes(*shape),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=results == "o, lse",
        residual_checkpoint_name=RESIDUAL_NAME if results == "o" else None,
        interpret=interpret,
    )


def _widen(x_BTNH: jax.Array) -> jax.Array:
    """[B, N, T', H'], with T and H padded to multiples of LANES; zeros change no score."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    padding = ((0, 0), (0, -T % LANES), (0, 0), (0, -H % LANES))
    return jnp.swapaxes(jnp.pad(x_BTNH, padding), 1, 2)


def _narrow(x_BNTH: jax.Array, *, like: jax.Array) -> jax.Array:
    """[B, T, N, H] of [B, N, T', H'], in the shape and dtype of `like`."""
    T, H = like.shape[1], like.shape[3]
    return jnp.swapaxes(x_BNTH, 1, 2)[:, :T, :, :H].astype(like.dtype)


def _ids(mask, *, B: int, T: int, S: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Ids of queries and of keys, which see each other if they are equal; None: all do."""
    ids_BT = mask.segment_ids_BT
    if mask.lengths_B is None:
        return ids_BT, ids_BT
    if ids_BT is None:
        ids_BT = jnp.ones((B, max(T, S)), jnp.int32)
    seen_BS = jnp.arange(S)[None, :] < mask.lengths_B[:, None]
    return ids_BT[:, :T], jnp.where(seen_BS, ids_BT[:, :S], -1)


def _segments(
    q_ids_BT: jax.Array | None, kv_ids_BS: jax.Array | None, *, B: int, T: int, S: int, causal: bool
) -> kernels.SegmentIds | None:
    """Segment ids [B, T'] and [B, S'] for the kernel; None if the causal mask is enough.

    Padding of keys has an id of its own, so that no query of the sequence sees it.
    """
    if q_ids_BT is None:
        if causal or S % LANES == 0:
            return None
        q_ids_BT, kv_ids_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    return kernels.SegmentIds(
        q=jnp.pad(q_ids_BT, ((0, 0), (0, -T % LANES)), constant_values=-2),
        kv=jnp.pad(kv_ids_BS, ((0, 0), (0, -S % LANES)), constant_values=-1),
    )
