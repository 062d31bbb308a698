"""Loads a Hugging Face folder straight onto devices, each of which reads only its own part."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import tensor_table
from qwen_jax.checkpoint.huggingface import source
from qwen_jax.checkpoint.quantised import gptq_awq, stored_arrays
from qwen_jax.checkpoint.quantised import parameters as quantised_parameters
from qwen_jax.quant import array


def load_huggingface(
    hf_dir: Path | str,
    *,
    shardings: dict | None = None,
    dtype: str | None = None,
    model: ModelConfig | None = None,
) -> dict:
    """The parameter tree of a Hugging Face folder as sharded arrays.

    `shardings` is a tree like the parameters'; without it everything lies on the first device.
    `dtype` (`float32`, `bfloat16`, `float16`) defaults to the files'. The host never holds more
    than one device's part of one parameter, which is one layer-stacked array where unsharded.
    `model` is the folder's, unless its experts are to be padded: with zeros, here.

    Raises `ValueError` as `source.open_source` does, and for tensors that are not finite.
    """
    opened = source.open_source(hf_dir)
    return load_source(opened, shardings=shardings, dtype=dtype, model=model)


def load_source(
    opened: source.Source,
    *,
    shardings: dict | None = None,
    dtype: str | None = None,
    model: ModelConfig | None = None,
) -> dict:
    """`load_huggingface` of a folder that is open already."""
    model = model or opened.model
    rows = tensor_table.rows(model)
    by_path = per_row(rows, shardings)
    target = None if dtype is None else np.dtype(source.DTYPES[checked_dtype(dtype)])
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
    """One quantised parameter, which the host holds whole while it is put on devices."""
    opened = dataclasses.replace(opened, model=model)
    dtypes = gptq_awq.piece_dtypes(opened, row, spec)
    shapes = stored_arrays.pieces(row, model, spec)
    whole = {name: np.empty(shape, dtypes[name]) for name, shape in shapes.items()}
    for place in itertools.product(*map(range, tensor_table.stack_shape(row, model))):
        for name, piece in gptq_awq.read(opened, row, spec, place).items():
            whole[name][place] = piece
    places = quantised_parameters.placed(row, model, spec, sharding)
    pieces = {
        name: jax.make_array_from_callback(
            values.shape, places[name], lambda index, values=values: values[index]
        )
        for name, values in whole.items()
    }
    return quantised_parameters.gather(row, spec, jax.block_until_ready(pieces))


def checked_dtype(dtype: str) -> str:
    """`dtype`, if it is one that weights may have. Raises `ValueError` otherwise."""
    if dtype not in source.DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(source.DTYPES)}")
    return dtype


def per_row(
    rows: tuple[tensor_table.Row, ...], shardings: dict | None
) -> dict[str, jax.sharding.Sharding]:
    """One sharding for each row's path. Raises `ValueError` where the trees differ."""
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {row.path: first for row in rows}
    flat = tensor_table.flatten(shardings)
    paths = {row.path for row in rows}
    if wrong := sorted(paths ^ set(flat)):
        raise ValueError(f"shardings and the model's parameters differ in {source.listed(wrong)}")
    return flat


def _load(
    opened: source.Source,
    row: tensor_table.Row,
    sharding: jax.sharding.Sharding,
    dtype: np.dtype | None,
    model: ModelConfig,
) -> jax.Array:
    """One parameter: every distinct part is read once and put on all devices that hold it."""
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
            target[...] = convert_dtype(tensor_table.copy_blocked(view), part.dtype, name)
    return part


def convert_dtype(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` rounded to `dtype`. Raises `ValueError` where a value is too large for it."""
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    try:
        source.check_finite(converted, name)
    except ValueError as error:
        raise ValueError(f"{error} as {dtype.name}; convert to bfloat16 or float32") from None
    return converted
