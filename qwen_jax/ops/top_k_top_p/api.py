"""Top-k, top-p and min-p as one cutoff a row, found by counting instead of sorting.

A cutoff is the largest score t for which enough lies at or above it: k tokens, or the share p of
the weight. Both are monotone in t, so t is searched among the 2^32 bit patterns of a float, 16 ways
a pass. Counts and weights are whole numbers: their sums are the same in whatever order a device
adds them, so that a row's cutoff depends on that row alone.

Ties with a cutoff are all kept, where a sort would keep those that it happens to put first.

On a GPU a kernel searches for many rows (`cutoffs_gpu.py`), and finds the same to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from qwen_jax.ops.top_k_top_p import gpu as top_k_top_p_gpu

Implementation = Literal["passes", "kernel"]

_BITS = 4  # of the cutoff that a pass over the scores finds
_LIMB = top_k_top_p_gpu.LIMB


def find(
    scores_BV: jax.Array,
    *,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
    implementation: Implementation | None = None,
    tuning: top_k_top_p_gpu.Tuning | None = None,
) -> jax.Array:
    """The smallest score that top-k, then top-p of what that left, and min-p all keep, [B].

    Rows with top_k 0, top_p 1 and min_p 0 keep all: -inf. What no row asks for is not computed.
    implementation: None chooses; the results are the same. tuning: the kernel's.
    """
    kernel = (implementation or choose()) == "kernel"
    best_B = jnp.max(scores_BV, axis=-1)
    all_B = jnp.full_like(best_B, -jnp.inf)
    some_k_B, some_p_B = top_k_B > 0, top_p_B < 1.0

    def kth() -> jax.Array:
        if kernel:
            return _kth_by_kernel(scores_BV, best_B, top_k_B, tuning)
        return _kth(scores_BV, top_k_B)

    def nucleus() -> jax.Array:
        weights_BV = _weights(scores_BV, best_B, kth_B)
        if kernel:
            return _nucleus_by_kernel(scores_BV, weights_BV, best_B, kth_B, top_p_B, tuning)
        return _nucleus(scores_BV, weights_BV, top_p_B)

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


def choose() -> Implementation:
    """What finds cutoffs fastest here."""
    return "kernel" if jax.default_backend() == "gpu" else "passes"


def _kth(scores_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """The top_k_B-th largest score of each row."""
    B, V = scores_BV.shape
    keys_BV, least_B = _to_keys(scores_BV), jnp.minimum(top_k_B, V)

    def reaches(pivots: Sequence[jax.Array]) -> list[jax.Array]:
        counts = _sums([(keys_BV >= p_B[:, None]).astype(jnp.int32) for p_B in pivots])
        return [count_B >= least_B for count_B in counts]

    return _to_scores(_largest(reaches, B))


def _weights(scores_BV: jax.Array, best_B: jax.Array, kth_B: jax.Array) -> jax.Array:
    """exp(score) of those from kth_B on in units of 2^-28 of the likeliest token's, [B, V]."""
    assert scores_BV.shape[1] <= 2 ** (32 - _LIMB), scores_BV.shape
    best_B1 = jnp.where(jnp.isfinite(best_B), best_B, 0.0)[:, None]
    units = float(2 ** (2 * _LIMB))
    weights_BV = jnp.round(jnp.exp(scores_BV - best_B1) * units)
    weights_BV = jnp.where(scores_BV >= kth_B[:, None], weights_BV, 0.0)
    # The likeliest token's weight, 2^28 itself, would need a bit more than two limbs.
    return jnp.minimum(weights_BV.astype(jnp.uint32), jnp.uint32(units - 1))


