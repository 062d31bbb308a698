"""The einsum of activations with a quantised matrix, in place of one with a plain matrix.

Three implementations give one result up to rounding. xla: XLA casts the values inside the product;
scales are applied to the product (one scale a channel) or to the values (one a group). gpu: a
Triton kernel that reads the values once for a small batch (`row_kernels.py`; for packed words
`packed_words_kernel.py`). dequantise: the whole matrix is dequantised first, then multiplied as an
ordinary one; the fastest for many rows, where arithmetic takes longer than reading.
"""

import jax
import jax.numpy as jnp

from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.ops import registry
from qwen_jax.ops.quantized_matmul import packed_words_kernel, row_kernels
from qwen_jax.quant import array
from qwen_jax.quant.array import QuantArray

MOST_ROWS = 64  # more rows are bound by arithmetic: the matrix is dequantised first


def contract(
    einsum: str,
    x: jax.Array,
    q: QuantArray,
    *,
    layout: Layout | None,
    implementation: str | None = None,
    preferred: jnp.dtype | None = None,
) -> jax.Array:
    """The product `jnp.einsum(einsum, x, matrix)` of x [B, T, inputs...], [B, T, outputs...].

    preferred: the result's dtype; x's dtype by default. Raises `ValueError` for an einsum of
    another form, and for a named implementation that cannot run.
    """
    _check(einsum, x, q)
    B, T = x.shape[:2]
    x_BTC = x.reshape(B, T, q.num_inputs)
    if q.order is not None:
        x_BTC = jnp.take(x_BTC, q.order, axis=-1)
    chosen = QUANTIZED_MATMUL.choose(
        q,
        rows=B * T,
        dtype=x.dtype,
        devices=1 if layout is None else layout.mesh.size,
        platform=sharding.platform(layout),
        name=implementation,
    )
    return chosen.compute(x_BTC, q).astype(preferred or x.dtype)


def _check(einsum: str, x: jax.Array, q: QuantArray) -> None:
    """Raises `ValueError` for an einsum that is not a product over all inputs."""
    inputs, result = einsum.split("->")
    x_letters, matrix_letters = inputs.split(",")
    summed = x_letters[2:]
    # Packed words have the outputs first, whatever the order of the plain matrix.
    letters = {summed + result[2:]} if q.axis != -1 or q.is_words else set()
    letters |= {result[2:] + summed} if q.axis == -1 else set()
    if len(x_letters) != x.ndim or x_letters[:2] != result[:2] or matrix_letters not in letters:
        raise ValueError(
            f"{einsum!r} does not sum over all dimensions of x except batch and length; quantised "
            f"kernels take no other product"
        )


def _einsum(x_BTC: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """The product of x [B, T, C] with w [C, O...], or w [O, C], summed in float32."""
    return jax.lax.dot_general(
        x_BTC,
        w,
        (((2,), (w.ndim + axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _xla(x_BTC: jax.Array, q: QuantArray) -> jax.Array:
    """The product with the values cast by XLA inside it, [B, T, O...] in float32."""
    if q.num_groups > 1 or q.zeros is not None:
        return _einsum(x_BTC, array.stored(q, x_BTC.dtype), q.axis)
    y = _einsum(x_BTC, array.whole(q, x_BTC.dtype), q.axis)
    scales = jnp.squeeze(q.scales, q.axis).astype(jnp.float32)
    return y * scales[None, None]


def _dequantise(x_BTC: jax.Array, q: QuantArray) -> jax.Array:
    """The product with the dequantised matrix, [B, T, O...] in float32."""
    # The barrier keeps XLA from fusing the two: the product is that of a plain matrix.
    w = jax.lax.optimization_barrier(array.stored(q, x_BTC.dtype))
    return _einsum(x_BTC, w, q.axis)


def _gpu(x_BTC: jax.Array, q: QuantArray) -> jax.Array:
    """The product by a Triton kernel, [B, T, O...] in float32."""
    B, T, C = x_BTC.shape
    flat, x_MC = array.with_outputs(q, (-1,)), x_BTC.reshape(B * T, C)
    multiply = packed_words_kernel.multiply if q.is_words else row_kernels.multiply
    return multiply(x_MC, flat).reshape(B, T, *q.outputs)


# A call is described by q, the quantised matrix, the number of rows of x, x's dtype, and the number
# of devices of the mesh.


def _unsupported_by_kernels(
    q: QuantArray, *, rows: int, dtype: jnp.dtype, devices: int
) -> str | None:
    """The reason why no kernel multiplies so many rows with the matrix; None: one does."""
    kernels = packed_words_kernel if q.is_words else row_kernels
    return kernels.unsupported(q, rows=rows, dtype=dtype)


def _kernels_not_preferred(
    q: QuantArray, *, rows: int, dtype: jnp.dtype, devices: int
) -> str | None:
    """The reason why the kernels are not chosen: XLA cannot partition them over a mesh."""
    return None if devices == 1 else f"there are {devices} devices"


def _xla_not_preferred(q: QuantArray, *, rows: int, dtype: jnp.dtype, devices: int) -> str | None:
    """The reason why the whole matrix is dequantised first.

    Callers who ask for float32 want results that do not depend on the number of rows.
    """
    if rows > MOST_ROWS:
        return f"{rows} rows are bound by arithmetic, more than {MOST_ROWS}"
    if jnp.dtype(dtype) == jnp.float32:
        return "float32 results are to be the same for any number of rows"
    return "values are in packed words" if q.is_words else None


QUANTIZED_MATMUL = registry.Operation(
    "quantized_matmul",
    (
        registry.Implementation(
            name="gpu",
            platforms=("gpu",),
            unsupported=_unsupported_by_kernels,
            not_preferred=_kernels_not_preferred,
            elsewhere="by name",
            compute=_gpu,
        ),
        registry.Implementation(name="xla", not_preferred=_xla_not_preferred, compute=_xla),
        registry.Implementation(name="dequantise", compute=_dequantise),
    ),
)
