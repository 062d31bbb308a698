"""Which parameters of a model are quantised, and a model's parameters quantised.

Quantised: the kernels of attention, of feed-forward networks and of experts, and of the embeddings
the one that projects to the vocabulary. Kept: norms and biases, the router and the shared expert's
gate, which are small and decide much, and an embedding that is only looked up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax

from configs import schema
from qwen_jax.convert import table
from qwen_jax.quant import array

Output = Literal["int8", "keep"]
_KEPT = ("router", "shared_gate")


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


def dims(row: table.Row) -> tuple[int, int]:
    """`axis` and `merged` of a row's quantised array: where its inputs are."""
    if row.path == table.EMBED.path:
        return -1, 1
    inputs = row.hf_dims.split()[1]
    return -1 - (len(row.dims) - len(inputs)), len(inputs)


def is_linear(row: table.Row) -> bool:
    """Whether a row is a kernel of a layer that is quantised."""
    return bool(row.stack) and row.keys[-1] == "kernel" and row.keys[-2] not in _KEPT


def format_of(row: table.Row, cfg: schema.Model, settings: Settings) -> array.Format | None:
    """What a row is quantised to; None where it is kept."""
    if is_linear(row):
        return settings.weights
    output = table.EMBED if cfg.tie_word_embeddings else table.LM_HEAD
    return "int8" if row.path == output.path and settings.output == "int8" else None


def check(cfg: schema.Model, settings: Settings) -> None:
    """Raises `ValueError` naming the parameter that cannot be quantised so."""
    for row in table.rows(cfg):
        if is_linear(row):
            axis, merged = dims(row)
            shape = table.shape(row, cfg)
            inputs = 1
            for size in shape[len(shape) + axis - merged + 1 : len(shape) + axis + 1]:
                inputs *= size
            array.check(
                settings.weights,
                num_inputs=inputs,
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

    Raises `ValueError` as `check` does.
    """
    check(cfg, settings)
    flat = table.flatten(params)
    for row in table.rows(cfg):
        format = format_of(row, cfg, settings)
        if format is None:
            continue
        on_row(row.path)
        group_size = settings.group_size if is_linear(row) else None
        flat[row.path] = one(row, flat[row.path], format=format, group_size=group_size)
    return table.nest(flat)


def one(
    row: table.Row, w: jax.Array, *, format: array.Format, group_size: int | None
) -> array.QuantArray:
    """One parameter quantised, a layer at a time: what is made on the way is float32."""
    axis, merged = dims(row)

    def quantise(w: jax.Array) -> array.QuantArray:
        return array.quantise(
            w, format=format, group_size=group_size, axis=axis, merged=merged, what=row.path
        )

    if not row.stack:
        return jax.jit(quantise)(w)
    return jax.jit(lambda w: jax.lax.map(quantise, w))(w)
