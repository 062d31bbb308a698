"""Parameters as decoding reads them: layers apart, and kernels that share an input in one.

Decoding reads every weight at every token. A scan over stacked layers would copy each layer's
weights before it uses them, and fewer, longer reads use more of the memory's bandwidth.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import fused_layers
from qwen_jax.decode.small_batch import support
from qwen_jax.model import module, moe, stack, transformer
from qwen_jax.ops.quantized_matmul import packed_words_kernel
from qwen_jax.quant import array

Form = Literal["unstacked", "fused", "output_major", "packed"]

_BLOCKS = {
    "unstacked": (transformer.Block, transformer.SparseBlock),
    "fused": (fused_layers.Block, fused_layers.SparseBlock),
    "output_major": (fused_layers.OutputMajorBlock, None),
    "packed": (fused_layers.Block, fused_layers.SparseBlock),
}


@dataclass(frozen=True)
class DecodeWeights:
    """A model's parameters in one form: a pytree whose form is static. `prepare` makes it.

    Programs choose the code of a layer by `form` alone, never by what the arrays look like. New
    parameters in the form, shapes, dtypes and shardings of old ones compile no program again.

    form: the arrangement of the layers' arrays (a `layout` is always a mesh's).
        unstacked: each layer as `qwen_jax/model/transformer.py` has it.
        fused: q, k, v in one kernel, and gate, up in another (`fused_layers.py`).
        output_major: fused, every kernel's outputs before its inputs (`small_batch/`). Dense models
            without quantised matrices, on one device.
        packed: fused, quantised matrices in 32-bit words where they can be
            (`qwen_jax/quant/packed_words.py`). On one device.
    params: `embed`, `norm` and where it is not tied `lm_head`, as the model has them; `layers` is a
        tuple of one tree a layer.
    """

    form: Form
    params: dict

    @property
    def layers(self) -> tuple[dict, ...]:
        """Every layer's parameters, first to last."""
        return self.params["layers"]

    def blocks(self, cfg: ModelConfig) -> tuple[module.Definition, ...]:
        """Every layer's definition in this form, first to last; layers of one stack share one."""
        defined = blocks(cfg, self.form)
        return tuple(defined[name] for name in stack.order(cfg))


jax.tree_util.register_dataclass(DecodeWeights, ["params"], ["form"])


@functools.lru_cache(maxsize=64)
def blocks(cfg: ModelConfig, form: Form) -> dict[str, module.Definition]:
    """The definition of a layer of each stack, by the stack's name."""
    return transformer.stacks(cfg, *_BLOCKS[form])


def best_form(
    cfg: ModelConfig,
    *,
    dtype: jnp.dtype,
    layout: Layout | None = None,
    params: dict | None = None,
    num_rows: int | None = None,
) -> Form:
    """The form that decodes fastest on this platform and mesh, and that these parameters can have.

    dtype: of the arithmetic. params: stacked; None stands for plain ones. num_rows: the most rows
    that are decoded at one time, None for many.

    A TPU's tiles take a matrix's last two dimensions, which a fused kernel has more of: XLA would
    copy all of them at each dispatch. Where query heads are spread over devices and kv heads are
    not, a fused kernel would have to be on every device too. Quantised kernels can be fused if they
    are quantised alike, and their inputs are in order.
    """
    platform = sharding.platform(layout)
    if platform == "tpu":
        return "unstacked"
    if layout is not None and layout.size("kv_heads") != layout.size("heads"):
        return "unstacked"
    params = params or {}
    stacks = [params[name] for name in dict.fromkeys(stack.order(cfg)) if name in params]
    if not all(map(fused_layers.can_fuse, stacks)):
        return "unstacked"
    if any(map(array.is_quantised, jax.tree.leaves(params, is_leaf=array.is_quantised))):
        small = num_rows is not None and num_rows <= packed_words_kernel.MOST_ROWS
        return "packed" if small and layout is None and platform == "gpu" else "fused"
    reason = support.unsupported(cfg, dtype=dtype, layout=layout, platform=platform)
    return "output_major" if reason is None else "fused"


def prepare(
    cfg: ModelConfig,
    params: dict,
    *,
    dtype: jnp.dtype,
    form: Form | None = None,
    layout: Layout | None = None,
    num_rows: int | None = None,
    source: Literal["consumed", "kept"] = "consumed",
) -> DecodeWeights:
    """Stacked parameters cast to `dtype`, in the form asked for; None is `best_form`'s.

    Routers stay in float32. source: "consumed" deletes the arrays of `params`, each as soon as it
    was read; "kept" leaves them valid, and the result shares no memory with them. Peak memory is
    the result and a copy of the largest leaf, plus `params` where they are kept.
    Raises `ValueError` for an unknown form, and for one that this model or mesh cannot have.
    """
    if form is None:
        form = best_form(cfg, dtype=dtype, layout=layout, params=params, num_rows=num_rows)
    _check(cfg, form, layout)
    source_ids = frozenset(map(id, jax.tree.leaves(params) if source == "kept" else ()))
    cast = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x if _keeps_dtype(path, x) else _cast(x, dtype=jnp.dtype(dtype), source_ids=source_ids)
        ),
        params,
        is_leaf=array.is_quantised,
    )
    prepared = _unstack(cfg, cast, source_ids=source_ids)
    if form != "unstacked":
        prepared["layers"] = _fuse(cfg, form, prepared["layers"], layout=layout)
    if form == "packed":
        prepared = _pack(prepared, dtype=jnp.dtype(dtype), source_ids=source_ids)
    prepared = jax.tree.map(lambda x: jnp.copy(x) if id(x) in source_ids else x, prepared)
    return DecodeWeights(form, prepared)


