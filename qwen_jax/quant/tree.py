"""Which parameters of a model are quantised, and a model's parameters quantised.

Quantised: the kernels of attention, of feed-forward networks and of experts, and of the embeddings
the one that projects to the vocabulary. Kept: norms and biases, the router and the shared expert's
gate, which are small and decide much, and an embedding that is only looked up.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from configs import schema
from qwen_jax.convert import quantised, table
from qwen_jax.quant import array

Output = Literal["int8", "keep"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How parameters are quantised. group_size None: a scale a channel.

    output: the projection to the vocabulary, the embedding where tied: int8 a channel, or kept.
    """

    weights: array.Format = "int8"
    group_size: int | None = None
    output: Output = "int8"

    def __post_init__(self) -> None:
        if self.output not in ("int8", "keep"):
            raise ValueError(f"output={self.output!r} is not int8 or keep")


def format_of(row: table.Row, cfg: schema.Model, settings: Settings) -> array.Format | None:
    """What a row is quantised to; None where it is kept."""
    if quantised.is_linear(row):
        return settings.weights
    output = table.EMBED if cfg.tie_word_embeddings else table.LM_HEAD
    return "int8" if row.path == output.path and settings.output == "int8" else None


def check(cfg: schema.Model, settings: Settings) -> None:
    """Raises `ValueError` naming the parameter that cannot be quantised so."""
    for row in table.rows(cfg):
        if quantised.is_linear(row):
            axis, merged = quantised.dims(row)
            shape = table.shape(row, cfg)
            last = len(shape) + axis
            array.check(
                settings.weights,
                num_inputs=math.prod(shape[last - merged + 1 : last + 1]),
                group_size=settings.group_size,
                what=row.path,
            )


def quantise(
    cfg: schema.Model,
    params: dict,
    settings: Settings,
    *,
    on_row: Callable[[str], None] = lambda path: None,
) -> dict:
    """A model's stacked parameters quantised, leaf by leaf; what is kept is the same array.

    Deletes the arrays that it quantises. Raises `ValueError` as `check` does.
    """
    check(cfg, settings)
    flat = table.flatten(params)
    for row in table.rows(cfg):
        format = format_of(row, cfg, settings)
        if format is None:
            continue
        on_row(row.path)
        group_size = settings.group_size if quantised.is_linear(row) else None
        plain = flat[row.path]
        flat[row.path] = jax.block_until_ready(
            one(row, plain, format=format, group_size=group_size)
        )
        plain.delete()
    return table.nest(flat)


def one(
    row: table.Row, w: jax.Array, *, format: array.Format, group_size: int | None
) -> array.QuantArray:
    """One parameter quantised, a layer at a time: what is made on the way is float32."""
    axis, merged = quantised.dims(row)

    def quantise(w: jax.Array) -> array.QuantArray:
        return array.quantise(
            w, format=format, group_size=group_size, axis=axis, merged=merged, what=row.path
        )

    if not row.stack:
        return jax.jit(quantise)(w)
    return jax.jit(lambda w: jax.lax.map(quantise, w))(w)


def specs(cfg: schema.Model, params: dict) -> dict[str, quantised.Spec]:
    """How each quantised parameter of a tree is stored, by path."""
    found = {}
    for path, value in table.flatten(params).items():
        if array.is_quantised(value):
            found[path] = quantised.Spec(
                format=value.format,
                group_size=value.group_size if value.num_groups > 1 else None,
                has_zeros=value.zeros is not None,
                has_order=value.order is not None,
            )
    return found


def gather(row: table.Row, spec: quantised.Spec, pieces: Mapping) -> array.QuantArray:
    """A parameter of its pieces by name: arrays, shapes or shardings."""
    axis, merged = quantised.dims(row)
    return array.QuantArray(**pieces, format=spec.format, axis=axis, merged=merged)


def placed(
    row: table.Row, model: schema.Model, spec: quantised.Spec, sharding: jax.sharding.Sharding
) -> dict[str, jax.sharding.Sharding]:
    """The sharding of each piece of a parameter, from that of the plain one.

    Raises `ValueError` where a mesh axis would cut a group of inputs.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in quantised.pieces(row, model, spec).items()
    }
    like = {row.path: gather(row, spec, shapes)}
    return array.shardings({row.path: sharding}, like)[row.path].children()