def _nucleus(scores_BV: jax.Array, weights_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The largest score at or above which lies top_p_B of the weight."""
    keys_BV = _to_keys(scores_BV)

    def limbs(chosen_BV: jax.Array) -> list[jax.Array]:
        return [chosen_BV >> _LIMB, chosen_BV & (2**_LIMB - 1)]

    def whole(high_B: jax.Array, low_B: jax.Array) -> jax.Array:
        # Rounded, but never down where either limb goes up: the search stays monotone.
        return high_B.astype(jnp.float32) * 2**_LIMB + low_B.astype(jnp.float32)

    least_B = top_p_B * whole(*_sums(limbs(weights_BV)))

    def reaches(pivots: Sequence[jax.Array]) -> list[jax.Array]:
        parts: list[jax.Array] = []
        for p_B in pivots:
            parts += limbs(jnp.where(keys_BV >= p_B[:, None], weights_BV, 0))
        sums = _sums(parts)
        return [whole(*sums[i : i + 2]) >= least_B for i in range(0, len(sums), 2)]

    return _to_scores(_largest(reaches, scores_BV.shape[0]))


def _kth_by_kernel(
    scores_BV: jax.Array,
    best_B: jax.Array,
    top_k_B: jax.Array,
    tuning: top_k_top_p_gpu.Tuning | None,
) -> jax.Array:
    tops_B = _tops(best_B)
    keys_B = top_k_top_p_gpu.largest(
        scores_BV,
        least_B=jnp.minimum(top_k_B, scores_BV.shape[1]),
        # An interval of one key is no work.
        lows_B=jnp.where(top_k_B > 0, jnp.iinfo(jnp.int32).min, tops_B),
        tops_B=tops_B,
        tuning=tuning,
    )
    return top_k_top_p_gpu.to_scores(keys_B)


def _nucleus_by_kernel(
    scores_BV: jax.Array,
    weights_BV: jax.Array,
    best_B: jax.Array,
    kth_B: jax.Array,
    top_p_B: jax.Array,
    tuning: top_k_top_p_gpu.Tuning | None,
) -> jax.Array:
    tops_B = _tops(best_B)
    # Below these lies no weight.
    least_B = jnp.maximum(kth_B, best_B - top_k_top_p_gpu.REACH)
    lows_B = jnp.where(
        jnp.isfinite(best_B), top_k_top_p_gpu.to_keys(least_B), jnp.iinfo(jnp.int32).min
    )
    keys_B = top_k_top_p_gpu.largest(
        scores_BV,
        weights_BV,
        least_B=top_p_B,
        lows_B=jnp.where(top_p_B < 1.0, lows_B, tops_B),
        tops_B=tops_B,
        bounded_B=kth_B > -jnp.inf,
        tuning=tuning,
    )
    return top_k_top_p_gpu.to_scores(keys_B)


def _tops(best_B: jax.Array) -> jax.Array:
    """Keys that no score of a row lies above."""
    # The maximum of 0 and -0 may be either.
    keys_B = top_k_top_p_gpu.to_keys(jnp.where(best_B == 0, 0.0, best_B))
    return jnp.where(jnp.isfinite(best_B), keys_B, jnp.iinfo(jnp.int32).max)


def _largest(reaches: Callable[[Sequence[jax.Array]], list[jax.Array]], B: int) -> jax.Array:
    """The largest key for which `reaches` holds, [B]; it holds at 0 and, once it fails, beyond."""

    def narrow(i: jax.Array, found_B: jax.Array) -> jax.Array:
        shift = (32 - _BITS * (i + 1)).astype(jnp.uint32)
        digits = [jnp.uint32(n) for n in range(1, 2**_BITS)]
        held = reaches([found_B | (digit << shift) for digit in digits])
        return found_B | (sum(h_B.astype(jnp.uint32) for h_B in held) << shift)

    return jax.lax.fori_loop(0, 32 // _BITS, narrow, jnp.zeros(B, jnp.uint32))


def _sums(parts_BV: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of each row of each part, all in one pass over what they are made of."""
    zeros = [jnp.zeros((), x.dtype) for x in parts_BV]

    def add(left: tuple, right: tuple) -> tuple:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(jax.lax.reduce(tuple(parts_BV), tuple(zeros), add, (1,)))


def _to_keys(scores: jax.Array) -> jax.Array:
    """Whole numbers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _to_scores(keys: jax.Array) -> jax.Array:
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(2**31 - 1), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
