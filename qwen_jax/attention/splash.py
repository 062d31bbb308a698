"""Splash attention: JAX's block-sparse Pallas kernel for TPU, with segments of packed rows.

The kernel (arXiv 2205.14135's blocked softmax) skips blocks that the causal mask hides, and keeps
its output and log-sum-exp for the backward pass under the checkpoint name `attention_out`.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128  # a TPU's vector width: blocks and head sizes are multiples of it
RESIDUAL_NAME = "attention_out"


def why_not(platform: str) -> str | None:
    """Why the kernel cannot run on this platform, or None if it can."""
    return None if platform == "tpu" else f"platform {platform!r} is not 'tpu'"


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask, interpret: bool = False
) -> jax.Array:
    """See `qwen_jax.attention.api.attention`. Never holds [T, S] scores.

    Lengths are padded to a multiple of 128, and head sizes too (0.5B has 64). `interpret` runs the
    kernel on a CPU, step by step, for tests.
    """
    T, N, H = q_BTNH.shape[1:]
    S = k_BSKH.shape[1]
    q_BNTH, k_BKSH, v_BKSH = (_widen(x) for x in (q_BTNH / math.sqrt(H), k_BSKH, v_BSKH))
    kernel = _kernel(q_BNTH.shape[2], k_BKSH.shape[2], N, causal=mask.causal, interpret=interpret)
    segments = _segments(mask, B=q_BNTH.shape[0], T=T, S=S)
    if segments is None:
        o_BNTH = jax.vmap(lambda q, k, v: kernel(q, k, v))(q_BNTH, k_BKSH, v_BKSH)
    else:
        o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return jnp.swapaxes(o_BNTH, 1, 2)[:, :T, :, :H].astype(q_BTNH.dtype)


def block_sizes(T: int, S: int) -> kernels.BlockSizes:
    """Tiles of queries and keys: the largest up to 1,024 that divide the lengths.

    Larger tiles read keys and values less often; 1,024 x 1,024 is what fits beside its buffers into
    the 16 MiB of vector memory that XLA grants a kernel by default on every generation.
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


def _kernel(T: int, S: int, N: int, *, causal: bool, interpret: bool):
    shape = (T, S)
    one = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([one] * N),
        block_sizes=block_sizes(T, S),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUAL_NAME,
        interpret=interpret,
    )


def _widen(x_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, N, T', H'], both multiples of LANES; zeros change no score."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    padding = ((0, 0), (0, -T % LANES), (0, 0), (0, -H % LANES))
    return jnp.swapaxes(jnp.pad(x_BTNH, padding), 1, 2)


def _segments(mask, *, B: int, T: int, S: int) -> kernels.SegmentIds | None:
    """Segment ids of queries and keys [B, T'] and [B, S'], where the causal mask is not enough.

    Padding gets an id of its own on the keys' side, so that no real query sees it.
    """
    pad = ((0, 0), (0, -T % LANES)), ((0, 0), (0, -S % LANES))
    ids_BT = mask.segment_ids_BT
    if ids_BT is None and mask.lengths_B is None and (mask.causal or S % LANES == 0):
        return None
    if ids_BT is None:
        ids_BT = jnp.ones((B, max(T, S)), jnp.int32)
    q_BT, kv_BS = ids_BT[:, :T], ids_BT[:, :S]
    if mask.lengths_B is not None:
        seen_BS = jnp.arange(S)[None, :] < mask.lengths_B[:, None]
        kv_BS = jnp.where(seen_BS, kv_BS, -1)
    return kernels.SegmentIds(
        q=jnp.pad(q_BT, pad[0], constant_values=-2),
        kv=jnp.pad(kv_BS, pad[1], constant_values=-1),
    )
