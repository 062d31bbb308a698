"""Reads slices of the tensors in a Hugging Face folder.

Files are mapped, not loaded, and mapped again for each slice, so that pages read before do not
count as resident. `safetensors` checks the headers; slices are views of our mapping, because those
of `safetensors` are copies, which took a third of an import's time. Torch is imported for
pytorch_model.bin only.
"""

import itertools
import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors

from configs.models.architecture import ModelConfig, QuantisationConfig
from qwen_jax import storage
from qwen_jax.checkpoint import block_plan, dtypes, tensor_table
from qwen_jax.checkpoint.resolve import Resolved

_PACKED_DTYPES = {**dtypes.DTYPES, "I32": np.dtype(np.int32)}
_PIECES = (".qweight", ".qzeros", ".scales", ".g_idx")  # of a quantised kernel
SAFETENSORS_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    file: Path
    dtype: str  # a key of `dtypes.DTYPES`, or the file's own name of one that is not supported
    shape: tuple[int, ...]
    offset: int = 0  # bytes into a safetensors file


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened Hugging Face folder whose tensors are those of `model`."""

    resolved: Resolved
    model: ModelConfig  # the folder's, unless its experts are padded
    tensors: Mapping[str, Tensor]
    packed: Mapping[str, Tensor] = field(default_factory=dict)  # arrays of quantised kernels

    @property
    def folder(self) -> Path:
        return self.resolved.folder

    @property
    def quantisation(self) -> QuantisationConfig | None:
        return self.resolved.quantisation

    @property
    def files(self) -> tuple[Path, ...]:
        found = [*self.tensors.values(), *self.packed.values()]
        return tuple(sorted({tensor.file for tensor in found}))


def open_source(resolved: Resolved) -> Source:
    """The tensors of a Hugging Face folder, found by reading the headers of its files only.

    Raises `ValueError` naming what is wrong: the file, or the tensors that are missing, extra,
    misshapen, truncated or of an unsupported dtype.
    """
    folder, model, weights = resolved.folder, resolved.model, resolved.weights
    header = _safetensors_header if weights.format == "safetensors" else _torch_header
    tensors = _indexed(weights.path, header) if weights.is_index else header(weights.path)
    packed = {}
    if resolved.quantisation is not None:
        if weights.format != "safetensors":
            raise ValueError(f"{weights.path} is quantised; use the checkpoint in safetensors")
        tensors, packed = _split_packed(tensors, model, folder)
    _check(tensors, model, folder, packed=packed)
    return Source(resolved=resolved, model=model, tensors=tensors, packed=packed)


def _split_packed(
    tensors: dict[str, Tensor], model: ModelConfig, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain tensors, and arrays of quantised kernels, by name.

    AutoGPTQ writes a bias of zeros for every kernel, dropped here where the model has none. Raises
    `ValueError` if it is not zeros, and where nothing is quantised.
    """
    packed = {name: tensor for name, tensor in tensors.items() if name.endswith(_PIECES)}
    bases = [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]
    if not bases:
        raise ValueError(f"{folder} has no quantised tensors, though config.json says it is")
    known = tensor_table.hf_names(model)
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    for name in (f"{base}.bias" for base in bases):
        if name not in known and name in plain:
            tensor = plain.pop(name)
            whole = tuple(slice(0, size) for size in tensor.shape)
            if _read_safetensors(tensor, name, whole).any():
                raise ValueError(f"{name} is not zero, and the model has no such bias")
    return plain, packed


def _indexed(index: Path, header) -> dict[str, Tensor]:
    """The tensors of all shards, which must be those that the index names."""
    weight_map = storage.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    tensors = {}
    for file, expected in names.items():
        path = index.parent / file
        if Path(file).name != file or not path.is_file():
            names_lost = tensor_table.first_names(expected)
            raise ValueError(f"{path} is missing; {index.name} says it holds {names_lost}")
        there = header(path)
        if missing := [name for name in expected if name not in there]:
            raise ValueError(
                f"{path} lacks tensors that {index.name} names: {tensor_table.first_names(missing)}"
            )
        if extra := [name for name in there if name not in expected]:
            raise ValueError(
                f"{path} has tensors that {index.name} lacks: {tensor_table.first_names(extra)}"
            )
        tensors |= there
    return tensors


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    try:
        safetensors.safe_open(path, "np").__exit__(None, None, None)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {_diagnosis(path) or error}") from None
    entries, start = _parse_header(path)
    return {
        name: Tensor(
            file=path,
            dtype=SAFETENSORS_NAMES.get(entry["dtype"], entry["dtype"]),
            shape=tuple(entry["shape"]),
            offset=start + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def _parse_header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensors that a safetensors file describes, and the offset of its data in bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _diagnosis(path: Path) -> str:
    """Text that names the tensors that a truncated safetensors file has lost."""
    size = path.stat().st_size
    try:
        entries, start = _parse_header(path)
        lost = [name for name, e in entries.items() if start + e["data_offsets"][1] > size]
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return f"its header cannot be read ({size} bytes in all); copy the file again"
    return (
        f"truncated, losing {tensor_table.first_names(lost)}; copy the file again" if lost else ""
    )


def _load_torch(path: Path) -> dict:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} needs torch, which is not installed; install it, or use the safetensors files"
        ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path} cannot be read as a torch weights file: {reason}") from None


