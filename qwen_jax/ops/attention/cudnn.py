"""cuDNN's fused flash attention (GPU only), over whole rows and over blocks of a ring."""

import math

import jax
import jax.numpy as jnp

# Private: `jax.nn.dot_product_attention` rounds the log-sum-exp to the queries' dtype, and has no
# backward pass for a log-sum-exp that other blocks of keys contributed to.
from jax._src.cudnn import fused_attention_stablehlo as fused

from partitioning import ring


def unsupported(q_BTNH: jax.Array) -> str | None:
    """The reason why cuDNN cannot take these queries on any GPU; None: it can."""
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q_BTNH.dtype} is not bfloat16 or float16"
    if q_BTNH.shape[-1] > 128 or q_BTNH.shape[-1] % 8:
        return f"head_dim {q_BTNH.shape[-1]} is not a multiple of 8 up to 128"
    return None


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask) -> jax.Array:
    """Attention as in `qwen_jax.ops.attention.api.attention`, [B, T, N, H].

    Only packed rows hold an array of [T, S]: their mask.
    Raises `ValueError` for a dtype or head size that the fused kernel does not take.
    """
    reason = unsupported(q_BTNH)
    if reason is not None:
        raise ValueError(f"attention implementation 'cudnn' cannot run: {reason}")
    lengths_B = mask.lengths_B
    ids_BT = mask.segment_ids_BT
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=None if ids_BT is None else _same_segment(ids_BT, ids_BT),
        is_causal=mask.causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )


def block_forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask: ring.BlockMask
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of one block of keys, as in `partitioning.ring.Blocks`."""
    if mask.q_ids_BT is None or mask.causal:
        return _forward(q_BTNH, k_BSKH, v_BSKH, mask)
    # The kernel takes lengths: it attends from the first queries to the first keys. Keys are given
    # in reverse order, which does not change a softmax.
    seen_BT, seen_BS = _shared_document(mask)
    lengths = [jnp.maximum(1, seen.sum(axis=1, dtype=jnp.int32)) for seen in (seen_BT, seen_BS)]
    o_BTNH, lse_BNT = _forward(q_BTNH, k_BSKH[:, ::-1], v_BSKH[:, ::-1], mask, *lengths)
    o_BTNH = jnp.where(seen_BT[:, :, None, None], o_BTNH, 0)
    return o_BTNH, jnp.where(seen_BT[:, None], lse_BNT, -jnp.inf)


def block_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: ring.BlockMask,
    rows: ring.Rows,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of one block's q, k and v, as in `partitioning.ring.Blocks`."""
    if mask.q_ids_BT is None or mask.causal:
        return _backward(q_BTNH, k_BSKH, v_BSKH, rows, mask)
    seen_BT, seen_BS = _shared_document(mask)
    lengths = [jnp.maximum(1, seen.sum(axis=1, dtype=jnp.int32)) for seen in (seen_BT, seen_BS)]
    dq_BTNH, dk_BSKH, dv_BSKH = _backward(
        q_BTNH, k_BSKH[:, ::-1], v_BSKH[:, ::-1], rows, mask, *lengths
    )
    dq_BTNH = jnp.where(seen_BT[:, :, None, None], dq_BTNH, 0)
    seen_BS = seen_BS[:, :, None, None]
    dk_BSKH, dv_BSKH = (jnp.where(seen_BS, x[:, ::-1], 0) for x in (dk_BSKH, dv_BSKH))
    return dq_BTNH, dk_BSKH, dv_BSKH


def partial_forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, lengths_B: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, H] and float32 log-sum-exp [B, N, T] over some of the keys.

    `ring.merge` merges them with those over other keys. lengths_B: every query of a row sees the
    row's first lengths_B keys; the log-sum-exp is -inf where there are none. None: query t sees
    keys s <= t.
    """
    scale = 1 / math.sqrt(q_BTNH.shape[3])
    if lengths_B is None:
        return _forward(q_BTNH, k_BSKH, v_BSKH, ring.BlockMask(True), scale=scale)
    # A row without keys still gives the kernel one, whose results are dropped.
    lengths = (jnp.full_like(lengths_B, q_BTNH.shape[1]), jnp.maximum(1, lengths_B))
    mask = ring.BlockMask(False)
    o_BTNH, lse_BNT = _forward(q_BTNH, k_BSKH, v_BSKH, mask, *lengths, scale=scale)
    return o_BTNH, jnp.where((lengths_B > 0)[:, None, None], lse_BNT, -jnp.inf)


def _shared_document(mask: ring.BlockMask) -> tuple[jax.Array, jax.Array]:
    """Booleans [B, T] and [B, S]: queries and keys that see each other in a non-causal block.

    All keys come before all queries, and equal ids are neighbours. So at most one document has both
    queries and keys here: the keys end with it, and the queries begin with it.
    """
    shared_B = mask.kv_ids_BS[:, -1:]
    seen_BT = mask.q_ids_BT == shared_B
    # A row without queries still gives the kernel one, whose results are dropped.
    return seen_BT, (mask.kv_ids_BS == shared_B) & seen_BT[:, :1]


def _forward(q_BTNH, k_BSKH, v_BSKH, mask: ring.BlockMask, *lengths_B, scale: float = 1.0):
    """The output and the float32 log-sum-exp, by cuDNN's forward primitive."""
    operands, static = _call(q_BTNH, mask, lengths_B, scale=scale)
    o_BTNH, lse_BNT = fused._dot_product_attention_fwd_p_wrapper.bind(
        q_BTNH, k_BSKH, v_BSKH, *operands, **static, is_training=True
    )
    return o_BTNH, lse_BNT


def _backward(q_BTNH, k_BSKH, v_BSKH, rows: ring.Rows, mask: ring.BlockMask, *lengths_B):
    """The gradients of q, k and v, by cuDNN's backward primitive."""
    operands, static = _call(q_BTNH, mask, lengths_B)
    dq_BTNH, dk_BSKH, dv_BSKH = fused._dot_product_attention_bwd_p_wrapper.bind(
        q_BTNH, k_BSKH, v_BSKH, *operands, rows.lse_BNT, rows.o_BTNH, rows.do_BTNH, **static
    )
    return dq_BTNH, dk_BSKH, dv_BSKH


def _call(q_BTNH: jax.Array, mask: ring.BlockMask, lengths_B: tuple, *, scale: float = 1.0):
    """The operands after q, k and v, and the static parameters, of cuDNN's two primitives.

    scale: the factor of the scores; 1 if the queries are scaled already.
    """
    unused = jnp.zeros(0, q_BTNH.dtype)
    bias = unused
    if mask.causal and mask.q_ids_BT is not None:
        seen = _same_segment(mask.q_ids_BT, mask.kv_ids_BS)
        low = fused.get_large_negative_number(q_BTNH.dtype)
        bias = jnp.where(seen, jnp.zeros((), q_BTNH.dtype), low)
    kind = fused.MaskType.NO_MASK
    if mask.causal:
        kind = fused.MaskType.CAUSAL
    elif lengths_B:
        kind = fused.MaskType.PADDING
    # bias, lengths of queries and keys, their offsets, page tables of keys and values
    operands = (bias, *(lengths_B or (unused, unused)), unused, unused, unused, unused)
    static = {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (bias is not unused, False),  # a bias; no gradient of it
        "mask_type": kind,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return operands, static


def _same_segment(q_ids_BT: jax.Array, kv_ids_BS: jax.Array) -> jax.Array:
    """Booleans [B, 1, T, S]: query and key are of one segment. The kernel takes no segment ids."""
    return (q_ids_BT[:, :, None] == kv_ids_BS[:, None, :])[:, None]