def _check(cfg: ModelConfig, form: Form, layout: Layout | None) -> None:
    if form not in get_args(Form):
        raise ValueError(f"unknown form {form!r}; known: {', '.join(get_args(Form))}")
    if form in ("output_major", "packed") and layout is not None:
        raise ValueError(f"form={form!r} lies on one device, and there is a mesh; use 'fused'")
    if form == "output_major" and cfg.moe is not None:
        raise ValueError(
            f"form={form!r} is of dense models, and {cfg.name} has experts; use 'fused'"
        )


def shapes(cfg: ModelConfig, *, dtype: jnp.dtype, form: Form, layout: Layout) -> DecodeWeights:
    """The result of `prepare` for plain parameters, as shapes with their shardings."""
    _check(cfg, form, layout)

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
        if form != "unstacked":
            layer = jax.eval_shape(functools.partial(fused_layers.fuse, cfg), layer)
        layers.append(placed(layer, _layer_axes(cfg, form, name)))
    stacks = set(stack.order(cfg))
    others = {name: placed(part, axes[name]) for name, part in whole.items() if name not in stacks}
    return DecodeWeights(form, {**others, "layers": tuple(layers)})


def _layer_axes(cfg: ModelConfig, form: Form, name: str) -> dict:
    """The logical axes of one layer of the stack `name`."""
    axes = blocks(cfg, form)[name].axes()
    return jax.tree.map(lambda axes: axes[1:], axes, is_leaf=sharding.is_axes)


def _unstack(cfg: ModelConfig, params: dict, *, source_ids: Collection[int]) -> dict:
    """`params` with a tuple of one tree a layer, taken apart leaf by leaf."""

    def apart(stacked: dict) -> list[dict]:
        leaves, tree = jax.tree.flatten(stacked)
        columns = []
        for leaf in leaves:
            columns.append(jax.block_until_ready(_split(leaf)))
            _delete(leaf, source_ids=source_ids)
        return [tree.unflatten(column) for column in zip(*columns, strict=True)]

    layers = tuple(stack.in_order(cfg, params, apart))
    others = {name: part for name, part in params.items() if name != "dense_layers"}
    return {**others, "layers": layers}


@jax.jit
def _split(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x[i] for i in range(x.shape[0]))


def _fuse(
    cfg: ModelConfig, form: Form, layers: tuple[dict, ...], *, layout: Layout | None
) -> tuple[dict, ...]:
    """The layers, fused one by one. Deletes their old arrays."""
    programs: dict[str, Callable] = {}
    fused = []
    for name, layer in zip(stack.order(cfg), layers, strict=True):
        if name not in programs:
            programs[name] = _fuse_program(cfg, form, name, layer, layout=layout)
        fused.append(jax.block_until_ready(programs[name](layer)))
        _delete(layer)
    return tuple(fused)


def _fuse_program(
    cfg: ModelConfig, form: Form, name: str, layer: dict, *, layout: Layout | None
) -> Callable:
    """The program that fuses layers of the stack `name`, of which `layer` is one."""
    if layout is None:
        return _jit_fuse(cfg, form, None, None)
    like = jax.eval_shape(functools.partial(fused_layers.fuse, cfg), layer)
    plain = sharding.shardings(_layer_axes(cfg, form, name), layout)
    leaves, tree = jax.tree.flatten(array.shardings(plain, like))
    return _jit_fuse(cfg, form, tree, tuple(leaves))


@functools.lru_cache(maxsize=64)  # so that new parameters of the same shapes compile nothing
def _jit_fuse(cfg: ModelConfig, form: Form, tree: Any, shardings: tuple | None) -> Callable:
    def fuse(layer: dict) -> dict:
        fused = fused_layers.fuse(cfg, layer)
        return fused_layers.output_major(fused) if form == "output_major" else fused

    if shardings is None:
        return jax.jit(fuse)
    return jax.jit(fuse, out_shardings=tree.unflatten(shardings))


def _pack(params: dict, *, dtype: jnp.dtype, source_ids: Collection[int]) -> dict:
    """`params` with quantised matrices in words where their kernel runs, packed one by one."""

    def pack(x: jax.Array | array.QuantArray) -> jax.Array | array.QuantArray:
        if (
            not array.is_quantised(x)
            or packed_words_kernel.unsupported(x, rows=1, dtype=dtype) is not None
        ):
            return x
        packed = jax.block_until_ready(_in_words(x))
        _delete(x, source_ids=source_ids)
        return packed

    return jax.tree.map(pack, params, is_leaf=array.is_quantised)


_in_words = jax.jit(array.in_words)


def _keeps_dtype(path: tuple, x: jax.Array | array.QuantArray) -> bool:
    return array.is_quantised(x) or moe.stays_float32(path)


def _cast(x: jax.Array, *, dtype: jnp.dtype, source_ids: Collection[int]) -> jax.Array:
    if x.dtype == dtype:
        return x
    result = jax.block_until_ready(x.astype(dtype))
    _delete(x, source_ids=source_ids)
    return result


def _delete(tree: dict | jax.Array, *, source_ids: Collection[int] = frozenset()) -> None:
    """Frees the arrays of `tree`, except those whose id is in `source_ids`."""
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in source_ids:
            leaf.delete()