def _torch_header(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, value in _load_torch(path).items():
        if not hasattr(value, "untyped_storage"):
            raise ValueError(f"{path}: {name} is not a tensor but {type(value).__name__}")
        dtype = str(value.dtype).removeprefix("torch.")
        tensors[name] = Tensor(file=path, dtype=dtype, shape=tuple(value.shape))
    return tensors


def _check(
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    folder: Path,
    *,
    packed: Mapping[str, Tensor],
) -> None:
    expected = {
        name: row
        for name, row in tensor_table.hf_names(model).items()
        if f"{name.removesuffix('.weight')}.qweight" not in packed
    }
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(
            f"{folder} lacks tensors that config.json asks for: {tensor_table.first_names(missing)}"
        )
    # Some writers store the tied projection too; the importer checks that it is the same.
    optional = {tensor_table.LM_HEAD.hf} if model.tie_word_embeddings else set()
    if extra := [name for name in tensors if name not in expected and name not in optional]:
        raise ValueError(
            f"{folder} has tensors that the model does not: {tensor_table.first_names(extra)}"
        )
    for name, tensor in tensors.items():
        row = expected.get(name, tensor_table.LM_HEAD)
        shape = tensor_table.hf_shape(row, model)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        if tensor.dtype not in dtypes.DTYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; supported are {', '.join(dtypes.DTYPES)}"
            )
    found_dtypes: dict[tensor_table.Row, set[str]] = {}
    for name, row in expected.items():
        found_dtypes.setdefault(row, set()).add(tensors[name].dtype)
    for row, names in found_dtypes.items():
        if len(names) > 1:
            raise ValueError(f"{row.hf} has several dtypes over its stack: {sorted(names)}")


def row_dtype(source: Source, row: tensor_table.Row) -> np.dtype:
    """Dtype of a parameter, the same in its whole stack; float32 where the folder has no tensor."""
    first = tensor_table.hf_name(row, source.model, (0,) * len(row.stack))
    return dtypes.DTYPES["float32" if first is None else source.tensors[first].dtype]


def read(source: Source, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """A read-only view of a slice of one tensor. Raises `ValueError` if it is not finite."""
    tensor = source.tensors[name]
    read_kind = (
        _read_safetensors if source.resolved.weights.format == "safetensors" else _read_torch
    )
    array = read_kind(tensor, name, slices)
    dtypes.check_finite(array, name)
    return array


def read_packed(source: Source, name: str) -> np.ndarray:
    """A read-only view of one array of a quantised kernel."""
    tensor = source.packed[name]
    return _read_safetensors(tensor, name, tuple(slice(0, size) for size in tensor.shape))


def read_block(
    opened: Source, stored: block_plan.Array, block: block_plan.Block, buffer: np.ndarray
) -> np.ndarray:
    """Values of a block in our layout, in the bytes of `buffer`."""
    row, size = stored.row, tensor_table.sizes(opened.model)
    shape = [part.stop - part.start for part in block.index(row)]
    data = buffer.view(stored.dtype).reshape(shape)
    for offset in itertools.product(*(range(len(part)) for part in block.stack)):
        place = tuple(part[i] for part, i in zip(block.stack, offset, strict=True))
        name = tensor_table.hf_name(row, opened.model, place)
        view = tensor_table.read_region(
            row, block.region, size, lambda slices, name=name: read(opened, name, slices)
        )
        tensor_table.copy_blocked(view, data[offset])
    return data


def _read_safetensors(tensor: Tensor, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """A view of a slice in a mapping of its rows; the mapping lives as long as the view."""
    dtype = _PACKED_DTYPES[tensor.dtype]
    rows, *others = slices
    row_elements = math.prod(tensor.shape[1:])
    first = tensor.offset + rows.start * row_elements * dtype.itemsize
    page = first - first % mmap.ALLOCATIONGRANULARITY
    count = (rows.stop - rows.start) * row_elements
    length = first - page + count * dtype.itemsize
    with tensor.file.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=page)
        except ValueError:
            raise ValueError(f"{tensor.file} has shrunk: {name} is truncated") from None
    flat = np.frombuffer(mapped, dtype, count, offset=first - page)
    return flat.reshape(-1, *tensor.shape[1:])[(slice(None), *others)]


def _read_torch(tensor: Tensor, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    import torch

    block = _load_torch(tensor.file)[name][slices]
    if tensor.dtype == "bfloat16":  # which torch does not give to numpy
        block = block.view(torch.int16)
    return block.numpy().view(dtypes.DTYPES[tensor.dtype])
