"""Parameters as decoding reads them: layers apart, and kernels that share an input in one.

Decoding reads every weight at every token. A scan over stacked layers copies each layer's weights
before it uses them; and fewer, longer reads come nearer to what memory can give.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import fused_layers
from qwen_jax.decode.small_batch import step as few_rows
from qwen_jax.model import moe, stack, transformer
from qwen_jax.ops.quantized_matmul import packed_words_kernel
from qwen_jax.quant import array

Form = Literal["unstacked", "fused", "words"]


def best_form(
    layout: Layout | None = None, *, params: dict | None = None, num_rows: int | None = None
) -> Form:
    """The form that decodes fastest on this platform and mesh, and that these parameters can have.

    num_rows: the most rows that are decoded at one time, None for many.

    A TPU's tiles take a matrix's last two dimensions, which a fused kernel has more of: XLA would
    copy all of them at each dispatch. Where query heads are spread over devices and kv heads are
    not, a fused kernel would have to be on every device too. Quantised kernels can be fused if they
    are quantised alike, and their inputs are in order.
    """
    if sharding.platform(layout) == "tpu":
        return "unstacked"
    if layout is not None and layout.size("kv_heads") != layout.size("heads"):
        return "unstacked"
    stacks = [] if params is None else [params[name] for name in params if "layers" in name]
    if not all(fused_layers.can_fuse(part) for part in stacks):
        return "unstacked"
    few = num_rows is not None and num_rows <= packed_words_kernel.MOST_ROWS
    here = layout is None and jax.default_backend() == "gpu"
    return "words" if few and here and _any_quantised(params) else "fused"


def prepare(
    cfg: ModelConfig,
    params: dict,
    *,
    dtype: jnp.dtype,
    form: Form = "fused",
    layout: Layout | None = None,
) -> dict:
    """Stacked or unstacked parameters, cast and in the form asked for. Deletes their old arrays.

    unstacked: a tuple of layers. fused: that, with q, k, v in one kernel and gate, up in another,
    and output-major where the kernels for few rows can run (`small_batch/`). words: that, with
    the quantised matrices that few rows can be multiplied with in words (`quant/packed_words.py`).
    Peak memory is the parameters and a copy of the largest leaf.
    """
    if form not in get_args(Form):
        raise ValueError(f"unknown form {form!r}; known: {', '.join(get_args(Form))}")
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if _stays(path, x) else _cast(x, dtype=jnp.dtype(dtype)),
        params,
        is_leaf=array.is_quantised,
    )
    if not isinstance(params["layers"], tuple):
        params = unstack(cfg, params)
    if form == "unstacked":
        return params
    fuse, layers = {}, []
    for name, layer in zip(stack.order(cfg), params["layers"], strict=True):
        if name not in fuse:
            fuse[name] = _fuse(cfg, name, layer, dtype=dtype, layout=layout)
        layers.append(jax.block_until_ready(fuse[name](layer)))
        _delete(layer)
    params = {**params, "layers": tuple(layers)}
    assert form != "words" or layout is None, "matrices in words lie on one device"
    return _in_words(params, dtype=jnp.dtype(dtype)) if form == "words" else params


def _in_words(params: dict, *, dtype: jnp.dtype) -> dict:
    """Quantised matrices one by one in words. Deletes their old arrays."""

    def turned(x: jax.Array | array.QuantArray) -> jax.Array | array.QuantArray:
        if (
            not array.is_quantised(x)
            or packed_words_kernel.unsupported(x, rows=1, dtype=dtype) is not None
        ):
            return x
        made = jax.block_until_ready(_turn(x))
        _delete(x)
        return made

    return jax.tree.map(turned, params, is_leaf=array.is_quantised)


_turn = jax.jit(array.in_words)


def _any_quantised(params: dict | None) -> bool:
    return any(map(array.is_quantised, jax.tree.leaves(params, is_leaf=array.is_quantised)))


def shapes(cfg: ModelConfig, *, dtype: jnp.dtype, form: Form, layout: Layout) -> dict:
    """What `prepare` makes of the model's parameters, as shapes with their shardings."""

    def placed(part: dict, axes: dict) -> dict:
        return jax.tree_util.tree_map_with_path(
            lambda path, x, where: jax.ShapeDtypeStruct(
                x.shape, x.dtype if moe.stays_float32(path) else dtype, sharding=where
            ),
            part,
            sharding.shardings(axes, layout),
        )

    whole, axes = transformer.shapes(cfg), transformer.axes(cfg)
    layers = []
    for name in stack.order(cfg):
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), whole[name])
        of_layer = axes[name]
        if form == "fused":  # what is described here has no quantised matrices
            layer = jax.eval_shape(functools.partial(fused_layers.fuse, cfg), layer)
            of_layer = fused_layers.parts(cfg)[name].axes()
        layers.append(placed(layer, _without_layers(of_layer)))
    stacks = set(stack.order(cfg))
    others = {name: placed(part, axes[name]) for name, part in whole.items() if name not in stacks}
    return {**others, "layers": tuple(layers)}


def _without_layers(axes: dict) -> dict:
    """The axes of one layer of a stack."""
    return jax.tree.map(lambda axes: axes[1:], axes, is_leaf=sharding.is_axes)


def _fuse(
    cfg: ModelConfig, name: str, layer: dict, *, dtype: jnp.dtype, layout: Layout | None
) -> Callable:
    """The program that fuses layers of this stack, of which `layer` is one."""
    function = functools.partial(fused_layers.fuse, cfg)
    if layout is None:
        platform = jax.default_backend()
        reason = few_rows.why_not_model(cfg, dtype=dtype, layout=None, platform=platform)
        if reason is not None or _any_quantised(layer):
            return jax.jit(function)
        return jax.jit(lambda layer: fused_layers.output_major(function(layer)))
    axes = _without_layers(fused_layers.parts(cfg)[name].axes())
    placed = array.shardings(sharding.shardings(axes, layout), jax.eval_shape(function, layer))
    return jax.jit(function, out_shardings=placed)


def unstack(cfg: ModelConfig, params: dict) -> dict:
    """`params` with a tuple of per-layer dicts. Consumes the stacked arrays, leaf by leaf."""

    def apart(stacked: dict) -> list[dict]:
        leaves, tree = jax.tree.flatten(stacked)
        columns = []
        for leaf in leaves:
            columns.append(jax.block_until_ready(_split(leaf)))
            _delete(leaf)
        return [tree.unflatten(column) for column in zip(*columns, strict=True)]

    layers = tuple(stack.in_order(cfg, params, apart))
    others = {name: part for name, part in params.items() if name != "dense_layers"}
    return {**others, "layers": layers}


@jax.jit
def _split(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x[i] for i in range(x.shape[0]))


def _stays(path: tuple, x: jax.Array | array.QuantArray) -> bool:
    return array.is_quantised(x) or moe.stays_float32(path)


def _cast(x: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    if x.dtype == dtype:
        return x
    result = jax.block_until_ready(x.astype(dtype))
    _delete(x)
    return result


def _delete(tree: dict | jax.Array) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
