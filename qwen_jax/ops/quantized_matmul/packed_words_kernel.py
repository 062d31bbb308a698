"""Products of up to 8 rows with a matrix in packed words on one GPU: a Triton kernel in Pallas.

The kernel is bound by reads from memory, then by its number of instructions. A warp reads its
tiles' words in their order, 512 bytes at a time and a round ahead of those that it multiplies; a
word becomes operands of the matrix units in a few instructions (`packed_words.assembly`), so that
warps can issue reads all the time. Halves of int8 are multiplied as 128 + n. The part of the sum
that the 128 adds, a multiple of the sum of the row's inputs, is subtracted afterwards, as zero
points are. int4 is faster if the 128 is subtracted from each value first
(docs/experiments/quantisation.md).

Letters: R rows, C inputs, O outputs, S groups of inputs, P pairs of inputs, T threads.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.ops.quantized_matmul import ptx
from qwen_jax.quant import packed_words
from qwen_jax.quant.array import QuantArray

MOST_ROWS = 8
_LANES = packed_words.LANES


@dataclass(frozen=True)
class Tuning:
    """Sizes of a program: warps, which share its inputs; tiles; reads of each tile in a round."""

    warps: int
    tiles: int
    reads: int = 2


def default_tuning(q: QuantArray, *, rows: int) -> Tuning:
    """The fastest tuning of those tried on an H100 with the matrices of the 7B.

    The table is in docs/experiments/quantisation.md.

    For fp8 it is the fastest when words were read one by one; the present kernel was not timed.
    """
    tiles = math.prod(q.outputs) // packed_words.tile(q.format)
    if tiles > 1024:
        if q.format == "fp8":
            return Tuning(warps=8, tiles=1, reads=1)
        return Tuning(warps=4, tiles=1 if rows == 1 else 2)
    if rows > 1:
        return Tuning(warps=8, tiles=1, reads=1 if q.format == "int4" else 2)
    if q.format == "int4":
        return Tuning(warps=16, tiles=1)
    small = tiles < 512 and q.num_inputs <= 4096
    return Tuning(warps=16 if small else 8, tiles=1, reads=1)


def unsupported(q: QuantArray, *, rows: int, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot multiply so many rows with the matrix; None: it can.

    The matrix is in packed words, or is to be packed.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies bfloat16, not {jnp.dtype(dtype).name}"
    if rows > MOST_ROWS:
        return f"in packed words it takes {MOST_ROWS} rows, not {rows}"
    if (reason := ptx.unsupported()) is not None:
        return reason
    if q.values.ndim != len(q.outputs) + 1:
        return "it takes one matrix, not a stack"
    O, C = math.prod(q.outputs), q.num_inputs  # noqa: E741
    if q.group_size % packed_words.inputs(q.format):
        return f"groups of {q.group_size} inputs are no multiple of {packed_words.inputs(q.format)}"
    return packed_words.unsupported(q.format, num_outputs=O, num_inputs=C)


def multiply(
    x_RC: jax.Array, q: QuantArray, *, tuning: Tuning | None = None, interpret: bool | None = None
) -> jax.Array:
    """The product of x [R, C] with the matrix of `q`, packed words [O, ...], [R, O] in float32.

    The caller has applied `q.order` to x. interpret: run Pallas's interpreter; None: only without
    a GPU.
    """
    tuning = tuning or default_tuning(q, rows=x_RC.shape[0])
    (R, C), O = x_RC.shape, q.values.shape[0]  # noqa: E741
    tile, steps = packed_words.tile(q.format), C // packed_words.inputs(q.format)
    steps_per_group = q.group_size // packed_words.inputs(q.format)
    tuning = dataclasses.replace(tuning, tiles=math.gcd(tuning.tiles, O // tile))
    if q.num_groups > 1:  # a warp's words of a round are of one group
        tuning = dataclasses.replace(tuning, reads=math.gcd(tuning.reads, steps_per_group))
    pairs_RP = jax.lax.bitcast_convert_type(x_RC.reshape(R, C // 2, 2), jnp.uint32)
    operands = [pairs_RP.reshape(-1), q.values.reshape(-1), q.scales] + (
        [] if q.zeros is None else [q.zeros]
    )
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    compiler = triton.CompilerParams(num_warps=tuning.warps, num_stages=1)
    kernel = functools.partial(
        _kernel, R=R, format=q.format, steps=steps, steps_per_group=steps_per_group, tuning=tuning,
        interpret=interpret,
    )  # fmt: skip
    return pl.pallas_call(
        kernel,
        grid=(O // tile // tuning.tiles,),
        out_shape=jax.ShapeDtypeStruct((R, O), jnp.float32),
        interpret=interpret,
        name=f"quantised_{q.format}_words",
        **({} if interpret else {"compiler_params": compiler}),
    )(*operands)


def _kernel(
    x,
    w,
    s_OS,
    *refs,
    R: int,
    format: str,
    steps: int,
    steps_per_group: int,
    tuning: Tuning,
    interpret,
):
    z_OS, y_RO = refs if len(refs) == 2 else (None, *refs)
    S = s_OS.shape[1]
    W, U = tuning.warps, tuning.reads
    thread = jnp.arange(W * _LANES)
    lane, warp = thread % _LANES, thread // _LANES
    line, quarter = lane // 4, lane % 4
    first = pl.program_id(0) * tuning.tiles
    halves = (0,) if format == "int8" else (0, 8)  # outputs of a line
    columns = 1 if R == 1 else 2  # sums of a thread's two columns; with one row all are the same
    per_step = packed_words.inputs(format) // 2  # pairs of inputs
    per_thread = per_step // 4
    beginning = jnp.minimum(line, R - 1) * (steps * per_step) + quarter * per_thread
    rounds = pl.cdiv(steps, W * U)
    zero = jnp.zeros(W * _LANES, jnp.float32)
    mma = functools.partial(_mma, format=format, interpret=interpret)
    load = functools.partial(ptx.load_four, interpret=interpret)

    def step_of(i):
        """The warp's first step of round i."""
        return (i * W + warp) * U

    def read(i):
        """Words, scales and zero points of round i; zeros beyond the last round."""
        found = []
        for t in range(tuning.tiles):
            at = ((first + t) * steps + step_of(i)) * _LANES + lane
            some = [
                word
                for u in range(U)
                for word in load(
                    w, (at + u * _LANES) * packed_words.READ_WORDS, step_of(i) + u < steps
                )
            ]
            scales = [grouped(s_OS, t, half, i) for half in halves] if S > 1 else []
            zeros = [grouped(z_OS, t, half, i) for half in halves] if z_OS is not None else []
            found.append((some, scales, zeros))
        return found

    def grouped(ref, t: int, half: int, i):
        """A tile's scales or zero points for the warp's words of round i."""
        o = (first + t) * packed_words.tile(format) + line + half
        s = step_of(i) // steps_per_group if S > 1 else jnp.zeros_like(o)
        return triton.load(ref.at[o, s], mask=step_of(i) < steps, other=0)

    def inputs(step) -> list[list[jax.Array]]:
        """The rows' inputs, in pairs, that each word of a read is multiplied with."""
        at = beginning + step * per_step
        pairs = [pair for k in range(0, per_thread, 4) for pair in load(x, at + k, step < steps)]
        per_word = len(pairs) // packed_words.READ_WORDS
        return [pairs[k : k + per_word] for k in range(0, len(pairs), per_word)]

    def body(i, carry):
        totals, held = carry
        ahead = read(i + 1)
        x = [pairs for u in range(U) for pairs in inputs(step_of(i) + u)]
        if format == "int8" or z_OS is not None:
            sums_x = [zero] * 4
            for pairs in x:
                sums_x = mma(None, pairs, sums_x)
        out = []
        for (some, scales, zeros), total in zip(held, totals, strict=True):
            sums = [zero] * 4
            for word, pairs in zip(some, x, strict=True):
                sums = mma(word, pairs, sums)
            new = []
            for h in range(len(halves)):
                for c in range(columns):
                    if format == "int8":
                        part = sums[c] + 2 * sums[c + 2] - 4 * packed_words.BEGIN * sums_x[c]
                    else:
                        part = sums[c + 2 * h]
                    if format == "int4" and h == 1:
                        part = part * 0.125
                    if zeros:
                        part = part - zeros[h].astype(jnp.float32) * sums_x[c]
                    if scales:
                        part = part * scales[h].astype(jnp.float32)
                    new.append(total[h * columns + c] + part)
            out.append(new)
        return out, ahead

    totals = [[zero] * (len(halves) * columns) for _ in range(tuning.tiles)]
    totals, _ = jax.lax.fori_loop(0, rounds, body, (totals, read(0)))
    lane, quarter = jnp.arange(_LANES), jnp.arange(_LANES) % 4
    for t, total in enumerate(totals):
        for h, half in enumerate(halves):
            o = (first + t) * packed_words.tile(format) + lane // 4 + half
            for c in range(columns):
                y = jnp.sum(total[h * columns + c].reshape(W, _LANES), axis=0)
                if S == 1:
                    y = y * triton.load(s_OS.at[o, jnp.zeros_like(o)]).astype(jnp.float32)
                row = 2 * quarter + c
                triton.store(y_RO.at[row, o], y, mask=row < R)


