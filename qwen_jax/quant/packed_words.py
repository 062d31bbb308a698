"""Quantised values packed into 32-bit words, in the order in which a GPU's matrix units take them.

A warp multiplies 16 lines of a matrix with 8 rows at once (`mma`, PTX ISA, "Matrix Fragments for
mma.m16n8k16"). A word holds the values that one of its 32 threads supplies: thread 4 g + q those of
lines g and g + 8. For int4 a byte holds one input of two outputs, low half first, as v + 8. For
int8 it holds one output, as v + 128, whose halves count as two lines. For fp8 it holds the value's
bits, and a word has the values of both lines. The words of a `tile` of outputs are stored in the
order in which its warp reads them: four for each thread, 16 bytes, for 16 neighbouring inputs
(fp8: 8).

Letters: C inputs, O outputs.
"""

import jax
import jax.numpy as jnp

LANES = 32
READ_WORDS = 4  # words that a thread reads at once, each for one `mma`
# Halves n of a byte are read as bfloat16, the low one as BEGIN + n and the high one as BEGIN + 8 n.
BEGIN = 128.0
_BEGIN = 0x43004300  # BEGIN in bfloat16, twice
_TAKEN = 0x43084308, 0x43404340  # subtracted from int4, twice: v and 8 v are left
_SHIFTS = ((0, 8), (16, 24))  # of neighbouring inputs in a word, and of the bytes of each
_LOW, _HIGH = 0x000F000F, 0x00780078
_FP8_SCALE = 0x7B807B80  # 2^120, twice: what the exponents of e4m3 and bfloat16 differ by


def bits(format: str) -> int:
    """Number of bits of a value."""
    return 4 if format == "int4" else 8


def tile(format: str) -> int:
    """Number of outputs whose words are stored together."""
    return 8 if format == "int8" else 16


def inputs(format: str) -> int:
    """Number of inputs of a tile that a warp reads at once: `READ_WORDS` words a thread."""
    return 32 if format == "fp8" else 64


def unsupported(format: str, *, num_outputs: int, num_inputs: int) -> str | None:
    """The reason why a matrix cannot be packed; None: it can."""
    if num_outputs % tile(format) == 0 and num_inputs % inputs(format) == 0:
        return None
    return (
        f"in words {format} has multiples of {tile(format)} outputs and {inputs(format)} inputs, "
        f"not {num_outputs} and {num_inputs}"
    )


def pack(values: jax.Array, format: str) -> jax.Array:
    """Words [O..., C / 4], for int4 [O..., C / 8], of values [O..., C].

    Values are whole numbers or float8_e4m3fn; O and C are multiples of `tile` and `inputs`.
    """
    *outputs, C = values.shape
    if format == "fp8":
        stored = jax.lax.bitcast_convert_type(values, jnp.uint8)
    else:
        stored = values.astype(jnp.int32) + (1 << (bits(format) - 1))
    stored = stored.astype(jnp.uint32).reshape(-1, tile(format), C)
    blocks = C // inputs(format)
    if format == "int4":
        stored = stored[:, :8] | (stored[:, 8:] << 4)
    if format == "fp8":
        # [tiles, line's half, g, blocks, q, word, neighbour] -> the bytes of thread 4 g + q
        parts = stored.reshape(-1, 2, 8, blocks, 4, READ_WORDS, 2).transpose(0, 3, 2, 4, 5, 6, 1)
    else:
        # [tiles, g, blocks, q, word, input's half, neighbour]
        parts = stored.reshape(-1, 8, blocks, 4, READ_WORDS, 2, 2).transpose(0, 2, 1, 3, 4, 6, 5)
    shifts = jnp.asarray(_SHIFTS, jnp.uint32)
    shifts = jax.lax.broadcast_in_dim(shifts, parts.shape, (parts.ndim - 2, parts.ndim - 1))
    return jnp.sum(parts << shifts, axis=(-2, -1), dtype=jnp.uint32).reshape(*outputs, -1)


