"""The search for a cutoff of `cutoffs.py` on a GPU: a Pallas kernel, lowered by Triton.

One program has one row and loops until its interval of keys holds a single one. It takes turns:

  - sift: the keys inside the interval are copied to a short list, every lane to a column of its
    own, so that no thread waits for another. Once they fit, all that follows reads the list alone.
  - weigh: the sums at or above a few pivots inside the interval say between which two the cutoff
    lies. What lies above the interval was added once and is carried along.

So a row is read from memory two or three times. Any pivots lead to the same cutoff, as there is but
one; the first are laid evenly among scores, where tokens are, and only later ones among keys, which
crowd around 0. The interval also shrinks to the keys that sifting found in it, so that ties end the
search at once.

Keys are int32 in the order of the floats. Letters: W lanes, D entries of a lane's list, P pivots.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LIMB = 14  # bits of a weight that are summed in one number: 2^18 weights cannot overflow 32
REACH = 21.0  # below the best score by this, a weight in units of 2^-28 is 0

_FEW_TURNS = 3  # with pivots among scores
_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Powers of two; `benchmarks/cutoffs.py` compares them.

    width: lanes, which read one piece of a row; pieces: that are on their way at a time.
    """

    width: int = 512
    pieces: int = 8
    pivots: int = 8
    depth: int = 32
    warps: int = 8


