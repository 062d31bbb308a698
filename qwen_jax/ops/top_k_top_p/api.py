"""Top-k, top-p and min-p as one score threshold a row, found by counting instead of sorting.

The threshold is the largest score t such that the scores >= t are k tokens, or have the share p of
the weight. Both are monotone in t, so t is searched among the bit patterns of a float. Counts and
weights are whole numbers: their sums are the same in whatever order a device adds them, so that a
row's threshold depends on that row alone, and all implementations agree to the bit.

All tokens with a score equal to the threshold are kept; a sort would keep those that it happens to
put first.
"""

import jax
import jax.numpy as jnp

from partitioning import sharding
from qwen_jax.ops import registry
from qwen_jax.ops.top_k_top_p import fixed_point, reference
from qwen_jax.ops.top_k_top_p import gpu as top_k_top_p_gpu

# Each module has `kth` and `nucleus`. By name, the kernel runs in Pallas's interpreter elsewhere.
TOP_K_TOP_P = registry.Operation(
    "top_k_top_p",
    (
        registry.Implementation(
            name="kernel", platforms=("gpu",), elsewhere="by name", compute=top_k_top_p_gpu
        ),
        registry.Implementation(name="passes", compute=reference),
    ),
)


def threshold(
    scores_BV: jax.Array,
    *,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    implementation: str | None = None,
    tuning: top_k_top_p_gpu.Tuning | None = None,
) -> jax.Array:
    """The smallest score of each row that top-k, then top-p, and min-p all keep, [B].

    top-p counts the tokens that top-k keeps. Rows with top_k 0, top_p 1 and min_p 0 keep all
    tokens: -inf. A search that no row asks for is not computed. implementation: None chooses; the
    results are the same. tuning: that of the kernel.
    """
    platform = sharding.platform(None)
    search = TOP_K_TOP_P.choose(platform=platform, name=implementation).compute
    best_B = jnp.max(scores_BV, axis=-1)
    all_B = jnp.full_like(best_B, -jnp.inf)
    some_k_B, some_p_B = top_k_B > 0, top_p_B < 1.0

    def kth() -> jax.Array:
        return search.kth(scores_BV, best_B=best_B, top_k_B=top_k_B, tuning=tuning)

    def nucleus() -> jax.Array:
        weights_BV = fixed_point.weights(scores_BV, best_B, kth_B)
        given = {"best_B": best_B, "kth_B": kth_B, "top_p_B": top_p_B, "tuning": tuning}
        return search.nucleus(scores_BV, weights_BV, **given)

    kth_B = jax.lax.cond(
        jnp.any(some_k_B),
        lambda: jnp.where(some_k_B, kth(), -jnp.inf),
        lambda: all_B,
    )
    nucleus_B = jax.lax.cond(
        jnp.any(some_p_B),
        lambda: jnp.where(some_p_B, nucleus(), -jnp.inf),
        lambda: all_B,
    )
    # log(0) = -inf keeps all.
    return jnp.maximum(jnp.maximum(kth_B, nucleus_B), best_B + jnp.log(min_p_B))
