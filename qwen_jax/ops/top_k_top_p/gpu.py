"""The search for a threshold on a GPU: a Pallas kernel, lowered by Triton.

One program searches one row, in rounds, until its interval of keys holds a single key. A round is:

  - sift: copy the keys inside the interval to a short list, each lane to its own column, so that no
    thread waits for another. Once all of them fit, later rounds read the list only.
  - weigh: sum the counts or weights at or above a few pivots inside the interval. The sums say
    between which two pivots the threshold is. The sum above the interval is computed once and kept.

A row is therefore read from memory two or three times. Any pivots lead to the same threshold. The
first rounds space them evenly among scores, where the tokens are; later rounds among keys, many of
which are near 0. The interval also shrinks to the keys that sifting found in it, so that ties end
the search at once.

Keys are int32 in the order of the floats. Letters: W lanes, D entries of a lane's list, P pivots.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.ops.top_k_top_p.fixed_point import LIMB, REACH

_SCORE_ROUNDS = 3  # rounds with pivots among scores
_LISTED = 4  # loads of a lane's list in flight at a time: most lists are short
_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes of the search, all powers of two; `benchmarks/sampling.py` compares some.

    warps: warps of a program, with 32 lanes each. pieces: loads of a lane in flight at a time.
    pivots: pivots of a round. depth: entries of a lane's list.
    """

    warps: int = 16
    pieces: int = 8
    pivots: int = 8
    depth: int = 64

    @property
    def lanes(self) -> int:
        """Number of lanes, one a thread; with more, Triton would move entries among threads."""
        return 32 * self.warps


def kth(
    scores_BV: jax.Array, *, best_B: jax.Array, top_k_B: jax.Array, tuning: Tuning | None
) -> jax.Array:
    """The top_k_B-th largest score of each row, as in `reference.kth`."""
    tops_B = _tops(best_B)
    keys_B = largest(
        scores_BV,
        least_B=jnp.minimum(top_k_B, scores_BV.shape[1]),
        # Rows without top-k have an interval of one key, which takes no round.
        lows_B=jnp.where(top_k_B > 0, jnp.iinfo(jnp.int32).min, tops_B),
        tops_B=tops_B,
        tuning=tuning,
    )
    return to_scores(keys_B)


def nucleus(
    scores_BV: jax.Array,
    weights_BV: jax.Array,
    *,
    best_B: jax.Array,
    kth_B: jax.Array,
    top_p_B: jax.Array,
    tuning: Tuning | None,
) -> jax.Array:
    """The threshold of top-p of each row, as in `reference.nucleus`."""
    tops_B = _tops(best_B)
    # All weight is at or above these scores.
    least_B = jnp.maximum(kth_B, best_B - REACH)
    lows_B = jnp.where(jnp.isfinite(best_B), to_keys(least_B), jnp.iinfo(jnp.int32).min)
    keys_B = largest(
        scores_BV,
        weights_BV,
        least_B=top_p_B,
        lows_B=jnp.where(top_p_B < 1.0, lows_B, tops_B),
        tops_B=tops_B,
        bounded_B=kth_B > -jnp.inf,
        tuning=tuning,
    )
    return to_scores(keys_B)


def _tops(best_B: jax.Array) -> jax.Array:
    """Keys that are at or above all of a row's scores, [B]."""
    # The maximum of 0 and -0 may be either of them.
    keys_B = to_keys(jnp.where(best_B == 0, 0.0, best_B))
    return jnp.where(jnp.isfinite(best_B), keys_B, jnp.iinfo(jnp.int32).max)


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
    """The largest key of lows_B..tops_B with enough scores at or above it, [B] int32.

    Enough are least_B (float32) scores; or, with weights (uint32 of two limbs, 0 for scores that do
    not count), the share least_B of the weight from lows_B on. If that weight is 0, the result is
    the largest int32. bounded_B: rows whose interval has so few scores that sifting comes first.
    interpret: run Pallas's interpreter; None: only without a GPU.
    """
    B, tuning = scores_BV.shape[0], tuning or Tuning()
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    compiler = triton.CompilerParams(num_warps=tuning.warps, num_stages=1)
    weighted = weights_BV is not None
    listed = jax.ShapeDtypeStruct((B, tuning.depth, tuning.lanes), jnp.int32)
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
        # A bitcast costs nothing; the kernel has one integer type.
        *([jax.lax.bitcast_convert_type(weights_BV, jnp.int32)] if weighted else []),
    )
    return found_B


