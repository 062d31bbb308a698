"""Exports a native checkpoint as a Hugging Face folder that transformers loads.

The files are laid out first, with room for every tensor, and then filled chunk by chunk through
mappings: each stored chunk is read once, whatever the chunks of the checkpoint's arrays are.
Everything is written into HF_DIR.partial, which is renamed to HF_DIR when it is complete.
"""

import itertools
import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from configs.models import huggingface
from qwen_jax import storage
from qwen_jax.checkpoint import block_plan, dtypes, resolve, tensor_table
from qwen_jax.checkpoint.huggingface import source
from qwen_jax.checkpoint.native import reader, store
from qwen_jax.checkpoint.resolve import Resolved

_MARKER = "export.json"
_SAFETENSORS_NAMES = {name: short for short, name in source.SAFETENSORS_NAMES.items()}
# A block as stored, decoded, converted, the pages it is written to, and the next one being read.
_BLOCKS_HELD = 14
_FIXED_BYTES = 96 * block_plan.MIB


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Place of one Hugging Face tensor in the files that are written."""

    file: str
    offset: int  # bytes
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An opened parameter of the checkpoint."""

    row: tensor_table.Row
    array: ts.TensorStore
    grid: tuple[int, ...]  # shape of the blocks that are read: whole chunks


def export_checkpoint(
    path: Path | str,
    hf_dir: Path | str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    max_memory: int | None = None,
    on_plan: Callable[[block_plan.Plan], None] | None = None,
    on_progress: block_plan.Progress | None = None,
) -> block_plan.Plan:
    """Writes the Hugging Face folder `hf_dir` from the native checkpoint or training run at `path`.

    `dtype` (`bfloat16`, `float16`, `float32`) defaults to the stored one. Files hold at most
    `max_shard_bytes` of tensors each, one tensor at least. `max_memory` bounds the resident bytes
    of the process; `on_plan` is called before anything is written.

    Raises `ValueError` for a checkpoint that is not sound, tensors that are not finite, an
    `hf_dir` in the way or too small a `max_memory` (naming the least); `OSError` for a full disk.
    """
    hf_dir = Path(hf_dir)
    resolved = resolve.resolve(path)
    if resolved.kind == "huggingface":
        raise ValueError(f"{path} is a Hugging Face folder already")
    if hf_dir.exists():
        raise ValueError(f"{hf_dir} exists already; delete it, or choose another place")
    if dtype is not None:
        dtypes.check_name(dtype)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be greater than 0")
    if tensor_table.has_router_bias(resolved.model):
        raise ValueError(
            f"{path} was trained with router biases (bias_update_rate="
            f"{resolved.model.moe.bias_update_rate}), for which the qwen2_moe format has no place: "
            f"without them other experts would be chosen. It runs here as it is; to export a "
            f"model, train it with experts.bias_update_rate left out"
        )
    resolve.check_not_quantised(resolved, remedy="export")
    arrays = reader.open_arrays(resolved.folder, resolved.model, resolved.specs)
    written_dtypes = {p: dtypes.DTYPES[dtype or array.dtype.name] for p, array in arrays.items()}
    slots = _lay_out(resolved, written_dtypes, max_shard_bytes=max_shard_bytes)
    params = _choose_grids(resolved, arrays, max_memory=max_memory)
    planned = block_plan.Plan(
        source=resolved.folder,
        target=hf_dir,
        model=resolved.model,
        num_tensors=len(slots),
        total_bytes=sum(slot.nbytes for slot in slots.values()),
        done_bytes=0,
        block_bytes=max(_grid_bytes(p) for p in params),
        peak_bytes=_peak_bytes(max(_grid_bytes(p) for p in params)),
        max_memory=max_memory,
    )
    if on_plan:
        on_plan(planned)
    partial = hf_dir.with_name(hf_dir.name + ".partial")
    _begin(partial)
    try:
        _make_files(partial, slots)
        _fill(partial, slots, params, resolved, planned, on_progress=on_progress)
        _commit(partial, hf_dir, slots, resolved)
    except OSError as error:
        raise OSError(f"cannot write {partial}: {error}; make room and export again") from error
    return planned


