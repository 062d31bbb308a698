"""The einsum of activations with a quantised kernel.

Three ways, one result up to rounding. xla: values are cast where they are multiplied, scales are
applied to the product (a scale a channel) or to the values (a scale a group). gpu: a kernel that
reads values once for a few rows (`kernels.py`; in words `words_kernel.py`). dequantise: the whole
matrix first, then an ordinary product, the fastest for many rows, where arithmetic and not reading
is what takes time.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from partitioning.sharding import Layout
from qwen_jax.ops.quantized_matmul import packed_words_kernel, row_kernels
from qwen_jax.quant import array
from qwen_jax.quant.array import QuantArray

Implementation = Literal["xla", "gpu", "dequantise"]
MOST_ROWS = 64  # more are bound by arithmetic, and go through an ordinary product


def choose(q: QuantArray, *, rows: int, dtype: jnp.dtype, layout: Layout | None) -> Implementation:
    """The fastest that runs here for so many rows; in float32 the same for any number of them.

    Who asks for float32 wants answers that do not depend on how many rows there are.
    """
    platform = jax.default_backend() if layout is None else layout.platform
    if rows > MOST_ROWS or jnp.dtype(dtype) == jnp.float32:
        return "dequantise"
    alone = layout is None or layout.mesh.size == 1
    if platform == "gpu" and alone and _why_not(q, rows=rows, dtype=dtype) is None:
        return "gpu"
    return "dequantise" if q.is_words else "xla"


def _why_not(q: QuantArray, *, rows: int, dtype: jnp.dtype) -> str | None:
    """Why no kernel multiplies so many rows; None if one does."""
    if not q.is_words:
        return row_kernels.why_not(q, rows=rows, dtype=dtype)
    return packed_words_kernel.why_not(q, rows=rows, dtype=dtype)


def contract(
    einsum: str,
    x: jax.Array,
    q: QuantArray,
    *,
    layout: Layout | None,
    implementation: Implementation | None = None,
    preferred: jnp.dtype | None = None,
) -> jax.Array:
    """`jnp.einsum(einsum, x, kernel)` of x [B, T, inputs...] -> [B, T, outputs...].

    As `preferred`, x's dtype by default. Raises `ValueError` for an einsum of another form, and for
    a named implementation that cannot run.
    """
    _check(einsum, x, q)
    B, T = x.shape[:2]
    x_BTC = x.reshape(B, T, q.num_inputs)
    if q.order is not None:
        x_BTC = jnp.take(x_BTC, q.order, axis=-1)
    if implementation is None:
        implementation = choose(q, rows=B * T, dtype=x.dtype, layout=layout)
    compute = {"xla": _xla, "gpu": _gpu, "dequantise": _dequantise}
    if implementation not in compute:
        raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(compute)}")
    return compute[implementation](x_BTC, q).astype(preferred or x.dtype)


def _check(einsum: str, x: jax.Array, q: QuantArray) -> None:
    inputs, result = einsum.split("->")
    of_x, of_kernel = inputs.split(",")
    summed = of_x[2:]
    # Words have their outputs first whatever the kernel had.
    letters = {summed + result[2:]} if q.axis != -1 or q.is_words else set()
    letters |= {result[2:] + summed} if q.axis == -1 else set()
    if len(of_x) != x.ndim or of_x[:2] != result[:2] or of_kernel not in letters:
        raise ValueError(
            f"{einsum!r} does not sum over all of x but batch and length; quantised kernels take "
            f"no other product"
        )


def _einsum(x_BTC: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """Float32 sums of x [B, T, C] with w [C, O...], or w [O, C]."""
    return jax.lax.dot_general(
        x_BTC,
        w,
        (((2,), (w.ndim + axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _xla(x_BTC: jax.Array, q: QuantArray) -> jax.Array:
    if q.num_groups > 1 or q.zeros is not None:
        return _einsum(x_BTC, array.stored(q, x_BTC.dtype), q.axis)
    y = _einsum(x_BTC, array.whole(q, x_BTC.dtype), q.axis)
    scales = jnp.squeeze(q.scales, q.axis).astype(jnp.float32)
    return y * scales[None, None]


def _dequantise(x_BTC: jax.Array, q: QuantArray) -> jax.Array:
    # Kept apart, so that the product is the one of an ordinary kernel.
    w = jax.lax.optimization_barrier(array.stored(q, x_BTC.dtype))
    return _einsum(x_BTC, w, q.axis)


def _gpu(x_BTC: jax.Array, q: QuantArray) -> jax.Array:
    B, T, C = x_BTC.shape
    if (reason := _why_not(q, rows=B * T, dtype=x_BTC.dtype)) is not None:
        raise ValueError(f"the kernel of quantised products cannot run: {reason}")
    flat, x_MC = array.with_outputs(q, (-1,)), x_BTC.reshape(B * T, C)
    multiply = packed_words_kernel.multiply if q.is_words else row_kernels.multiply
    return multiply(x_MC, flat).reshape(B, T, *q.outputs)
