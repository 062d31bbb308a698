"""Quantises the parameters of a model.

The kernels of attention, feed-forward networks and experts are quantised, and the LM head (the
embedding where tied). Norms, biases, the router, the shared expert's gate and an embedding that is
only looked up stay as they are: they are small, and routing depends on the router.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import tensor_table
from qwen_jax.checkpoint.quantised import stored_arrays
from qwen_jax.quant import array

Output = Literal["int8", "keep"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Formats of quantised parameters. group_size None: one scale per channel.

    output: the LM head (the embedding where tied): int8 with a scale per channel, or kept.
    """

    weights: array.Format = "int8"
    group_size: int | None = None
    output: Output = "int8"

    def __post_init__(self) -> None:
        if self.output not in ("int8", "keep"):
            raise ValueError(f"output={self.output!r} is not int8 or keep")


def format_of(row: tensor_table.Row, cfg: ModelConfig, settings: Settings) -> array.Format | None:
    """The format that a row is quantised to; None where it is kept."""
    if stored_arrays.is_linear(row):
        return settings.weights
    output = tensor_table.EMBED if cfg.tie_word_embeddings else tensor_table.LM_HEAD
    return "int8" if row.path == output.path and settings.output == "int8" else None


def check(cfg: ModelConfig, settings: Settings) -> None:
    """Raises `ValueError` naming a parameter that cannot be quantised with these settings."""
    for row in tensor_table.rows(cfg):
        if stored_arrays.is_linear(row):
            axis, merged = stored_arrays.dims(row)
            shape = tensor_table.shape(row, cfg)
            last = len(shape) + axis
            array.check(
                settings.weights,
                num_inputs=math.prod(shape[last - merged + 1 : last + 1]),
                group_size=settings.group_size,
                what=row.path,
            )


def quantise(
    cfg: ModelConfig,
    params: dict,
    settings: Settings,
    *,
    on_row: Callable[[str], None] = lambda path: None,
) -> dict:
    """The quantised parameter tree, made leaf by leaf; kept parameters are the same arrays.

    The arrays that are quantised are deleted. Raises `ValueError` as `check` does.
    """
    check(cfg, settings)
    flat = tensor_table.flatten(params)
    for row in tensor_table.rows(cfg):
        format = format_of(row, cfg, settings)
        if format is None:
            continue
        on_row(row.path)
        group_size = settings.group_size if stored_arrays.is_linear(row) else None
        plain = flat[row.path]
        flat[row.path] = jax.block_until_ready(
            quantise_one(row, plain, format=format, group_size=group_size)
        )
        plain.delete()
    return tensor_table.nest(flat)


def quantise_one(
    row: tensor_table.Row, w: jax.Array, *, format: array.Format, group_size: int | None
) -> array.QuantArray:
    """One parameter quantised layer by layer, because the intermediate values are float32."""
    axis, merged = stored_arrays.dims(row)

    def quantise(w: jax.Array) -> array.QuantArray:
        return array.quantise(
            w, format=format, group_size=group_size, axis=axis, merged=merged, what=row.path
        )

    if not row.stack:
        return jax.jit(quantise)(w)
    return jax.jit(lambda w: jax.lax.map(quantise, w))(w)


def specs(cfg: ModelConfig, params: dict) -> dict[str, stored_arrays.Spec]:
    """The storage of each quantised parameter of a tree by path."""
    found = {}
    for path, value in tensor_table.flatten(params).items():
        if array.is_quantised(value):
            found[path] = stored_arrays.Spec(
                format=value.format,
                group_size=value.group_size if value.num_groups > 1 else None,
                has_zeros=value.zeros is not None,
                has_order=value.order is not None,
            )
    return found


def gather(row: tensor_table.Row, spec: stored_arrays.Spec, pieces: Mapping) -> array.QuantArray:
    """The quantised parameter made of its arrays (or shapes, or shardings) by name."""
    axis, merged = stored_arrays.dims(row)
    return array.QuantArray(**pieces, format=spec.format, axis=axis, merged=merged)


def array_shardings(
    row: tensor_table.Row,
    model: ModelConfig,
    spec: stored_arrays.Spec,
    sharding: jax.sharding.Sharding,
) -> dict[str, jax.sharding.Sharding]:
    """The sharding of each array of a quantised parameter, from that of the plain parameter.

    Raises `ValueError` where a mesh axis would cut a group of inputs.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in stored_arrays.pieces(row, model, spec).items()
    }
    like = {row.path: gather(row, spec, shapes)}
    return array.shardings({row.path: sharding}, like)[row.path].children()