def _mma(word, pairs, sums, *, format: str, interpret: bool) -> list[jax.Array]:
    """The sums plus a word's lines times the rows; lines of ones if `word` is None."""
    if interpret and word is None:
        lines = jnp.ones((pairs[0].shape[0] // _LANES, 16, 8 * len(pairs)), jnp.float32)
        return _emulated(lines, pairs, sums)
    if interpret:
        return _emulated(packed_words.lines(word.reshape(-1, _LANES), format), pairs, sums)
    text, integers = (
        (packed_words.SUMS, pairs)
        if word is None
        else (packed_words.assembly(format), [word, *pairs])
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * len(integers) + ["f"] * 4)
    return ptx.call(text, [*integers, *sums], constraints=constraints, like=sums)


def _emulated(lines_WLK, pairs, sums) -> list[jax.Array]:
    """The result of `mma`: lines [W, 16, K] times each warp's rows, held in pairs by threads."""
    halves = []
    for p in pairs:
        both = jax.lax.bitcast_convert_type(p, jnp.bfloat16).astype(jnp.float32)
        halves.append(both.reshape(-1, 8, 4, 2))  # warps, column, quarter, neighbour
    b_WNK = jnp.stack(halves, axis=2).reshape(halves[0].shape[0], 8, -1)
    c_WLN = jnp.einsum("wlk,wnk->wln", lines_WLK, b_WNK, precision="highest")
    c = c_WLN.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [old + new for old, new in zip(sums, c, strict=True)]
