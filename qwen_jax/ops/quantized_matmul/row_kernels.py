"""Products of up to 64 rows with a quantised matrix on one GPU: a Pallas kernel, lowered by Triton.

Decoding reads every weight once a token, so the kernel's only aim is to read the quantised bytes at
the memory's rate. Outputs and inputs are split into blocks. A program computes one block of outputs
over its part of the inputs, and the parts' sums are added afterwards: without parts, a matrix as
small as 3,584 x 3,584 would occupy a fifth of the multiprocessors. One row is multiplied on the
ordinary units in float32, several rows by the tensor cores in bfloat16 with float32 sums. int4
values become floating point by their bits: under the exponent of 2^7 (bfloat16) or 2^23 (float32) a
mantissa of n is 2^7 + n or 2^23 + n, which saves the conversion.

Shapes: M rows, C inputs, O outputs, S groups, P parts.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.quant import array
from qwen_jax.quant.array import QuantArray

_MAGIC = {  # dtype: (its bits as integers, bits of the power of two, the power)
    jnp.dtype(jnp.bfloat16): (jnp.uint16, 0x4300, 128.0),
    jnp.dtype(jnp.float32): (jnp.uint32, 0x4B000000, 8388608.0),
}
_LEAST_ROWS = 16  # fewest rows of a tensor core's product
_MOST_ROWS = 64
_WANTED_PROGRAMS = 512  # about four for each multiprocessor of an H100


@dataclass(frozen=True)
class Blocks:
    """Sizes of a product: outputs and inputs of a block, parts of the inputs, warps, stages."""

    outputs: int
    inputs: int
    parts: int
    warps: int = 4
    stages: int = 4


def unsupported(q: QuantArray, *, rows: int, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot multiply so many rows with the matrix; None: it can."""
    outputs = math.prod(q.outputs)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies bfloat16, not {jnp.dtype(dtype).name}"
    if rows > _MOST_ROWS:
        return f"it takes at most {_MOST_ROWS} rows, not {rows}"
    if q.axis == -1 and (q.format == "int4" or q.num_groups > 1):
        return "it takes an embedding only as int8 or fp8 with one scale a row"
    if q.values.ndim != len(q.outputs) + 1:
        return "it takes one matrix, not a stack"
    if outputs % 64 or q.num_inputs % 64 or q.group_size % 32:
        return (
            f"outputs and inputs must be multiples of 64, and groups of 32, not {outputs}, "
            f"{q.num_inputs} and {q.group_size}"
        )
    return None


