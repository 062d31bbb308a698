"""RMSNorm, Linear, Embed, SwiGLU: float32 parameters, arithmetic in the input's dtype."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from partitioning import gradients, sharding
from partitioning.sharding import Axes, Layout
from qwen_jax.model import module
from qwen_jax.ops.quantized_matmul import api as quantized_matmul
from qwen_jax.quant import array


def normal(stddev: float) -> module.Initializer:
    """The initialiser of every matrix: N(0, stddev^2), `initializer_range` of config.json."""
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def _zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    del key
    return jnp.zeros(shape, dtype)


def _ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    del key
    return jnp.ones(shape, dtype)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467, equation 4)."""

    def __init__(self, key: jax.Array, *, size: int, eps: float):
        self.scale = module.param(key, (size,), axes=("norm",), init=_ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        # float32 island: the mean of squares overflows bfloat16's precision, not its range.
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        normed = (x32 * inverse).astype(x.dtype)
        scale = self.scale[...].astype(x.dtype)
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Linear(nnx.Module):
    """y = x W + b, with the kernel input-major and shaped as the einsum reads it."""

    def __init__(
        self,
        key: jax.Array,
        *,
        shape: tuple[int, ...],
        axes: Axes,
        init: module.Initializer,
        bias_dims: int = 0,
    ):
        """The bias has the last `bias_dims` dimensions of the kernel; 0 means none."""
        self.kernel = module.param(key, shape, axes=axes, init=init)
        if bias_dims:
            self.bias = module.param(key, shape[-bias_dims:], axes=axes[-bias_dims:], init=_zeros)
        self.axes, self.has_bias = axes, bias_dims > 0

    def __call__(self, x: jax.Array, einsum: str, *, layout: Layout | None) -> jax.Array:
        """The product of x [B, T, ...] with the kernel by `einsum`, for example `btd,dnh->btnh`.

        The kernel may be quantised (`qwen_jax/quant`).
        """
        kernel = self.kernel.get_value()
        if array.is_quantised(kernel):
            y = quantized_matmul.contract(einsum, x, kernel, layout=layout)
        else:
            kernel = kernel.astype(x.dtype)
            y = gradients.scattered_einsum(einsum, x, kernel, axes=self.axes, layout=layout)
        if self.has_bias:
            bias = self.bias[...].astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class OutputMajorLinear(nnx.Module):
    """`Linear` with the kernel's outputs before its inputs."""

    def __init__(
        self,
        key: jax.Array,
        *,
        shape: tuple[int, ...],
        axes: Axes,
        init: module.Initializer,
        bias_dims: int = 0,
    ):
        """The bias has the first `bias_dims` dimensions of the kernel; 0 means none."""
        self.kernel = module.param(key, shape, axes=axes, init=init)
        if bias_dims:
            self.bias = module.param(key, shape[:bias_dims], axes=axes[:bias_dims], init=_zeros)
        self.has_bias = bias_dims > 0

    def __call__(self, x: jax.Array, einsum: str, *, layout: Layout | None) -> jax.Array:
        """The product of x with the kernel; `einsum` is `Linear`'s, for example `btd,dnh->btnh`."""
        assert layout is None, "output-major kernels lie on one device"
        of_x, result = einsum.split(",")[0], einsum.split("->")[1]
        reordered = f"{of_x},{result[2:]}{of_x[2:]}->{result}"
        y = jnp.einsum(reordered, x, self.kernel[...].astype(x.dtype))
        if self.has_bias:
            bias = self.bias[...].astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class Embed(nnx.Module):
    """Token embeddings [V, D]; the same table projects back where embeddings are tied."""

    def __init__(self, key: jax.Array, *, num_rows: int, size: int, init: module.Initializer):
        self.weight = module.param(key, (num_rows, size), axes=("vocab", "embed"), init=init)

    def __call__(
        self, tokens_BT: jax.Array, *, dtype: jnp.dtype, layout: Layout | None
    ) -> jax.Array:
        """Embeddings [B, T, D] of ids [B, T]; NaN for an id outside the table.

        With the table's columns over X = fsdp and Y = context, each device reads its columns for
        every token of its group: [B, T, D_XY] -> all-to-all -> [B, T_Y, D_X] -> all-to-all ->
        [B_X, T_Y, D]. The table, larger than a batch, is never gathered, nor is its gradient.
        """
        outer = ("outer_batch", "outer_length")
        tokens_BT = sharding.constrain(tokens_BT, outer, layout)
        rows = _rows(self.weight.get_value(), tokens_BT, dtype=dtype, layout=layout)
        # Constrained before the cast: XLA would move the rows uncast, which is twice the bytes.
        rows = sharding.constrain(rows, (*outer, "embed"), layout)
        # One axis at a time: for both at once, XLA would gather every token's row on every device.
        rows = sharding.constrain(rows, ("outer_batch", "length", "outer_embed"), layout)
        return sharding.constrain(rows, ("batch", "length", "act_embed"), layout)


def _rows(table_VD, tokens_BT: jax.Array, *, dtype: jnp.dtype, layout: Layout | None) -> jax.Array:
    """Rows of the table, which may be sharded over devices, by `array.take`.

    On a GPU, XLA turns the lookup of one row into a slice, for which it gathers a sharded table (1
    GB for a 7B). Looking the row up twice prevents that.
    """
    if tokens_BT.size > 1 or layout is None or layout.size("vocab") == 1:
        return array.take(table_VD, tokens_BT, dtype=dtype)
    return array.take(table_VD, jnp.tile(tokens_BT, (1, 2)), dtype=dtype)[:, :1]


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * x W_up) W_down (arXiv 2002.05202, section 2)."""

    def __init__(self, key: jax.Array, *, size: int, hidden: int, init: module.Initializer):
        key_gate, key_up, key_down = jax.random.split(key, 3)
        inward = functools.partial(Linear, shape=(size, hidden), axes=("embed", "ffn"), init=init)
        self.gate = inward(key_gate)
        self.up = inward(key_up)
        self.down = Linear(key_down, shape=(hidden, size), axes=("ffn", "embed"), init=init)

    def __call__(self, x_BTD: jax.Array, *, layout: Layout | None) -> jax.Array:
        gate_BTF = checkpoint_name(self.gate(x_BTD, "btd,df->btf", layout=layout), "mlp_gate")
        up_BTF = checkpoint_name(self.up(x_BTD, "btd,df->btf", layout=layout), "mlp_up")
        h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        h_BTF = sharding.constrain(h_BTF, ("batch", "length", "act_ffn"), layout)
        h_BTF = checkpoint_name(h_BTF, "mlp_hidden")
        return self.down(h_BTF, "btf,fd->btd", layout=layout)