def _tensor_names(resolved: Resolved) -> dict[str, tensor_table.Row]:
    """Row of each tensor name in Hugging Face's order: embedding, layers, norm, LM head."""
    model = resolved.model
    by_layer: dict[int, dict[str, tensor_table.Row]] = {
        i: {} for i in range(model.num_hidden_layers)
    }
    for name, row in tensor_table.hf_names(model).items():
        if row.stack:
            by_layer[int(name.split(".")[2])][name] = row
    names = {tensor_table.EMBED.hf: tensor_table.EMBED}
    for found in by_layer.values():
        names |= found
    names |= {
        row.hf: row for row in tensor_table.rows(model) if row.hf not in names and not row.stack
    }
    if resolved.metadata.get("source", {}).get("stores_tied_lm_head"):
        names[tensor_table.LM_HEAD.hf] = tensor_table.EMBED
    return names


def _lay_out(
    resolved: Resolved, written_dtypes: dict[str, np.dtype], *, max_shard_bytes: int
) -> dict[str, Slot]:
    """The slot of every tensor: shards are filled greedily, in order."""
    shards: list[dict[str, tuple[tensor_table.Row, int]]] = [{}]
    filled = 0
    for name, row in _tensor_names(resolved).items():
        shape = tensor_table.hf_shape(row, resolved.model)
        nbytes = math.prod(shape) * written_dtypes[row.path].itemsize
        if filled and filled + nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (row, filled)
        filled += nbytes
    slots = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for name, (row, offset) in shard.items():
            slots[name] = Slot(
                file="model.safetensors" if single else file,
                offset=offset,
                dtype=written_dtypes[row.path],
                shape=tensor_table.hf_shape(row, resolved.model),
            )
    return slots


def _choose_grids(
    resolved: Resolved, arrays: dict[str, ts.TensorStore], *, max_memory: int | None
) -> list[Stored]:
    smallest = max(_bytes(array.chunk_layout.read_chunk.shape, array) for array in arrays.values())
    block = block_plan.BLOCK_BYTES
    while max_memory is not None and _peak_bytes(max(block, smallest)) > max_memory:
        block //= 2
        if block < block_plan.MIB:
            least = math.ceil(_peak_bytes(max(block_plan.MIB, smallest)) / block_plan.MIB)
            raise ValueError(
                f"max_memory={max_memory / block_plan.MIB:.0f} MiB is too little: with chunks of "
                f"{smallest / block_plan.MIB:.0f} MiB, this export needs at least {least} MiB"
            )
    return [
        Stored(row=row, array=arrays[row.path], grid=_grid(row, arrays[row.path], block))
        for row in tensor_table.rows(resolved.model)
    ]


def _bytes(shape: tuple[int, ...], array: ts.TensorStore) -> int:
    return math.prod(shape) * array.dtype.numpy_dtype.itemsize


def _grid_bytes(stored: Stored) -> int:
    return _bytes(stored.grid, stored.array)


def _peak_bytes(block_bytes: int) -> int:
    return block_plan.resident_bytes() + _FIXED_BYTES + _BLOCKS_HELD * block_bytes


