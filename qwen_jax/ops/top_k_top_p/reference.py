"""The thresholds of top-k and top-p in plain jax.numpy: eight passes over the scores.

A threshold is searched among the 2^32 bit patterns of a float, 16 ways a pass.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from qwen_jax.ops.top_k_top_p.fixed_point import LIMB

_BITS = 4  # bits of the threshold that a pass over the scores finds


def kth(scores_BV: jax.Array, *, best_B: jax.Array, top_k_B: jax.Array, tuning: None) -> jax.Array:
    """The top_k_B-th largest score of each row, [B]; best_B is each row's largest."""
    del best_B, tuning
    B, V = scores_BV.shape
    keys_BV, least_B = _to_keys(scores_BV), jnp.minimum(top_k_B, V)

    def reaches(pivots: Sequence[jax.Array]) -> list[jax.Array]:
        counts = _sums([(keys_BV >= p_B[:, None]).astype(jnp.int32) for p_B in pivots])
        return [count_B >= least_B for count_B in counts]

    return _to_scores(_largest(reaches, B))


def nucleus(
    scores_BV: jax.Array,
    weights_BV: jax.Array,
    *,
    best_B: jax.Array,
    kth_B: jax.Array,
    top_p_B: jax.Array,
    tuning: None,
) -> jax.Array:
    """The largest score of each row at or above which lies the share top_p_B of the weight, [B].

    best_B is each row's largest score, and weights below the score kth_B are 0.
    """
    del best_B, kth_B, tuning
    keys_BV = _to_keys(scores_BV)

    def limbs(chosen_BV: jax.Array) -> list[jax.Array]:
        return [chosen_BV >> LIMB, chosen_BV & (2**LIMB - 1)]

    def whole(high_B: jax.Array, low_B: jax.Array) -> jax.Array:
        # Rounded, but never down where either limb goes up: the search stays monotone.
        return high_B.astype(jnp.float32) * 2**LIMB + low_B.astype(jnp.float32)

    least_B = top_p_B * whole(*_sums(limbs(weights_BV)))

    def reaches(pivots: Sequence[jax.Array]) -> list[jax.Array]:
        parts: list[jax.Array] = []
        for p_B in pivots:
            parts += limbs(jnp.where(keys_BV >= p_B[:, None], weights_BV, 0))
        sums = _sums(parts)
        return [whole(*sums[i : i + 2]) >= least_B for i in range(0, len(sums), 2)]

    return _to_scores(_largest(reaches, scores_BV.shape[0]))


def _largest(reaches: Callable[[Sequence[jax.Array]], list[jax.Array]], B: int) -> jax.Array:
    """The largest key of each row for which `reaches` holds, [B].

    It holds for key 0, and fails for every key above one for which it fails.
    """

    def narrow(i: jax.Array, found_B: jax.Array) -> jax.Array:
        shift = (32 - _BITS * (i + 1)).astype(jnp.uint32)
        digits = [jnp.uint32(n) for n in range(1, 2**_BITS)]
        held = reaches([found_B | (digit << shift) for digit in digits])
        return found_B | (sum(h_B.astype(jnp.uint32) for h_B in held) << shift)

    return jax.lax.fori_loop(0, 32 // _BITS, narrow, jnp.zeros(B, jnp.uint32))


def _sums(parts_BV: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of each row of each part, [B] each, all in one pass over the scores."""
    zeros = [jnp.zeros((), x.dtype) for x in parts_BV]

    def add(left: tuple, right: tuple) -> tuple:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(jax.lax.reduce(tuple(parts_BV), tuple(zeros), add, (1,)))


def _to_keys(scores: jax.Array) -> jax.Array:
    """uint32 keys, whose order is that of the scores."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _to_scores(keys: jax.Array) -> jax.Array:
    """The scores of uint32 keys: the inverse of `_to_keys`."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(2**31 - 1), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
