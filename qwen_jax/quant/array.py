"""Arrays of int8, int4 or fp8 (e4m3) values with scales, for matrices that are only multiplied.

w = (v - z) s. A scale s, and a zero point z if there is one, belongs to one output and a group of
inputs: all of them (per channel) or 32, 64, 128... of them. The dimensions that a product sums over
are merged into one, C; the others stay as they are. Shape suffixes: C inputs, S groups of inputs, O
outputs (one letter for all their dimensions).

int8: v in -127..127 (imported: -128..127). int4: v in -7..7 (imported: -8..7), stored as v + 8 in
half a byte; of each 32 inputs the first 16 are the low halves of 16 bytes and the last 16 the high
halves, so that neither unpacking nor a device's share of C splits a byte. fp8: float8_e4m3fn,
largest value 448. For decoding a small batch, a matrix may be stored in packed words instead,
outputs first (`in_words`, `packed_words.py`).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qwen_jax.quant import packed_words

Format = Literal["int8", "int4", "fp8"]
FORMATS: tuple[str, ...] = get_args(Format)
PACKED = 32  # int4 inputs that are packed together
INT4_OFFSET = 8
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


@dataclass(frozen=True)
class QuantArray:
    """A quantised matrix, or a stack of them; a pytree, so that it can be scanned and sharded.

    values [..., C, O...]: int8, float8_e4m3fn, or uint8 [..., C / 2, O...] of int4 pairs; packed
        words are uint32 [O..., C / 4], for int4 [O..., C / 8].
    scales [..., S, O...]: floating point. zeros: int8 of the same shape; None: all are 0.
    order [..., C]: int32, the input that each row of the values belongs to; None: the same order.
    axis: dimension of C, counted from the end: -2 in [C, O], -1 in an embedding [O, C] and in
        packed words.
    merged: number of dimensions of the plain matrix that C merges.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    order: jax.Array | None = None
    format: Format = "int8"
    axis: int = -2
    merged: int = 1

    @property
    def is_words(self) -> bool:
        """Whether the values are packed words, as from `in_words`."""
        return self.values.dtype == jnp.uint32

    @property
    def num_inputs(self) -> int:
        """Number of inputs, C."""
        per_stored = 2 if self.format == "int4" else 1
        if self.is_words:
            per_stored = 32 // packed_words.bits(self.format)
        return self.values.shape[self.axis] * per_stored

    @property
    def num_groups(self) -> int:
        """Number of groups of inputs, S."""
        return self.scales.shape[self.axis]

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale."""
        return self.num_inputs // self.num_groups

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain matrix, its inputs merged."""
        shape = list(self.values.shape)
        shape[self.axis] = self.num_inputs
        return tuple(shape)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the outputs' dimensions: those after C, or before C if C is the last."""
        place = self.values.ndim + self.axis
        return self.values.shape[:place] if self.axis == -1 else self.values.shape[place + 1 :]

    def children(self) -> dict[str, jax.Array]:
        """The arrays that are not None, by name."""
        named = {name: getattr(self, name) for name in CHILDREN}
        return {name: child for name, child in named.items() if child is not None}


CHILDREN = ("values", "scales", "zeros", "order")
jax.tree_util.register_dataclass(QuantArray, list(CHILDREN), ["format", "axis", "merged"])


def is_quantised(value: object) -> bool:
    """Whether `value` is a quantised array; used as `is_leaf` of trees that hold some."""
    return isinstance(value, QuantArray)


def check(format: str, *, num_inputs: int, group_size: int | None, what: str) -> None:
    """Raises `ValueError` for an unknown format, or a group size that does not fit the inputs."""
    if format not in FORMATS:
        raise ValueError(f"{what}: unknown format {format!r}; known: {', '.join(FORMATS)}")
    if format == "fp8" and group_size is not None:
        raise ValueError(f"{what}: fp8 has a scale a channel; leave group_size={group_size} out")
    if format == "int4" and num_inputs % PACKED:
        raise ValueError(f"{what}: int4 needs a multiple of {PACKED} inputs, not {num_inputs}")
    if group_size is None:
        return
    if group_size <= 0 or (format == "int4" and group_size % PACKED):
        raise ValueError(f"{what}: group_size={group_size} is not a multiple of {PACKED}")
    if num_inputs % group_size:
        raise ValueError(
            f"{what}: {num_inputs} inputs are no multiple of group_size={group_size}; use a "
            f"divisor of {math.gcd(num_inputs, 128)}, or a scale a channel"
        )