def to_keys(scores: jax.Array) -> jax.Array:
    """int32 keys, whose order is that of the scores."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return bits ^ ((bits >> 31) & _MOST)


def to_scores(keys: jax.Array) -> jax.Array:
    """The scores of int32 keys: the inverse of `to_keys`."""
    return jax.lax.bitcast_convert_type(keys ^ ((keys >> 31) & _MOST), jnp.float32)


@dataclass(frozen=True)
class _Interval:
    """An interval of keys, low..top inclusive. base: the sums of all scores above it."""

    low: jax.Array
    top: jax.Array
    base: tuple[jax.Array, ...]


@dataclass(frozen=True)
class _List:
    """State of the list. ready: it holds all keys of the interval. filled_1W: entries a lane."""

    ready: jax.Array
    filled_1W: jax.Array


jax.tree_util.register_dataclass(_Interval, ["low", "top", "base"], [])
jax.tree_util.register_dataclass(_List, ["ready", "filled_1W"], [])


@dataclass(frozen=True, kw_only=True)
class _Refs:
    """The references of a program: its row, the scores and weights, and its list.

    Without weights, scores are counted.
    """

    row: jax.Array
    scores_BV: jax.Array
    weights_BV: jax.Array | None
    keys_BDW: jax.Array
    listed_BDW: jax.Array | None


# Keys of one step, weights (None: all are 1), and whether keys are in the interval; [1, W] each.
_Items = list[tuple[jax.Array, jax.Array | None, jax.Array]]
_Read = Callable[[jax.Array, _Interval], _Items]


def _kernel(
    least_B, lows_B, tops_B, bounded_B, scores_BV, *refs, weighted: bool, barrier: bool, tuning
):
    weights_BV, found_B, keys_BDW, listed_BDW = refs if weighted else (None, *refs, None)
    b = pl.program_id(0)
    refs = _Refs(
        row=b,
        scores_BV=scores_BV,
        weights_BV=weights_BV,
        keys_BDW=keys_BDW,
        listed_BDW=listed_BDW,
    )
    wanted, bounded = least_B[b], bounded_B[b] > 0
    sift = functools.partial(_sift, refs, barrier=barrier, tuning=tuning)

    def one_round(carry):
        within, least, listed, number = carry
        # In the first round, the list would be full long before the row's end.
        sifts = bounded | (number > 0)
        within, listed = jax.lax.cond(sifts, sift, lambda *same: same, within, listed)
        pivots_P = _pivots(within, number, tuning.pivots)
        sums = _weigh(refs, pivots_P, within, listed, tuning=tuning)
        wholes_P = _whole(sums)
        if weighted:
            least = jnp.where(number == 0, wanted * _pick(wholes_P, 0), least)
        return _between(pivots_P, sums, wholes_P >= least, within), least, listed, number + 1

    begin = (
        _Interval(lows_B[b], tops_B[b], (jnp.int32(0),) * (1 + weighted)),
        jnp.float32(1) if weighted else wanted,
        _List(jnp.bool_(False), jnp.zeros((1, tuning.lanes), jnp.int32)),
        jnp.int32(0),
    )
    within, least, *_ = jax.lax.while_loop(
        lambda carry: carry[0].low < carry[0].top, one_round, begin
    )
    found_B[b] = jnp.where(least > 0, within.low, _MOST)


def _sift(
    refs: _Refs, within: _Interval, listed: _List, *, barrier: bool, tuning: Tuning
) -> tuple[_Interval, _List]:
    """The interval, shrunk to the keys found in it, and the list of its keys."""
    b, lane_1W = refs.row, _lanes(tuning)

    def use(rounds: jax.Array, read: _Read) -> tuple:
        def body(i, carry):
            filled_1W, least_1W, most_1W = carry
            for key, weight, inside in read(i, within):
                at = b, jnp.minimum(filled_1W, tuning.depth - 1), lane_1W
                fits = inside & (filled_1W < tuning.depth)
                triton.store(refs.keys_BDW.at[at], key, mask=fits)
                if weight is not None:
                    triton.store(refs.listed_BDW.at[at], weight, mask=fits)
                filled_1W += inside.astype(jnp.int32)
                least_1W = jnp.minimum(least_1W, jnp.where(inside, key, _MOST))
                most_1W = jnp.maximum(most_1W, jnp.where(inside, key, _LEAST))
            return filled_1W, least_1W, most_1W

        none = tuple(jnp.full(lane_1W.shape, n, jnp.int32) for n in (0, _MOST, _LEAST))
        return jax.lax.fori_loop(0, rounds, body, none)

    # The list is also copied to itself: a lane writes behind the entries that it has read.
    filled_1W, least_1W, most_1W = _over(refs, listed, use, tuning=tuning)
    if barrier:
        triton.debug_barrier()  # another thread may read an entry than the one that wrote it
    low = jnp.maximum(within.low, jnp.min(least_1W))
    top = jnp.minimum(within.top, jnp.max(most_1W))
    ready = jnp.max(filled_1W) <= tuning.depth
    return _Interval(low, top, within.base), _List(ready, filled_1W)


def _weigh(
    refs: _Refs, pivots_P: jax.Array, within: _Interval, listed: _List, *, tuning: Tuning
) -> tuple[jax.Array, ...]:
    """The sums of all scores at or above each pivot, [P] each."""

    def use(rounds: jax.Array, read: _Read) -> tuple:
        def body(i, sums):
            for key, weight, inside in read(i, within):
                above_PW = key >= pivots_P[:, None]
                here = jnp.where(inside, 1 if weight is None else weight, 0)
                parts = [here] if weight is None else [here >> LIMB, here & (2**LIMB - 1)]
                sums = tuple(
                    sum_PW + jnp.where(above_PW, part_1W, 0)
                    for sum_PW, part_1W in zip(sums, parts, strict=True)
                )
            return sums

        zeros = jnp.zeros((tuning.pivots, tuning.lanes), jnp.int32)
        sums = jax.lax.fori_loop(0, rounds, body, (zeros,) * len(within.base))
        return tuple(jnp.sum(sum_PW, axis=1) for sum_PW in sums)

    sums = _over(refs, listed, use, tuning=tuning)
    return tuple(base + sum_P for base, sum_P in zip(within.base, sums, strict=True))


def _over(
    refs: _Refs, listed: _List, use: Callable[[jax.Array, _Read], tuple], *, tuning: Tuning
) -> tuple:
    """The result of use(steps, read) over the list; over the row if the list is not ready."""
    V, few = refs.scores_BV.shape[1], min(_LISTED, tuning.pieces)
    of_list = functools.partial(_of_list, refs, listed.filled_1W, pieces=few, tuning=tuning)
    of_row = functools.partial(_of_row, refs, tuning=tuning)
    return jax.lax.cond(
        listed.ready,
        lambda: use((jnp.max(listed.filled_1W) + few - 1) // few, of_list),
        lambda: use(jnp.int32(pl.cdiv(V, tuning.pieces * tuning.lanes)), of_row),
    )


def _of_row(refs: _Refs, i: jax.Array, within: _Interval, *, tuning: Tuning) -> _Items:
    b, V, lane_1W = refs.row, refs.scores_BV.shape[1], _lanes(tuning)
    # All loads come before any use, so that they are in flight together.
    places = [(i * tuning.pieces + n) * tuning.lanes + lane_1W for n in range(tuning.pieces)]
    keys = [
        to_keys(triton.load(refs.scores_BV.at[b, v], mask=v < V, other=-jnp.inf)) for v in places
    ]
    items = []
    for v, key in zip(places, keys, strict=True):
        inside, weight = (v < V) & _contains(within, key), None
        if refs.weights_BV is not None:
            weight = triton.load(refs.weights_BV.at[b, v], mask=inside, other=0)
        items.append((key, weight, inside))
    return items


def _of_list(
    refs: _Refs,
    filled_1W: jax.Array,
    i: jax.Array,
    within: _Interval,
    *,
    pieces: int,
    tuning: Tuning,
) -> _Items:
    b, lane_1W = refs.row, _lanes(tuning)
    items = []
    for d in (i * pieces + n for n in range(pieces)):
        there = d < filled_1W
        key = triton.load(refs.keys_BDW.at[b, d, lane_1W], mask=there, other=0)
        weight = None
        if refs.listed_BDW is not None:
            weight = triton.load(refs.listed_BDW.at[b, d, lane_1W], mask=there, other=0)
        items.append((key, weight, there & _contains(within, key)))
    return items


def _lanes(tuning: Tuning) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, tuning.lanes), 1)


def _contains(within: _Interval, key: jax.Array) -> jax.Array:
    return (key >= within.low) & (key <= within.top)


def _pivots(within: _Interval, number: jax.Array, P: int) -> jax.Array:
    """The pivots in ascending order, [P]: the first is the interval's low end, others are above."""
    i_P, bits = jnp.arange(P, dtype=jnp.int32), P.bit_length() - 1
    top = to_scores(within.top)
    span = top - to_scores(within.low)
    span = jnp.where(span < REACH, span, REACH)  # REACH also for NaN
    by_score_P = to_keys(top - span * ((P - i_P).astype(jnp.float32) * (1 / P)))
    keys = within.top - within.low  # unsigned: it may not fit 31 bits
    each = jax.lax.shift_right_logical(keys, jnp.int32(bits))
    by_key_P = within.low + each * i_P + (((keys & (P - 1)) * i_P + P - 1) >> bits)
    pivots_P = jnp.where(number < _SCORE_ROUNDS, by_score_P, by_key_P)
    pivots_P = jnp.minimum(jnp.maximum(pivots_P, within.low + 1), within.top)
    return jnp.where(i_P == 0, within.low, pivots_P)


def _between(
    pivots_P: jax.Array, sums: tuple[jax.Array, ...], holds_P: jax.Array, within: _Interval
) -> _Interval:
    """The interval from the last pivot with enough at or above it to before the next pivot."""
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
    """Element i; Triton has no indexing of arrays in registers."""
    return jnp.sum(jnp.where(jnp.arange(x_P.shape[0]) == i, x_P, 0))


def _whole(sums: tuple[jax.Array, ...]) -> jax.Array:
    """Sums in float32, rounded as in `reference.nucleus`; a count is exact."""
    parts = [x.astype(jnp.uint32).astype(jnp.float32) for x in sums]
    return parts[0] if len(parts) == 1 else parts[0] * 2**LIMB + parts[1]
