"""Loads a Hugging Face folder onto devices, each of which reads only its own part."""

import dataclasses
import itertools

import jax
import numpy as np

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import dtypes, placement, tensor_table
from qwen_jax.checkpoint.huggingface import gptq_awq, source
from qwen_jax.checkpoint.quantised import quantised_params, stored_arrays
from qwen_jax.checkpoint.resolve import Resolved
from qwen_jax.quant import array


def load(
    resolved: Resolved,
    *,
    shardings: dict | None,
    dtype: str | None,
    model: ModelConfig,
) -> dict:
    """The parameter tree of a Hugging Face folder; `load.load` says what the arguments mean.

    The host never holds more than one device's part of one parameter, which is one layer-stacked
    array where unsharded. Raises `ValueError` as `source.open_source` does, and for tensors that
    are not finite.
    """
    opened = source.open_source(resolved)
    rows = tensor_table.rows(model)
    by_path = placement.by_parameter(rows, shardings)
    target = None if dtype is None else dtypes.DTYPES[dtype]
    specs = {} if opened.quantisation is None else gptq_awq.specs(opened)
    found = {}
    for row in rows:
        sharding = by_path[row.path]
        if row.path in specs:
            found[row.path] = _load_packed(opened, row, specs[row.path], sharding, model)
        else:
            found[row.path] = _load(opened, row, sharding, target, model)
    return tensor_table.nest(found)


def _load_packed(
    opened: source.Source,
    row: tensor_table.Row,
    spec: stored_arrays.Spec,
    sharding: jax.sharding.Sharding,
    model: ModelConfig,
) -> array.QuantArray:
    """One quantised parameter; the host holds all of it while it is copied to devices."""
    opened = dataclasses.replace(opened, model=model)
    piece_dtypes = gptq_awq.piece_dtypes(opened, row, spec)
    shapes = stored_arrays.pieces(row, model, spec)
    whole = {name: np.empty(shape, piece_dtypes[name]) for name, shape in shapes.items()}
    for place in itertools.product(*map(range, tensor_table.stack_shape(row, model))):
        for name, piece in gptq_awq.read(opened, row, spec, place).items():
            whole[name][place] = piece
    places = quantised_params.array_shardings(row, model, spec, sharding)
    pieces = {
        name: jax.make_array_from_callback(
            values.shape, places[name], lambda index, values=values: values[index]
        )
        for name, values in whole.items()
    }
    return quantised_params.gather(row, spec, jax.block_until_ready(pieces))


def _load(
    opened: source.Source,
    row: tensor_table.Row,
    sharding: jax.sharding.Sharding,
    dtype: np.dtype | None,
    model: ModelConfig,
) -> jax.Array:
    """One parameter; each distinct shard is read once and copied to all devices that hold it."""
    shape = tensor_table.shape(row, model)
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        part = _read_part(opened, row, [slice(*bound) for bound in bounds], dtype, model)
        shards += [jax.device_put(part, device) for device in devices]
    # device_put may still be reading the host's copy: it must not outlive this parameter.
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, shards))


def _read_part(
    opened: source.Source,
    row: tensor_table.Row,
    index: list[slice],
    dtype: np.dtype | None,
    model: ModelConfig,
) -> np.ndarray:
    size = tensor_table.sizes(model)
    stack, dims = index[: len(row.stack)], index[len(row.stack) :]
    region = dict(zip(row.dims, dims, strict=True))
    stored = source.row_dtype(opened, row)
    part = np.empty([s.stop - s.start for s in index], dtype or stored)
    for place in itertools.product(*(range(s.start, s.stop) for s in stack)):
        target = part[tuple(i - s.start for i, s in zip(place, stack, strict=True))]
        name = tensor_table.hf_name(row, model, place)
        if name is None:
            target[...] = 0
            continue
        view = tensor_table.read_region(
            row, region, size, lambda slices, name=name: source.read(opened, name, slices)
        )
        if part.dtype == stored:
            tensor_table.copy_blocked(view, target)
        else:
            target[...] = dtypes.convert(tensor_table.copy_blocked(view), part.dtype, name)
    return part