def quantise(
    w: jax.Array,
    *,
    format: Format,
    group_size: int | None = None,
    axis: int = -2,
    merged: int = 1,
    what: str = "array",
) -> QuantArray:
    """The quantised array of `w`: values are rounded to nearest, each group's largest is exact.

    axis: the last of the `merged` dimensions of inputs, counted from the end. group_size: inputs
    that share a scale; None: all of them. Scales are float32 per channel and bfloat16 per group,
    where a scale takes as much as 1/16 of the bytes.
    Raises `ValueError` as `check` does.
    """
    first, last = w.ndim + axis - merged + 1, w.ndim + axis
    w = w.reshape(*w.shape[:first], -1, *w.shape[last + 1 :])
    check(format, num_inputs=w.shape[axis], group_size=group_size, what=what)
    grouped = _split(w.astype(jnp.float32), axis, group_size or w.shape[axis])
    largest = jnp.max(jnp.abs(grouped), axis=axis, keepdims=True)
    scales = largest / _LARGEST[format]
    if group_size is not None:
        scales = scales.astype(jnp.bfloat16)
    # A group of zeros has scale 0; the divisor 1 avoids 0 / 0.
    divisor = jnp.where(scales == 0, 1.0, scales.astype(jnp.float32))
    values = _join(grouped / divisor, axis)
    return QuantArray(
        _encoded(values, format, axis),
        jnp.squeeze(scales, axis),
        format=format,
        axis=axis,
        merged=merged,
    )


def _encoded(values: jax.Array, format: Format, axis: int) -> jax.Array:
    """Scaled values as the format stores them."""
    limit = _LARGEST[format]
    values = jnp.clip(values, -limit, limit)
    if format == "fp8":
        return values.astype(jnp.float8_e4m3fn)
    whole = jnp.round(values).astype(jnp.int8)
    return whole if format == "int8" else pack(whole, axis=axis)


