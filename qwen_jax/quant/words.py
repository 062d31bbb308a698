"""Quantised values in words of 32 bits, as a GPU reads them fastest for one row.

A word holds 4 values, of int4 8, and 4 words are a piece, what a thread reads at once: 16 values,
of int4 32. Word e of a piece has its values e, 4 + e, 8 + e and so on, lowest bits first, so that
the inputs that go with one place of 4 words are neighbours. Whole numbers v are kept as v + 128,
of int4 as v + 8; fp8 as its bits.
"""

import jax
import jax.numpy as jnp

PER_PIECE = 4  # words

# A whole number v is read as 1 + n / 2^bits, n as stored: its bits under the exponent of 1. Of both
# formats v = 0 is then 1.5, and v is the difference times 2^bits.
BEGIN = 1.5
ONE = 0x3F800000


def bits(format: str) -> int:
    """Of a value."""
    return 4 if format == "int4" else 8


def per_piece(format: str) -> int:
    """Values of a piece."""
    return PER_PIECE * 32 // bits(format)


def pack(values: jax.Array, format: str) -> jax.Array:
    """Values [..., C], whole numbers or float8_e4m3fn -> words [..., C / 4], of int4 C / 8."""
    if format == "fp8":
        stored = jax.lax.bitcast_convert_type(values, jnp.uint8)
    else:
        stored = values.astype(jnp.int32) + (1 << (bits(format) - 1))
    shape = (*values.shape[:-1], -1, 32 // bits(format), PER_PIECE)
    pieces = stored.astype(jnp.uint32).reshape(shape)
    of_place = jnp.arange(0, 32, bits(format), dtype=jnp.uint32)
    shifts = jax.lax.broadcast_in_dim(of_place, pieces.shape, (pieces.ndim - 2,))
    return jnp.sum(pieces << shifts, axis=-2, dtype=jnp.uint32).reshape(*values.shape[:-1], -1)


def unpack(words: jax.Array, format: str) -> jax.Array:
    """The inverse of `pack`, exactly, in float32."""
    pieces = words.reshape(*words.shape[:-1], -1, PER_PIECE)
    if format == "fp8":
        found = places(pieces, format)
    else:
        found = [(v - BEGIN) * (1 << bits(format)) for v in places(pieces, format)]
    return jnp.stack(found, axis=-2).reshape(*words.shape[:-1], -1)


def places(words: jax.Array, format: str, *, one: jax.Array | int = ONE) -> list[jax.Array]:
    """For each place of the words, v of fp8 and `BEGIN` + v / 2^bits of the others, in float32.

    one: `ONE`, of a kernel in a register: an instruction takes but one constant.
    """
    if format == "fp8":
        return [_fp8(_shifted(words, -place)) for place in range(0, 32, 8)]
    width = bits(format)
    mantissa = jnp.uint32(((1 << width) - 1) << (23 - width))
    found = [
        (_shifted(words, 23 - width - place) & mantissa) | jnp.uint32(one)
        for place in range(0, 32, width)
    ]
    return [jax.lax.bitcast_convert_type(v, jnp.float32) for v in found]


def _fp8(words: jax.Array) -> jax.Array:
    stored = (words & jnp.uint32(0xFF)).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn).astype(jnp.float32)


def _shifted(words: jax.Array, left: int) -> jax.Array:
    """Shifted left, or right where that is negative."""
    return words << jnp.uint32(left) if left >= 0 else words >> jnp.uint32(-left)
