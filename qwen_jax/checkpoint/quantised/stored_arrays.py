"""Storage of quantised parameters: several arrays each, `kernel.values` beside `kernel.scales`.

Which parameters are quantised, and how, is in a native checkpoint's metadata under `quantisation`.
This module does not import jax, as conversion does not.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import tensor_table

METADATA_KEY = "quantisation"
PACKED = 32  # inputs of int4 that are packed together (`qwen_jax/quant/array.py`)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Format of a quantised parameter, inputs that share a scale (None: all), extra arrays."""

    format: str
    group_size: int | None = None
    has_zeros: bool = False
    has_order: bool = False


Specs = Mapping[str, Spec]  # by path of the parameter


_NOT_QUANTISED = ("router", "shared_gate")  # small, and routing depends on them


def is_linear(row: tensor_table.Row) -> bool:
    """Whether a row is a kernel of a layer that may be quantised."""
    return bool(row.stack) and row.keys[-1] == "kernel" and row.keys[-2] not in _NOT_QUANTISED


def dims(row: tensor_table.Row) -> tuple[int, int]:
    """The last input dimension of a kernel, from the end, and the number of input dimensions."""
    if row.path == tensor_table.EMBED.path:
        return -1, 1
    inputs = row.hf_dims.split()[1]
    return -1 - (len(row.dims) - len(inputs)), len(inputs)


def pieces(row: tensor_table.Row, model: ModelConfig, spec: Spec) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a quantised parameter by name; inputs merge into one dimension."""
    axis, merged = dims(row)
    shape = tensor_table.shape(row, model)
    first, last = len(shape) + axis - merged + 1, len(shape) + axis
    before, after = shape[:first], shape[last + 1 :]
    inputs = math.prod(shape[first : last + 1])
    scales = (*before, inputs // (spec.group_size or inputs), *after)
    found = {
        "values": (*before, inputs // 2 if spec.format == "int4" else inputs, *after),
        "scales": scales,
    }
    if spec.has_zeros:
        found["zeros"] = scales
    if spec.has_order:
        found["order"] = (*before, inputs)
    return found


def shapes(model: ModelConfig, specs: Specs) -> dict[str, tuple[int, ...]]:
    """Shape of every stored array of a checkpoint by path, in the order of its rows."""
    found = {}
    for row in tensor_table.rows(model):
        if row.path not in specs:
            found[row.path] = tensor_table.shape(row, model)
            continue
        for name, shape in pieces(row, model, specs[row.path]).items():
            found[f"{row.path}.{name}"] = shape
    return found


def to_json(specs: Specs) -> dict[str, dict[str, Any]]:
    return {path: dataclasses.asdict(spec) for path, spec in specs.items()}


def from_metadata(metadata: Mapping, model: ModelConfig, *, where: str) -> dict[str, Spec]:
    """The quantised parameters of a native checkpoint by path, read from its metadata.

    Raises `ValueError` for an unknown path, format or key."""
    paths = {row.path for row in tensor_table.rows(model)}
    found = {}
    for path, values in metadata.get(METADATA_KEY, {}).items():
        try:
            found[path] = Spec(**values)
        except TypeError as error:
            raise ValueError(f"{where}: {METADATA_KEY} of {path}: {error}") from None
        if path not in paths:
            raise ValueError(f"{where}: {METADATA_KEY} names {path}, no parameter of the model")
        if found[path].format not in ("int8", "int4", "fp8"):
            raise ValueError(f"{where}: {path} has unknown format {found[path].format!r}")
    return found