def unpack(words: jax.Array, format: str) -> jax.Array:
    """The values of words, [O..., C]: int32, for fp8 float32. The inverse of `pack`."""
    outputs = words.shape[:-1]
    C = words.shape[-1] * 32 // bits(format)
    threads = words.reshape(-1, C // inputs(format), 8, 4, READ_WORDS)
    shifts = jnp.asarray(_SHIFTS, jnp.uint32)
    parts = (threads[..., None, None] >> jnp.broadcast_to(shifts, (*threads.shape, 2, 2))) & 0xFF
    if format == "fp8":
        stored = parts.transpose(0, 6, 2, 1, 3, 4, 5).reshape(-1, 16, C).astype(jnp.uint8)
        values = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn).astype(jnp.float32)
        return values.reshape(*outputs, C)
    stored = parts.transpose(0, 2, 1, 3, 4, 6, 5).reshape(-1, 8, C)
    if format == "int4":
        stored = jnp.concatenate([stored & 0xF, stored >> 4], axis=1)
    return stored.astype(jnp.int32).reshape(*outputs, C) - (1 << (bits(format) - 1))


def assembly(format: str) -> str:
    """PTX code of one `mma`: {sums} = a word's lines times the rows + {sums}.

    Operands: $0 to $3 the new sums, $4 the word, then the rows' inputs (one register of fp8, two of
    the others), then the old sums.
    """
    if format == "fp8":
        prepare = (
            "and.b32 t0, $4, 0x00800080; shl.b32 t0, t0, 8;"
            "shl.b32 t1, $4, 4; lop3.b32 a0, t1, 0x07F007F0, t0, 0xEA;"
            "and.b32 t2, $4, 0x80008000;"
            "shr.u32 t3, $4, 4; lop3.b32 a1, t3, 0x07F007F0, t2, 0xEA;"
            f"mov.b32 t0, {_FP8_SCALE:#x};"
            "mul.rn.bf16x2 a0, a0, t0; mul.rn.bf16x2 a1, a1, t0;"
        )
        return _block(prepare, "m16n8k8", "{a0, a1}", "{$5}", "{$6, $7, $8, $9}")
    prepare = ""
    for i, (shift, high) in enumerate(((0, 0), (1, 1), (8, 0), (9, 1))):
        mask = _HIGH if high else _LOW
        prepare += f"shr.u32 t{i}, $4, {shift}; lop3.b32 a{i}, t{i}, {mask:#x}, {_BEGIN:#x}, 0xEA;"
        if format == "int4":
            prepare += f"mov.b32 t{i}, {_TAKEN[high]:#x}; sub.rn.bf16x2 a{i}, a{i}, t{i};"
    return _block(prepare, "m16n8k16", "{a0, a1, a2, a3}", "{$5, $6}", "{$7, $8, $9, $10}")


# Sums of the rows' inputs, in every line: operands as above, without the word.
SUMS = (
    "{ .reg .b32 one; mov.b32 one, 0x3F803F80;"
    " mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    " {$0, $1, $2, $3}, {one, one, one, one}, {$4, $5}, {$6, $7, $8, $9}; }"
)


def _block(prepare: str, shape: str, a: str, b: str, c: str) -> str:
    product = (
        f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32 {{$0, $1, $2, $3}}, {a}, {b}, {c};"
    )
    return f"{{ .reg .b32 a0, a1, a2, a3, t0, t1, t2, t3; {prepare} {product} }}"


def lines(words: jax.Array, format: str) -> jax.Array:
    """The lines that `assembly` makes of a warp's words [..., 32], [..., 16, inputs] in float32."""
    w = words.reshape(*words.shape[:-1], 8, 4)
    if format == "fp8":
        bytes_ = [(w >> shift) & 0xFF for shift in (0, 8, 16, 24)]
        values = [
            jax.lax.bitcast_convert_type(b.astype(jnp.uint8), jnp.float8_e4m3fn).astype(jnp.float32)
            for b in bytes_
        ]
        first, second = (jnp.stack(values[i::2], axis=-1) for i in (0, 1))  # [..., g, q, neighbour]
        both = jnp.stack([first, second], axis=-4)
        return both.reshape(*words.shape[:-1], 16, 8)
    begin = (-8.0, -64.0) if format == "int4" else (BEGIN, BEGIN)
    half = lambda shift, unit, first: first + unit * ((w >> shift) & 0xF).astype(jnp.float32)  # noqa: E731
    found = []
    for line, *affine in ((0, 1.0, begin[0]), (4, 8.0, begin[1])):
        parts = [
            jnp.stack([half(line + k, *affine), half(line + k + 16, *affine)], axis=-1)
            for k in (0, 8)
        ]
        found.append(jnp.stack(parts, axis=-3))  # [..., g, input's half, q, neighbour]
    return jnp.stack(found, axis=-5).reshape(*words.shape[:-1], 16, 16)
