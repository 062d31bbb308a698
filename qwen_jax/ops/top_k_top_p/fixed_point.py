"""Tokens' weights as whole numbers, whose sums are the same in whatever order they are added."""

import jax
import jax.numpy as jnp

LIMB = 14  # bits of a weight that are summed in one number: 2^18 of them cannot overflow 32 bits
REACH = 21.0  # a score this far below the best one has a weight of 0 in units of 2^-28


def weights(scores_BV: jax.Array, best_B: jax.Array, kth_B: jax.Array) -> jax.Array:
    """Weights exp(score) in units of 2^-28 of the likeliest token's weight, uint32 [B, V].

    Scores below kth_B have a weight of 0.
    """
    assert scores_BV.shape[1] <= 2 ** (32 - LIMB), scores_BV.shape
    best_B1 = jnp.where(jnp.isfinite(best_B), best_B, 0.0)[:, None]
    units = float(2 ** (2 * LIMB))
    weights_BV = jnp.round(jnp.exp(scores_BV - best_B1) * units)
    weights_BV = jnp.where(scores_BV >= kth_B[:, None], weights_BV, 0.0)
    # The likeliest token's weight of 2^28 would need one bit more than two limbs have.
    return jnp.minimum(weights_BV.astype(jnp.uint32), jnp.uint32(units - 1))