def pack(values: jax.Array, *, axis: int) -> jax.Array:
    """Bytes [..., C / 2, ...] of whole numbers -8..7 [..., C, ...]."""
    halves = (values + INT4_OFFSET).astype(jnp.uint8)
    halves = _split(_split(halves, axis, PACKED), axis, PACKED // 2)
    low, high = (jax.lax.index_in_dim(halves, i, halves.ndim + axis - 1, False) for i in (0, 1))
    return _join(low | (high << 4), axis)


def unpack(packed: jax.Array, *, axis: int, dtype: jnp.dtype) -> jax.Array:
    """Whole numbers [..., C, ...] as `dtype`: the inverse of `pack`."""
    grouped = _split(packed, axis, PACKED // 2)
    halves = jnp.concatenate([grouped & 0xF, grouped >> 4], axis=axis)
    return _join(halves, axis).astype(dtype) - jnp.asarray(INT4_OFFSET, dtype)


def whole(q: QuantArray, dtype: jnp.dtype) -> jax.Array:
    """The values v without scales, [..., C, O...] as `dtype`, which represents them exactly."""
    if q.is_words:
        return packed_words.unpack(q.values, q.format).astype(dtype)
    if q.format == "int4":
        return unpack(q.values, axis=q.axis, dtype=dtype)
    return q.values.astype(dtype)


def in_words(q: QuantArray) -> QuantArray:
    """One matrix [C, O...] or [O, C] in packed words [O..., C / 4 or C / 8]; scales [O..., S]."""
    values = whole(q, jnp.int8) if q.format == "int4" else q.values
    last = lambda x: None if x is None else jnp.moveaxis(x, q.axis, -1)  # noqa: E731
    return dataclasses.replace(
        q,
        values=packed_words.pack(last(values), q.format),
        scales=last(q.scales),
        zeros=last(q.zeros),
        axis=-1,
    )


def stored(q: QuantArray, dtype: jnp.dtype) -> jax.Array:
    """The matrix (v - z) s, computed in float32, as `dtype`; rows in the order of the values."""
    grouped = _split(whole(q, jnp.float32), q.axis, q.group_size)
    # In float32 v - z is exact; the product is rounded once, to the scale's precision or better.
    if q.zeros is not None:
        grouped = grouped - jnp.expand_dims(q.zeros, q.axis).astype(jnp.float32)
    scaled = grouped * jnp.expand_dims(q.scales, q.axis).astype(jnp.float32)
    return _join(scaled, q.axis).astype(dtype)


def dequantise(q: QuantArray, *, dtype: jnp.dtype) -> jax.Array:
    """The plain matrix [..., C, O...], rows in the order of the inputs."""
    w = stored(q, dtype)
    if q.order is None:
        return w
    back = jnp.argsort(q.order, axis=-1)
    after = -1 - q.axis
    between = w.ndim - back.ndim - after
    index = back.reshape(*back.shape[:-1], *(1,) * between, q.num_inputs, *(1,) * after)
    return jnp.take_along_axis(w, index, axis=q.axis)


def dequantised(kernel: QuantArray | jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """The plain matrix of a kernel, quantised or not; grouped products of experts take no other."""
    if is_quantised(kernel):
        return dequantise(kernel, dtype=dtype)
    return kernel.astype(dtype)


def take(table: QuantArray | jax.Array, index: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding [O, C], quantised or not; NaN for an index out of range."""
    fill = {"mode": "fill", "wrap_negative_indices": False}
    if not is_quantised(table):
        return jnp.asarray(table).at[index].get(fill_value=jnp.nan, **fill).astype(dtype)
    values, at = table.values, index
    if table.is_words:  # words are stored by tiles: the whole tile of a row is taken
        tile = packed_words.tile(table.format)
        values, at = values.reshape(-1, tile, values.shape[-1]), index // tile
    rows = dataclasses.replace(table, values=values.at[at].get(fill_value=0, **fill))
    rows = whole(rows, jnp.float32)
    if table.is_words:
        rows = jnp.take_along_axis(rows, (index % tile)[..., None, None], axis=-2)[..., 0, :]
    scales = table.scales.at[index].get(fill_value=jnp.nan, **fill).astype(jnp.float32)
    return (rows * scales).astype(dtype)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., C / size, size, O...] of [..., C, O...]; `axis`, from the end, is then that of size."""
    place = x.ndim + axis
    return x.reshape(*x.shape[:place], -1, size, *x.shape[place + 1 :])


def _join(x: jax.Array, axis: int) -> jax.Array:
    """[..., C, O...] of [..., C / size, size, O...]: the inverse of `_split`."""
    place = x.ndim + axis
    return x.reshape(*x.shape[: place - 1], -1, *x.shape[place + 1 :])


def with_outputs(q: QuantArray, outputs: tuple[int, ...]) -> QuantArray:
    """The same matrix with the outputs' dimensions reshaped."""
    last = q.axis == -1

    def reshaped(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        others = x.shape[-1:] if last else x.shape[: x.ndim + q.axis + 1]
        return x.reshape((*outputs, *others) if last else (*others, *outputs))

    return dataclasses.replace(
        q,
        values=reshaped(q.values),
        scales=reshaped(q.scales),
        zeros=reshaped(q.zeros),
        axis=-1 if last else -1 - len(outputs),
    )


def alike(kernels: Sequence[QuantArray | jax.Array]) -> bool:
    """Whether kernels of the same inputs are all plain, or can be given to `concatenate`."""
    if not any(map(is_quantised, kernels)):
        return True
    if not all(map(is_quantised, kernels)):
        return False
    kinds = {(q.format, q.num_groups, q.scales.dtype, q.zeros is None) for q in kernels}
    return len(kinds) == 1 and all(q.order is None for q in kernels)


def concatenate(kernels: Sequence[QuantArray]) -> QuantArray:
    """One kernel of the same inputs: the kernels joined along their last dimension but one.

    Raises `ValueError` for kernels that are not `alike`.
    """
    if not alike(kernels):
        raise ValueError(
            "kernels that are quantised in different ways, or whose inputs are in an order of "
            "their own (GPTQ's desc_act), cannot be fused; use form='unstacked'"
        )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *kernels)


def shardings(plain, like):
    """Shardings of the tree `like`, from `plain`, the shardings of the unquantised parameters.

    Raises `ValueError` if a mesh axis would split a group of inputs.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, sharding: (
            _sharding(sharding, leaf, what=jax.tree_util.keystr(path, simple=True, separator="."))
            if is_quantised(leaf)
            else sharding
        ),
        like,
        plain,
        is_leaf=is_quantised,
    )


def _sharding(plain: Sharding, q: QuantArray, *, what: str) -> QuantArray:
    """Shardings of the arrays of `q`: values as the plain kernel, scales with their outputs."""
    if not isinstance(plain, NamedSharding):
        return jax.tree.map(lambda _: plain, q)
    place, rank = q.values.ndim + q.axis, q.values.ndim + q.merged - 1
    entries = [*plain.spec, *[None] * (rank - len(plain.spec))]
    # The first of the merged dimensions varies slowest: a mesh axis over it splits C evenly.
    assert not any(entries[place + 1 : place + q.merged]), (what, plain)
    before, over, after = entries[:place], entries[place], entries[place + q.merged :]
    axes = (over,) if isinstance(over, str) else over or ()
    parts = math.prod(plain.mesh.shape[axis] for axis in axes)
    smallest = max(PACKED if q.format == "int4" else 1, q.group_size if q.num_groups > 1 else 1)
    if q.num_inputs % (parts * smallest):
        raise ValueError(
            f"{what}: mesh axis {'*'.join(axes)}={parts} would cut a group of {smallest} of its "
            f"{q.num_inputs} inputs; use a mesh axis that divides {q.num_inputs // smallest}, or "
            f"quantise with a smaller group_size"
        )
    named = lambda *entries: NamedSharding(plain.mesh, PartitionSpec(*entries))  # noqa: E731
    scales = named(*before, over if q.num_groups > 1 else None, *after)
    return dataclasses.replace(
        q,
        values=named(*before, over, *after),
        scales=scales,
        zeros=None if q.zeros is None else scales,
        order=None if q.order is None else named(*before, None),
    )
