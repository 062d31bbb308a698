"""Writes native checkpoints whose arrays come in blocks, such as quantised ones.

An interrupted write starts again from the beginning, unlike an import of plain tensors.
"""

import contextlib
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint.native import store

_UNDER_WAY = 4  # blocks that are being written at one time
_CHUNK_BYTES = 1 << 20  # smaller tensors are not cut
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Array:
    """One stored array; along the first `num_stacked` dimensions chunks have size 1."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_stacked: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk: one tensor of the stack, a large one cut in up to eight."""
        rest = list(self.shape[self.num_stacked :])
        if rest and math.prod(rest) * self.dtype.itemsize > _CHUNK_BYTES:
            largest = rest.index(max(rest))
            rest[largest] //= next(n for n in (8, 4, 2, 1) if rest[largest] % n == 0)
        return (*[1] * self.num_stacked, *rest)


# (array, index of the block, its values); the blocks cover every array once.
Blocks = Iterator[tuple[store.Stored, tuple[int | slice, ...], np.ndarray]]


def write(
    out: Path,
    model: ModelConfig,
    arrays: Sequence[store.Stored],
    blocks: Blocks,
    *,
    assets: Path | None,
    on_progress: Callable[[int, int, str], None] | None = None,
    **metadata: object,
) -> None:
    """Writes the checkpoint `out`.

    The sum of each array is recorded for `qwen-jax checkpoint verify`. Raises
    `ValueError` where `out` or its partial folder exists, `OSError` when the disk is full.
    """
    partial = out.with_name(out.name + ".partial")
    for path in (out, partial):
        if path.exists():
            raise ValueError(f"{path} exists already; delete it, or choose another place")
    partial.mkdir(parents=True)
    try:
        sums = _write_arrays(partial / "params", arrays, blocks, on_progress=on_progress)
        store.write_json(partial / "params" / "_METADATA", store.tree_metadata(arrays))
        if assets is not None:
            copy_assets(assets, partial / "assets")
        values = store.metadata(model, checksums={"params": sums}, **metadata)
        store.write_json(partial / "model" / "metadata", values)
        store.sync_tree(partial)
        partial.rename(out)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)
        raise
    store.sync(out.parent)


def _write_arrays(
    params: Path,
    arrays: Sequence[store.Stored],
    blocks: Blocks,
    *,
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, int]:
    context, under_way = store.context(), deque()
    total, done = sum(array.nbytes for array in arrays), 0
    with store.write_errors():
        opened = {a.path: store.open_for_writing(params, a, context) for a in arrays}
    sums = {array.path: 0 for array in arrays}
    for array, index, values in blocks:
        values = np.ascontiguousarray(values)
        assert values.dtype == array.dtype, (array, values.dtype)
        bits = values.view(f"uint{8 * array.dtype.itemsize}")
        sums[array.path] = (sums[array.path] + int(bits.sum(dtype=np.uint64))) % 2**32
        with store.write_errors():
            under_way.append(opened[array.path][index].write(values))
            while len(under_way) > _UNDER_WAY:
                under_way.popleft().result()
        done += values.nbytes
        if on_progress:
            on_progress(done, total, array.path)
    with store.write_errors():
        for write in under_way:
            write.result()
    assert done == total, (done, total)
    return sums


def copy_assets(source: Path, target: Path) -> None:
    """Copies the files of a Hugging Face folder, or of a checkpoint's assets, except weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
