"""The last norm and the LM head for a few rows on a GPU, lowered by Triton.

The LM head is the largest matrix of a small model, and greedy decoding needs only the largest of
its logits: every program keeps the best of its outputs, and a second kernel the best of those.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.decode.small_batch import row_products

_NONE = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Number of programs, their warps, and a tile's outputs; see `benchmarks/decode_kernels.py`."""

    programs: int
    outputs: int = 16
    warps: int = 8


def logits(
    x_RD: jax.Array,
    scale_D: jax.Array,
    table_VD: jax.Array,
    *,
    eps: float,
    tuning: Tuning,
    interpret: bool = False,
) -> jax.Array:
    """Logits norm(x) W^T, [R, V] in float32."""
    return pl.pallas_call(
        functools.partial(_logits, eps=eps, tuning=tuning),
        grid=(tuning.programs,),
        out_shape=jax.ShapeDtypeStruct((x_RD.shape[0], table_VD.shape[0]), jnp.float32),
        name="small_batch_logits",
        **_options(interpret, warps=tuning.warps),
    )(x_RD, scale_D, table_VD)


def likeliest(
    x_RD: jax.Array,
    scale_D: jax.Array,
    table_VD: jax.Array,
    *,
    eps: float,
    tuning: Tuning,
    interpret: bool = False,
) -> jax.Array:
    """The token of every row's largest logit, the first of equal ones, [R] int32."""
    R, P = x_RD.shape[0], tuning.programs
    best = [jax.ShapeDtypeStruct((R, P), dtype) for dtype in (jnp.float32, jnp.int32)]
    best = pl.pallas_call(
        functools.partial(_best_of_program, eps=eps, tuning=tuning),
        grid=(P,),
        out_shape=best,
        name="small_batch_best",
        **_options(interpret, warps=tuning.warps),
    )(x_RD, scale_D, table_VD)
    return pl.pallas_call(
        _best_of_all,
        grid=(R,),
        out_shape=jax.ShapeDtypeStruct((R,), jnp.int32),
        name="small_batch_best_of_all",
        **_options(interpret, warps=4),
    )(*best)


def _options(interpret: bool, *, warps: int) -> dict:
    params = triton.CompilerParams(num_warps=warps, num_stages=1)
    return {"interpret": interpret, "compiler_params": params}


def _logits(x_RD, scale_D, table_VD, logits_RV, *, eps: float, tuning: Tuning) -> None:
    tile, begin = row_products.Tile(tuning.outputs, tuning.warps), pl.program_id(0)
    read = functools.partial(row_products.read_tile, table_VD, tile=tile)
    first = read(begin)
    x = row_products.normalise(x_RD, scale_D, tile=tile, eps=eps)

    def use(index, w_TD):
        row_products.write(logits_RV, index * tuning.outputs, row_products.times(w_TD, x))

    count = pl.cdiv(table_VD.shape[0], tuning.outputs)
    row_products.over_tiles(count, read, use, first=first, begin=begin, stride=tuning.programs)


def _best_of_program(
    x_RD, scale_D, table_VD, best_RP, at_RP, *, eps: float, tuning: Tuning
) -> None:
    (R, _), V, T = x_RD.shape, table_VD.shape[0], tuning.outputs
    tile, begin = row_products.Tile(tuning.outputs, tuning.warps), pl.program_id(0)
    read = functools.partial(row_products.read_tile, table_VD, tile=tile)
    first = read(begin)
    x = row_products.normalise(x_RD, scale_D, tile=tile, eps=eps)

    def body(i, carry):
        w_TD, best = carry
        index = begin + i * tuning.programs
        ahead = read(index + tuning.programs)
        o = index * T + jnp.arange(T)
        better = []
        for y, (high, at) in zip(row_products.times(w_TD, x), best, strict=True):
            wins = (y > high) & (o < V)
            better.append((jnp.where(wins, y, high), jnp.where(wins, o, at)))
        return ahead, better

    none = jnp.full(T, -jnp.inf, jnp.float32), jnp.full(T, _NONE, jnp.int32)
    rounds = pl.cdiv(V, T * tuning.programs)
    _, best = jax.lax.fori_loop(0, rounds, body, (first, [none] * R))
    for r, (high, at) in enumerate(best):
        best_RP[r, begin], at_RP[r, begin] = _first_of_largest(high, at)


def _best_of_all(best_RP, at_RP, token_R) -> None:
    r, P = pl.program_id(0), best_RP.shape[1]
    p = jnp.arange(pl.next_power_of_2(P))
    high = triton.load(best_RP.at[r, p], mask=p < P, other=-jnp.inf)
    at = triton.load(at_RP.at[r, p], mask=p < P, other=_NONE)
    token_R[r] = _first_of_largest(high, at)[1]


def _first_of_largest(high, at) -> tuple[jax.Array, jax.Array]:
    most = jnp.max(high)
    return most, jnp.min(jnp.where(high == most, at, _NONE))
