"""Attention of one new token a row over the key-value cache."""

import math

import jax
import jax.numpy as jnp

from qwen_jax.attention import reference


def attention(
    q_BNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *, lengths_B: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `lengths_B` positions -> [B, N, H], in q's dtype.

    The same arithmetic as `reference.attention`, for a cache with heads before positions.
    """
    B, N, H = q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    # float32 island: scores are summed and exponentiated.
    scores_BKGS = jnp.einsum(
        "bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    seen_BS = jnp.arange(S)[None, :] < lengths_B[:, None]
    scores_BKGS = jnp.where(seen_BS[:, None, None], scores_BKGS, reference.MASKED)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights_BKGS, v_BKSH).reshape(B, N, H)