def largest(
    scores_BV: jax.Array,
    weights_BV: jax.Array | None = None,
    *,
    least_B: jax.Array,
    lows_B: jax.Array,
    tops_B: jax.Array,
    bounded_B: jax.Array | None = None,
    tuning: Tuning | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """The largest key of lows_B..tops_B at or above which lies enough, [B] int32.

    Enough are least_B (float32) scores; or, given weights (uint32 of two limbs, 0 for scores that
    count for nothing), the share least_B of the weight from lows_B on. Where that is 0, it is the
    largest key of all. bounded_B: whether so few lie in a row's interval that sifting comes first.
    interpret: None where there is no GPU.
    """
    B, tuning = scores_BV.shape[0], tuning or Tuning()
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    compiler = triton.CompilerParams(num_warps=tuning.warps, num_stages=1)
    weighted = weights_BV is not None
    listed = jax.ShapeDtypeStruct((B, tuning.depth, tuning.width), jnp.int32)
    found_B, *_ = pl.pallas_call(
        functools.partial(_kernel, weighted=weighted, barrier=not interpret, tuning=tuning),
        grid=(B,),
        out_shape=[jax.ShapeDtypeStruct((B,), jnp.int32)] + [listed] * (1 + weighted),
        interpret=interpret,
        name="largest_weighted" if weighted else "largest_counted",
        **({} if interpret else {"compiler_params": compiler}),
    )(
        least_B.astype(jnp.float32),
        lows_B,
        tops_B,
        jnp.zeros(B, jnp.int32) if bounded_B is None else bounded_B.astype(jnp.int32),
        scores_BV,
        # A bitcast costs nothing; the kernel knows one kind of whole number.
        *([jax.lax.bitcast_convert_type(weights_BV, jnp.int32)] if weighted else []),
    )
    return found_B


def to_keys(scores: jax.Array) -> jax.Array:
    """int32 in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return bits ^ ((bits >> 31) & _MOST)


def to_scores(keys: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(keys ^ ((keys >> 31) & _MOST), jnp.float32)


@dataclass(frozen=True)
class _Interval:
    """Of keys, with both ends. base: the sums of all above it."""

    low: jax.Array
    top: jax.Array
    base: tuple[jax.Array, ...]


jax.tree_util.register_dataclass(_Interval, ["low", "top", "base"], [])

# What a source gives of its i-th round: keys, weights (None if all are 1) and whether they count,
# each [1, W], for every piece.
_Read = Callable[[jax.Array, _Interval], list[tuple[jax.Array, jax.Array | None, jax.Array]]]


def _kernel(
    least_B, lows_B, tops_B, bounded_B, scores_BV, *refs, weighted: bool, barrier: bool, tuning
):
    if weighted:
        weights_BV, found_B, keys_BDW, kept_BDW = refs
    else:
        found_B, keys_BDW = refs
        weights_BV = kept_BDW = None
    b, V, W = pl.program_id(0), scores_BV.shape[1], tuning.width
    lane_1W = jax.lax.broadcasted_iota(jnp.int32, (1, W), 1)
    wanted, bounded = least_B[b], bounded_B[b]

    def row(i: jax.Array, within: _Interval) -> list:
        places = [(i * tuning.pieces + piece) * W + lane_1W for piece in range(tuning.pieces)]
        scores = [triton.load(scores_BV.at[b, v], mask=v < V, other=-jnp.inf) for v in places]
        keys = [to_keys(x_1W) for x_1W in scores]
        inside = [
            (v < V) & (key >= within.low) & (key <= within.top)
            for v, key in zip(places, keys, strict=True)
        ]
        weights = [
            triton.load(weights_BV.at[b, v], mask=here, other=0) if weighted else None
            for v, here in zip(places, inside, strict=True)
        ]
        return list(zip(keys, weights, inside, strict=True))

    def list_of(held_1W: jax.Array) -> _Read:
        def read(i: jax.Array, within: _Interval) -> list:
            items = []
            for piece in range(tuning.pieces):
                d = i * tuning.pieces + piece
                there = d < held_1W
                key = triton.load(keys_BDW.at[b, d, lane_1W], mask=there, other=0)
                weight = None
                if weighted:
                    weight = triton.load(kept_BDW.at[b, d, lane_1W], mask=there, other=0)
                items.append((key, weight, there & (key >= within.low) & (key <= within.top)))
            return items

        return read

    def over(listed: jax.Array, held_1W: jax.Array, use: Callable[[jax.Array, _Read], tuple]):
        """use(rounds, read) of the list, or else of the row."""
        step = tuning.pieces
        return jax.lax.cond(
            listed,
            lambda: use((jnp.max(held_1W) + step - 1) // step, list_of(held_1W)),
            lambda: use(jnp.int32(pl.cdiv(V, step * W)), row),
        )

    def sift(within: _Interval, listed: jax.Array, held_1W: jax.Array):
        """The interval, as far as there are keys in it; whether they are listed; lanes' lengths."""

        def use(rounds: jax.Array, read: _Read) -> tuple:
            def body(i, carry):
                held_1W, least_1W, most_1W = carry
                for key, weight, inside in read(i, within):
                    at = keys_BDW.at[b, jnp.minimum(held_1W, tuning.depth - 1), lane_1W]
                    fits = inside & (held_1W < tuning.depth)
                    triton.store(at, key, mask=fits)
                    if weighted:
                        at = kept_BDW.at[b, jnp.minimum(held_1W, tuning.depth - 1), lane_1W]
                        triton.store(at, weight, mask=fits)
                    held_1W += inside.astype(jnp.int32)
                    least_1W = jnp.minimum(least_1W, jnp.where(inside, key, _MOST))
                    most_1W = jnp.maximum(most_1W, jnp.where(inside, key, _LEAST))
                return held_1W, least_1W, most_1W

            begin = [jnp.full((1, W), value, jnp.int32) for value in (0, _MOST, _LEAST)]
            return jax.lax.fori_loop(0, rounds, body, tuple(begin))

        held_1W, least_1W, most_1W = over(listed, held_1W, use)
        if barrier:
            triton.debug_barrier()  # a list is read by the threads that wrote it, or by others
        low = jnp.maximum(within.low, jnp.min(least_1W))
        top = jnp.minimum(within.top, jnp.max(most_1W))
        return _Interval(low, top, within.base), jnp.max(held_1W) <= tuning.depth, held_1W

    def weigh(pivots_P: jax.Array, within: _Interval, listed: jax.Array, held_1W: jax.Array):
        """The sums at or above the pivots, [P] each."""

        def use(rounds: jax.Array, read: _Read) -> tuple:
            def body(i, sums):
                for key, weight, inside in read(i, within):
                    above_PW = key >= pivots_P[:, None]
                    parts = _limbs(jnp.where(inside, 1 if weight is None else weight, 0), weighted)
                    sums = [
                        sum_PW + jnp.where(above_PW, part_1W, 0)
                        for sum_PW, part_1W in zip(sums, parts, strict=True)
                    ]
                return tuple(sums)

            zeros = jnp.zeros((tuning.pivots, W), jnp.int32)
            sums = jax.lax.fori_loop(0, rounds, body, (zeros,) * (1 + weighted))
            return tuple(jnp.sum(sum_PW, axis=1) for sum_PW in sums)

        sums = over(listed, held_1W, use)
        return tuple(base + sum_P for base, sum_P in zip(within.base, sums, strict=True))

    def turn(carry):
        low, top, base, least, listed, held_1W, number = carry
        within, listed, held_1W = jax.lax.cond(
            # Else the list is full long before the row's end.
            (number > 0) | (bounded > 0),
            lambda: sift(_Interval(low, top, base), listed, held_1W),
            lambda: (_Interval(low, top, base), listed, held_1W),
        )
        pivots_P = _pivots(within, number, tuning.pivots)
        sums = weigh(pivots_P, within, listed, held_1W)
        wholes_P = _whole(sums)
        if weighted:
            all_of_it = wanted * _pick(wholes_P, 0)
            least = jnp.where(number == 0, all_of_it, least)
        within = _between(pivots_P, sums, wholes_P >= least, within)
        return within.low, within.top, within.base, least, listed, held_1W, number + 1

    begin = (
        lows_B[b],
        tops_B[b],
        (jnp.int32(0),) * (1 + weighted),
        jnp.float32(1) if weighted else wanted,
        jnp.bool_(False),
        jnp.zeros((1, W), jnp.int32),
        jnp.int32(0),
    )
    low, _, _, least, *_ = jax.lax.while_loop(lambda carry: carry[0] < carry[1], turn, begin)
    found_B[b] = jnp.where(least > 0, low, _MOST)


def _pivots(within: _Interval, number: jax.Array, P: int) -> jax.Array:
    """In order, the first of them the interval's low end; all but it lie above that."""
    i_P, bits = jnp.arange(P, dtype=jnp.int32), P.bit_length() - 1
    top = to_scores(within.top)
    span = top - to_scores(within.low)
    span = jnp.where(span < REACH, span, REACH)  # also where it is not a number
    by_score_P = to_keys(top - span * ((P - i_P).astype(jnp.float32) * (1 / P)))
    keys = within.top - within.low  # unsigned: it may not fit 31 bits
    each = jax.lax.shift_right_logical(keys, jnp.int32(bits))
    by_key_P = within.low + each * i_P + (((keys & (P - 1)) * i_P + P - 1) >> bits)
    pivots_P = jnp.where(number < _FEW_TURNS, by_score_P, by_key_P)
    pivots_P = jnp.minimum(jnp.maximum(pivots_P, within.low + 1), within.top)
    return jnp.where(i_P == 0, within.low, pivots_P)


def _between(
    pivots_P: jax.Array, sums: tuple[jax.Array, ...], holds_P: jax.Array, within: _Interval
) -> _Interval:
    """From the last pivot at or above which lies enough to before the next."""
    last = jnp.sum(holds_P.astype(jnp.int32)) - 1
    fails = last + 1 < pivots_P.shape[0]
    return _Interval(
        low=_pick(pivots_P, last),
        top=jnp.where(fails, _pick(pivots_P, last + 1) - 1, within.top),
        base=tuple(
            jnp.where(fails, _pick(sum_P, last + 1), base)
            for sum_P, base in zip(sums, within.base, strict=True)
        ),
    )


def _pick(x_P: jax.Array, i: jax.Array | int) -> jax.Array:
    return jnp.sum(jnp.where(jnp.arange(x_P.shape[0]) == i, x_P, 0))


def _limbs(weight: jax.Array, weighted: bool) -> list[jax.Array]:
    return [weight >> LIMB, weight & (2**LIMB - 1)] if weighted else [weight]


def _whole(sums: tuple[jax.Array, ...]) -> jax.Array:
    """As `cutoffs.whole`, to the bit; a count is exact."""
    parts = [x.astype(jnp.uint32).astype(jnp.float32) for x in sums]
    return parts[0] if len(parts) == 1 else parts[0] * 2**LIMB + parts[1]
