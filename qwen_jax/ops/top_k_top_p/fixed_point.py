"""Weights of tokens as whole numbers, whose sums are the same in whatever order they are added."""

import jax
import jax.numpy as jnp

LIMB = 14  # bits of a weight that are summed in one number: 2^18 weights cannot overflow 32
REACH = 21.0  # below the best score by this, a weight in units of 2^-28 is 0


def weights(scores_BV: jax.Array, best_B: jax.Array, kth_B: jax.Array) -> jax.Array:
    """exp(score) of those from kth_B on in units of 2^-28 of the likeliest token's, [B, V]."""
    assert scores_BV.shape[1] <= 2 ** (32 - LIMB), scores_BV.shape
    best_B1 = jnp.where(jnp.isfinite(best_B), best_B, 0.0)[:, None]
    units = float(2 ** (2 * LIMB))
    weights_BV = jnp.round(jnp.exp(scores_BV - best_B1) * units)
    weights_BV = jnp.where(scores_BV >= kth_B[:, None], weights_BV, 0.0)
    # The likeliest token's weight, 2^28 itself, would need a bit more than two limbs.
    return jnp.minimum(weights_BV.astype(jnp.uint32), jnp.uint32(units - 1))
