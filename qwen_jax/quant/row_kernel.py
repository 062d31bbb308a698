"""One row times a quantised matrix in words on a GPU: a Pallas kernel, lowered by Triton.

Reading is what takes time, so a thread always has several pieces of 16 bytes on their way: a warp
runs along the inputs of a few outputs, 32 pieces of an output at a time, and reads pieces ahead of
those that it multiplies, on the ordinary units in float32. The row's own elements are converted
once for all its outputs. Whole numbers are multiplied as 1.5 + v / 2^bits (`words.places`); what
the 1.5 adds, a multiple of the sum of the inputs, is taken off afterwards.

Letters: C inputs, O outputs, S groups of inputs, T warps of a program.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.quant import words
from qwen_jax.quant.array import QuantArray

_THREADS = 32


@dataclass(frozen=True)
class Tuning:
    """Warps of a program, outputs of a warp, and how many pieces of each are read ahead."""

    warps: int
    outputs: int
    ahead: int = 2


def choose(format: str) -> Tuning:
    """The fastest of those tried on an H100 with the matrices of the 7B (docs/experiments.md)."""
    return Tuning(warps=4, outputs=4) if format == "int4" else Tuning(warps=2, outputs=2)


def why_not(q: QuantArray, *, dtype: jnp.dtype) -> str | None:
    """Why a matrix cannot be multiplied so, once in words; None if it can."""
    tuning = choose(q.format)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies bfloat16, not {jnp.dtype(dtype).name}"
    if q.values.ndim != len(q.outputs) + 1:
        return "it takes one matrix, not a stack"
    outputs, piece = math.prod(q.outputs), words.per_piece(q.format)
    if outputs % (tuning.warps * tuning.outputs) or q.num_inputs % piece or q.group_size % piece:
        return (
            f"outputs must be a multiple of {tuning.warps * tuning.outputs}, inputs and groups of "
            f"{piece}, not {outputs}, {q.num_inputs} and {q.group_size}"
        )
    return None


def multiply(
    x_C: jax.Array, q: QuantArray, *, tuning: Tuning | None = None, interpret: bool | None = None
) -> jax.Array:
    """x [C] times the matrix of `q`, words [O, ...] -> [O] in float32.

    `q.order` must have been applied to x. interpret: None where there is no GPU.
    """
    tuning = tuning or choose(q.format)
    O = q.values.shape[0]  # noqa: E741 (outputs)
    assert q.axis == -1 and O % (tuning.warps * tuning.outputs) == 0, (q.values.shape, tuning)
    operands = [x_C, q.values, q.scales] + ([] if q.zeros is None else [q.zeros])
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    compiler = triton.CompilerParams(num_warps=tuning.warps, num_stages=1)
    return pl.pallas_call(
        functools.partial(_kernel, format=q.format, tuning=tuning),
        grid=(O // (tuning.warps * tuning.outputs),),
        out_shape=jax.ShapeDtypeStruct((O,), jnp.float32),
        interpret=interpret,
        name=f"quantised_{q.format}_row",
        **({} if interpret else {"compiler_params": compiler}),
    )(*operands)


def _kernel(x_C, w_OW, s_OS, *refs, format: str, tuning: Tuning):
    z_OS, y_O = refs if len(refs) == 2 else (None, *refs)
    T, C, S = tuning.warps, x_C.shape[0], s_OS.shape[1]
    width, group = words.per_piece(format), C // S
    # Nothing is added, which the compiler does not know: see `words.places`.
    one = jnp.uint32(words.ONE) + (pl.program_id(0) >> 30).astype(jnp.uint32)
    first = pl.program_id(0) * T * tuning.outputs + jnp.arange(T)
    outputs = [first + j * T for j in range(tuning.outputs)]
    unit = float(1 << words.bits(format)) if format != "fp8" else 1.0

    def pieces(i):
        """Which pieces the threads have in round i, [1, threads, 1]."""
        return (i * _THREADS + jnp.arange(_THREADS))[None, :, None]

    def places_of(place: int):
        """The words of a piece, or the inputs that go with a place of them."""
        return (place * words.PER_PIECE + jnp.arange(words.PER_PIECE))[None, None, :]

    def load(ref, c, limit: int, *, o=None, number: int):
        """Of [T, threads, number] places c, in row o; zeros from `limit` on."""
        shape = (T, _THREADS, number)
        c = jnp.broadcast_to(c, shape)
        at = (c,) if o is None else (jnp.broadcast_to(o[:, None, None], shape), c)
        return triton.load(ref.at[at], mask=c < limit, other=0)

    def read(i):
        """Words of round i for every output; zeros beyond the last."""
        c = pieces(i) * words.PER_PIECE + places_of(0)
        number = words.PER_PIECE
        return tuple(load(w_OW, c, w_OW.shape[1], o=o, number=number) for o in outputs)

    def row(i, place: int):
        """The inputs that go with a place of the words."""
        c = pieces(i) * width + places_of(place)
        return load(x_C, c, C, number=words.PER_PIECE).astype(jnp.float32)

    def of_group(ref, o, i):
        """Each piece's scale or zero point, [T, threads, 1]."""
        c = pieces(i) * width // group
        return load(ref, c, S, o=o, number=1).astype(jnp.float32)

    def body(i, carry):
        sums, held = carry
        ahead = read(i + tuning.ahead)
        x = [row(i, place) for place in range(32 // words.bits(format))]
        total_x = _total(x)
        added = []
        for o, w, total in zip(outputs, held[0], sums, strict=True):
            values = words.places(w, format, one=one)
            part = _total([a * b for a, b in zip(x, values, strict=True)])
            zero = 0.0 if z_OS is None else of_group(z_OS, o, i) / unit
            if format != "fp8":
                part = part - (words.BEGIN + zero) * total_x
            added.append(total + (part * of_group(s_OS, o, i) if S > 1 else part))
        return tuple(added), (*held[1:], ahead)

    sums = tuple(jnp.zeros((T, _THREADS, 1), jnp.float32) for _ in outputs)
    held = tuple(read(i) for i in range(tuning.ahead))
    rounds = pl.cdiv(w_OW.shape[1], _THREADS * words.PER_PIECE)
    sums, _ = jax.lax.fori_loop(0, rounds, body, (sums, held))
    for o, total in zip(outputs, sums, strict=True):
        y = jnp.sum(jnp.sum(total, axis=2), axis=1) * unit
        if S == 1:
            y = y * triton.load(s_OS.at[o, jnp.zeros_like(o)]).astype(jnp.float32)
        triton.store(y_O.at[o], y)


def _total(parts: list[jax.Array]) -> jax.Array:
    """The sum over each piece, [T, threads, 1]."""
    return jnp.sum(sum(parts), axis=2, keepdims=True)
