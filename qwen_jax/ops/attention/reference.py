"""Attention in plain jax.numpy: the definition that other implementations are tested against."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from partitioning import ring

# Finite, so that a query without visible keys (padding) gives a mean rather than NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask) -> jax.Array:
    """Attention as in `qwen_jax.ops.attention.api.attention`, with all scores [B, N, T, S] held."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    o_BTNH = weighted_values(q_BTNH, k_BSKH, v_BSKH, visible_BTS=visible(mask, T=T, S=S))
    return checkpoint_name(o_BTNH, "attention_out")


def visible(mask, *, T: int, S: int) -> jax.Array:
    """Booleans [B or 1, T, S]: query t sees key s."""
    seen = jnp.ones((1, T, S), bool)
    if mask.causal:
        seen &= (jnp.arange(S)[None, :] <= jnp.arange(T)[:, None])[None]
    if mask.segment_ids_BT is not None:
        ids = mask.segment_ids_BT
        seen &= ids[:, :, None] == ids[:, None, :]
    if mask.lengths_B is not None:
        seen &= jnp.arange(S)[None, None, :] < mask.lengths_B[:, None, None]
    return seen


def weighted_values(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, visible_BTS: jax.Array
) -> jax.Array:
    """Outputs [B, T, N, H]: softmax over the visible keys, times the values.

    Query heads n = k G + g share key-value head k.
    """
    scores_BKGTS = _scores(q_BTNH, k_BSKH) / math.sqrt(q_BTNH.shape[3])
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return o_BTKGH.reshape(q_BTNH.shape)


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Scores q k^T, [B, K, G, T, S]. float32 island: scores are summed and exponentiated."""
    q_BTKGH = _grouped(q_BTNH, K=k_BSKH.shape[2])
    return jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)


def _grouped(x_BTNH: jax.Array, *, K: int) -> jax.Array:
    """[B, T, N, H] as [B, T, K, G, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H)


def block_forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask: ring.BlockMask
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of one block of keys, as in `partitioning.ring.Blocks`."""
    B, T, N, _ = q_BTNH.shape
    scores_BKGTS = _block_scores(q_BTNH, k_BSKH, mask)
    lse_BKGT = jax.nn.logsumexp(scores_BKGTS, axis=-1)
    weights_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None]).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return o_BTKGH.reshape(q_BTNH.shape), lse_BKGT.reshape(B, N, T)


def block_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: ring.BlockMask,
    rows: ring.Rows,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of one block's q, k and v, as in `partitioning.ring.Blocks`.

    arXiv 2205.14135, appendix B.4:

    P = exp(scores - lse), dV = P^T dO, dS = P * (dO V^T - di), dQ = dS K, dK = dS^T Q.
    """
    B, T, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    lse_BKGT, di_BKGT = (x.reshape(B, K, N // K, T) for x in (rows.lse_BNT, rows.di_BNT))
    p_BKGTS = jnp.exp(_block_scores(q_BTNH, k_BSKH, mask) - lse_BKGT[..., None])
    q_BTKGH, do_BTKGH = _grouped(q_BTNH, K=K), _grouped(rows.do_BTNH, K=K)
    dp_BKGTS = jnp.einsum("btkgh,bskh->bkgts", do_BTKGH, v_BSKH, preferred_element_type=jnp.float32)
    ds_BKGTS = (p_BKGTS * (dp_BKGTS - di_BKGT[..., None])).astype(k_BSKH.dtype)
    dq_BTKGH = jnp.einsum("bkgts,bskh->btkgh", ds_BKGTS, k_BSKH)
    dk_BSKH = jnp.einsum("bkgts,btkgh->bskh", ds_BKGTS, q_BTKGH)
    dv_BSKH = jnp.einsum("bkgts,btkgh->bskh", p_BKGTS.astype(v_BSKH.dtype), do_BTKGH)
    return dq_BTKGH.reshape(q_BTNH.shape), dk_BSKH, dv_BSKH


def _block_scores(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: ring.BlockMask) -> jax.Array:
    """Scores q k^T, [B, K, G, T, S]; MASKED where the block's mask hides a key."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    seen_BTS = jnp.ones((1, T, S), bool)
    if mask.causal:
        seen_BTS &= (jnp.arange(S)[None, :] <= jnp.arange(T)[:, None])[None]
    if mask.q_ids_BT is not None:
        seen_BTS &= mask.q_ids_BT[:, :, None] == mask.kv_ids_BS[:, None, :]
    return jnp.where(seen_BTS[:, None, None], _scores(q_BTNH, k_BSKH), MASKED)