def default_blocks(q: QuantArray, *, rows: int) -> Blocks:
    """Blocks for a matrix [C, O] or [O, C] and so many rows."""
    outputs = q.values.shape[-1 if q.axis == -2 else 0]
    inputs = _power(q.group_size, 128) if q.num_groups > 1 else _power(q.num_inputs, 128)
    columns = _power(outputs, 128 if outputs >= 16384 else 64)
    steps = q.num_inputs // inputs
    wanted = max(1, _WANTED_PROGRAMS * columns // outputs)
    # Parts' float32 sums are written and read: they may take a quarter of the values' bytes.
    limit = max(1, q.num_inputs // (32 * rows))
    even = [n for n in range(1, steps + 1) if steps % n == 0 and n <= limit]
    parts = next((n for n in even if n >= wanted), even[-1])
    return Blocks(outputs=columns, inputs=inputs, parts=parts)


def _power(n: int, limit: int) -> int:
    """The largest power of two that divides n and is at most `limit`."""
    return min(n & -n, limit)


def multiply(
    x_MC: jax.Array, q: QuantArray, *, blocks: Blocks | None = None, interpret: bool | None = None
) -> jax.Array:
    """The product of x [M, C] with the matrix of `q`, [M, O] in float32.

    The matrix is [C, O], or [O, C] with axis -1. The caller has applied `q.order` to x. interpret:
    run Pallas's interpreter; None: only without a GPU.
    """
    M, C = x_MC.shape
    blocks = blocks or default_blocks(q, rows=M)
    columns, step, parts = blocks.outputs, blocks.inputs, blocks.parts
    packed = 2 if q.format == "int4" else 1
    major = q.axis == -1
    O = q.values.shape[0 if major else -1]  # noqa: E741 (outputs)
    rows = 1 if M == 1 else max(_LEAST_ROWS, 1 << (M - 1).bit_length())
    assert C % (step * parts) == 0 and O % columns == 0, (C, O, blocks)
    x = jnp.pad(x_MC, ((0, rows - M), (0, 0)))
    if packed == 2:
        # The order of the packed bytes: inputs of the low halves, then those of the high halves.
        halves = x.reshape(rows, C // array.PACKED, 2, array.PACKED // 2)
        x = halves.transpose(2, 0, 1, 3).reshape(2 * rows, C // 2)
    here, stored = C // parts, C // parts // packed
    groups = q.num_groups if q.num_groups > 1 else 1

    def weights(j, i):
        return (j, i) if major else (i, j)

    shape = (columns, stored) if major else (stored, columns)
    in_specs = [
        pl.BlockSpec((x.shape[0], stored), lambda j, i: (0, i)),
        pl.BlockSpec(shape, weights),
        pl.BlockSpec((groups, columns), lambda j, i: (0, j)),
    ]
    scales_SO = q.scales.T if major else q.scales
    operands = [x, q.values, scales_SO]
    if q.zeros is not None:
        in_specs.append(pl.BlockSpec((groups, columns), lambda j, i: (0, j)))
        operands.append(q.zeros)
    kernel = functools.partial(
        _kernel,
        rows=rows,
        blocks=blocks,
        format=q.format,
        steps=here // step,
        steps_per_group=q.group_size // step if groups > 1 else None,
        major=major,
        has_zeros=q.zeros is not None,
    )
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    options = {} if interpret else {"compiler_params": _compiler_params(blocks)}
    y_PMO = pl.pallas_call(
        kernel,
        grid=(O // columns, parts),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((1, rows, columns), lambda j, i: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, O), jnp.float32),
        interpret=interpret,
        name=f"quantised_{q.format}_{rows}",
        **options,
    )(*operands)
    return jnp.sum(y_PMO, axis=0)[:M]


def _compiler_params(blocks: Blocks):
    """Triton's options."""
    return triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


def _kernel(
    x_ref, w_ref, s_ref, *refs, rows, blocks, format, steps, steps_per_group, major, has_zeros
):
    """Kernel body: one block of outputs over one part of the inputs."""
    z_ref, y_ref = refs if has_zeros else (None, *refs)
    packed = 2 if format == "int4" else 1
    length = blocks.inputs // packed
    narrow = jnp.float32 if rows == 1 else jnp.bfloat16
    first = pl.program_id(1) * steps

    def product(i, zeros):
        """Products of step i, [rows, outputs]; for one row the terms, which are summed later."""
        here = pl.ds(i * length, length)
        w = w_ref[:, here] if major else w_ref[here, :]
        total = None
        for half, values in enumerate(_floats(w, format, narrow)):
            if zeros is not None:
                values = values - zeros.astype(narrow)[None, :]
            x = x_ref[pl.ds(half * rows, rows), here]
            part = _times(x, values, major=major)
            total = part if total is None else total + part
        return total

    def step(i, total):
        if steps_per_group is None:
            zeros = None if z_ref is None else z_ref[0, :]
            return total + product(i, zeros)
        group = (first + i) // steps_per_group
        zeros = None if z_ref is None else z_ref[group, :]
        scale = s_ref[group, :].astype(jnp.float32)
        return total + product(i, zeros) * scale[None, :]

    if rows == 1:
        shape = (blocks.outputs, length) if major else (length, blocks.outputs)
    else:
        shape = (rows, blocks.outputs)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros(shape, jnp.float32))
    if rows == 1:
        total = jnp.sum(total, axis=1 if major else 0)[None, :]
    if steps_per_group is None:
        total = total * s_ref[0, :].astype(jnp.float32)[None, :]
    y_ref[0, :, :] = total


def _floats(w, format: str, dtype):
    """Exact values of a block, as `dtype`; for int4 those of the low and of the high halves."""
    if format != "int4":
        return (w.astype(dtype),)
    bits, magic, power = _MAGIC[jnp.dtype(dtype)]
    wide = w.astype(bits)
    offset = jnp.asarray(power + array.INT4_OFFSET, dtype)
    return tuple(
        jax.lax.bitcast_convert_type(half | bits(magic), dtype) - offset
        for half in (wide & bits(0xF), wide >> bits(4))
    )


def _times(x, w, *, major: bool):
    """The product of rows x [rows, c] with w; for one row the terms, not yet summed over c."""
    if x.shape[0] > 1:
        summed = (((1,), (1 if major else 0,)), ((), ()))
        return jax.lax.dot_general(x, w, summed, preferred_element_type=jnp.float32)
    x = x[0, :].astype(jnp.float32)
    return w * (x[None, :] if major else x[:, None])
