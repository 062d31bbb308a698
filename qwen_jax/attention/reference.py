"""Attention in plain jax.numpy: the definition that every other implementation is held to."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Finite, so that a row with nothing to see (padding) gives a mean rather than NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask) -> jax.Array:
    """See `qwen_jax.attention.api.attention`. Holds the whole [B, N, T, S] score array."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    o_BTNH = weighted_values(q_BTNH, k_BSKH, v_BSKH, visible_BTS=visible(mask, T=T, S=S))
    return checkpoint_name(o_BTNH, "attention_out")


def visible(mask, *, T: int, S: int) -> jax.Array:
    """The mask as booleans [B or 1, T, S]."""
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
    """softmax over the visible keys, times the values; query heads n = k G + g share head k."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    # float32 island: scores are summed and exponentiated.
    scores_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return o_BTKGH.reshape(B, T, N, H)