def _grid(row: tensor_table.Row, array: ts.TensorStore, block_bytes: int) -> tuple[int, ...]:
    """Shape of a block: whole chunks up to `block_bytes`, joined along contiguous dimensions."""
    shape = list(array.shape)
    step = [min(c, n) for c, n in zip(array.chunk_layout.read_chunk.shape, shape, strict=True)]
    first = len(row.stack)
    letters = row.hf_dims.replace(" ", "")
    order = [first + row.dims.index(dim) for dim in reversed(letters)]
    for dim in order + list(reversed(range(first))):
        room = max(1, block_bytes // _bytes(tuple(step), array))
        step[dim] = min(shape[dim], step[dim] * room)
    return tuple(step)


def _begin(partial: Path) -> None:
    if partial.exists():
        if not (partial / _MARKER).exists() and any(partial.iterdir()):
            raise ValueError(f"{partial} is in the way and no unfinished export; delete it")
        shutil.rmtree(partial)
    store.write_json(partial / _MARKER, {"format": 1})


def _header(slots: dict[str, Slot]) -> bytes:
    """The header of one safetensors file: length and JSON, padded so that tensors are aligned."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for name, slot in slots.items():
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[slot.dtype.name],
            "shape": list(slot.shape),
            "data_offsets": [slot.offset, slot.offset + slot.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _by_file(slots: dict[str, Slot]) -> dict[str, dict[str, Slot]]:
    return {
        file: dict(group)
        for file, group in itertools.groupby(slots.items(), key=lambda item: item[1].file)
    }


def _make_files(partial: Path, slots: dict[str, Slot]) -> None:
    """Writes the headers and allocates the files: a full disk fails here, not in a mapped page."""
    for file, shard in _by_file(slots).items():
        header = _header(shard)
        size = len(header) + sum(slot.nbytes for slot in shard.values())
        with (partial / file).open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)
            handle.write(header)


def _read_ahead(stored: Stored) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Every block and its index; the next block is read while one is written."""
    steps = [
        [slice(i, min(i + step, n)) for i in range(0, n, step)]
        for n, step in zip(stored.array.shape, stored.grid, strict=True)
    ]
    indices = list(itertools.product(*steps))
    reading = stored.array[indices[0]].read()
    for index, following in zip(indices, [*indices[1:], None], strict=True):
        try:
            block = reading.result()
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{stored.row.path} cannot be read: {reason}") from None
        reading = None if following is None else stored.array[following].read()
        yield index, block


def _fill(
    partial: Path,
    slots: dict[str, Slot],
    params: list[Stored],
    resolved: Resolved,
    planned: block_plan.Plan,
    *,
    on_progress: block_plan.Progress | None,
) -> None:
    """Reads every block once and writes it to each tensor that it is a part of."""
    size = tensor_table.sizes(resolved.model)
    starts = {file: len(_header(shard)) for file, shard in _by_file(slots).items()}
    twin = tensor_table.LM_HEAD.hf if resolved.model.tie_word_embeddings else None
    done = 0
    for stored in params:
        row = stored.row
        for index, block in _read_ahead(stored):
            stack, dims = index[: len(row.stack)], index[len(row.stack) :]
            region = dict(zip(row.dims, dims, strict=True))
            for place in itertools.product(*(range(part.start, part.stop) for part in stack)):
                name = tensor_table.hf_name(row, resolved.model, place)
                if name is None:  # an expert that only pads their number
                    continue
                within = tuple(i - part.start for i, part in zip(place, stack, strict=True))
                part = _converted(block[within], slots[name].dtype, name)
                for target in (
                    (name, twin) if row is tensor_table.EMBED and twin in slots else (name,)
                ):
                    slot = slots[target]
                    offset = starts[slot.file] + slot.offset
                    _write(partial / slot.file, slot, offset, row, region, size, part)
                    done += part.nbytes
            if on_progress:
                on_progress(done, planned.total_bytes, row.path)


def _converted(part: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    dtypes.check_finite(part, name)
    return part if part.dtype == dtype else dtypes.convert(part, dtype, name)


def _write(
    path: Path,
    slot: Slot,
    offset: int,
    row: tensor_table.Row,
    region: dict[str, slice],
    size: dict[str, int],
    part: np.ndarray,
) -> None:
    """Writes a block into the rows of the tensor that it covers, through a memory mapping."""
    lead, *inner = row.hf_dims.split()[0]
    rows = region[lead]
    row_bytes = slot.nbytes // size[lead]
    first = offset + rows.start * row_bytes
    page = first - first % mmap.ALLOCATIONGRANULARITY
    count = (rows.stop - rows.start) * row_bytes
    with path.open("r+b") as handle:
        mapped = mmap.mmap(handle.fileno(), first - page + count, offset=page)
    tensor = np.frombuffer(mapped, slot.dtype, count // slot.dtype.itemsize, first - page)
    length = rows.stop - rows.start
    tensor_table.write_region(
        row,
        {**region, lead: slice(0, length)},
        {**size, lead: length},
        tensor=tensor,
        block=part,
    )


def _commit(partial: Path, hf_dir: Path, slots: dict[str, Slot], resolved: Resolved) -> None:
    """Writes index and side files, makes all durable, and moves the folder into place."""
    files = list(_by_file(slots))
    if len(files) > 1:
        total = sum(slot.nbytes for slot in slots.values())
        weight_map = {name: slot.file for name, slot in sorted(slots.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        store.write_json(partial / "model.safetensors.index.json", index)
    base = None
    if resolved.assets is not None:
        for path in sorted(resolved.assets.iterdir()):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
        if (resolved.assets / "config.json").exists():
            base = storage.read_json(resolved.assets / "config.json")
    written = slots[tensor_table.EMBED.hf].dtype.name
    config = huggingface.write_model(resolved.model, base=base, dtype=written)
    if config != base:
        store.write_json(partial / "config.json", config)
    if base is None:
        generation = huggingface.write_generation(resolved.model)
        store.write_json(partial / "generation_config.json", generation)
    (partial / _MARKER).unlink()
    store.sync_tree(partial)
    partial.rename(hf_dir)
    store.sync(hf_dir.parent)
