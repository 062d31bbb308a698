"""cuDNN's fused flash attention, through `jax.nn.dot_product_attention` (GPU only)."""

import jax
import jax.numpy as jnp


def why_not(q_BTNH: jax.Array) -> str | None:
    """Why cuDNN cannot run this call, or None if it can (given a GPU)."""
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q_BTNH.dtype} is not bfloat16 or float16"
    if q_BTNH.shape[-1] > 128 or q_BTNH.shape[-1] % 8:
        return f"head_dim {q_BTNH.shape[-1]} is not a multiple of 8 up to 128"
    return None


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask) -> jax.Array:
    """See `qwen_jax.attention.api.attention`. Never holds [T, S] scores, but for packed rows.

    Raises `ValueError` for a dtype or head size that the fused kernel does not take.
    """
    reason = why_not(q_BTNH)
    if reason is not None:
        raise ValueError(f"attention implementation 'cudnn' cannot run: {reason}")
    lengths_B = mask.lengths_B
    packed = mask.segment_ids_BT is not None
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=_same_segment(mask.segment_ids_BT) if packed else None,
        is_causal=mask.causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )


def _same_segment(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, 1, T, S] booleans: packing as a mask, until the kernel takes segment ids."""
    return (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
