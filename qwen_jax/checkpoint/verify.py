"""Verifies checkpoints: reads them from end to end, and names what is damaged.

It checks that every part is there; that each parameter and moment has the shape its config asks
for; that every chunk can be read (tensorstore checks the CRC-32C of the database's manifest and
nodes); that every value is finite; that the sum of each array is the one that was computed on the
devices before the save (`train/core/state.py`; imported and older checkpoints have none, which is
reported); that the model's config and the data's state are as saved; and that all parts are of one
step.
"""

import collections
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorstore as ts

from qwen_jax import storage
from qwen_jax.checkpoint import resolve
from qwen_jax.checkpoint.native import store
from qwen_jax.checkpoint.quantised import stored_arrays
from qwen_jax.checkpoint.resolve import Resolved

_IN_FLIGHT_BYTES = 256 * 2**20


@dataclass
class Report:
    """The result of a verification; `problems` is empty for a sound checkpoint."""

    path: Path
    num_arrays: int = 0
    num_bytes: int = 0
    num_summed: int = 0  # arrays whose sums were recorded, and agree
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A checkpoint of a training run. `state` is "whole", or says which files are missing."""

    number: int
    path: Path
    state: str
    num_bytes: int


def verify(path: Path | str, *, on_progress: Callable[[int, int, str], None]) -> Report:
    """The report on a native checkpoint, a step of a run, or a run's newest step.

    `on_progress` receives bytes read, bytes in all, and the current array. Raises `ValueError`
    where there is no native checkpoint.
    """
    path = storage.folder(path)
    if (path / "checkpoints").is_dir():
        found = steps(path)
        if not found:
            raise ValueError(f"{path} is a training run without a checkpoint yet")
        path = found[-1].path
    if not (path / "params").is_dir() and not (path / "model").is_dir():
        resolve.resolve(path)  # raises for all that is no checkpoint
        raise ValueError(f"{path} is a Hugging Face folder; import it, and verify the checkpoint")
    report = Report(path)
    if missing := _missing(path):
        report.problems.append(f"{path} is half-written: it lacks {', '.join(missing)}")
        return report
    resolved = resolve.resolve(path)
    context = store.context()
    arrays = {}
    for part in ("params", "optimizer"):
        if not (path / part).is_dir():
            continue
        try:
            opened = store.open_all_for_reading(path / part, context)
        except ValueError as error:
            report.problems.append(str(error))
            continue
        _check_shapes(report, part, opened, resolved)
        arrays |= {(part, name): array for name, array in opened.items()}
    _check_json(report, resolved.metadata, arrays)
    _check_values(report, arrays, resolved.metadata.get("checksums", {}), on_progress)
    return report


def steps(output: Path | str) -> list[Step]:
    """The checkpoints of a training run in order of steps, half-written ones included."""
    folder = storage.folder(output) / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{output} is no training run: it has no folder checkpoints")
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name)):
        if path.name.isdecimal():
            missing = _missing(path)
            state = f"lacks {', '.join(missing)}" if missing else "whole"
            size = sum(storage.size(file) for file in storage.files(path))
            found.append(Step(int(path.name), path, state, size))
    return found


def _missing(path: Path) -> list[str]:
    """The required files that `path` lacks; a step of a run needs more than another checkpoint."""
    wanted = ["params/_METADATA", "model/metadata"]
    if storage.absolute(path).parent.name == "checkpoints":
        wanted += ["optimizer/_METADATA", "data/metadata"]
        wanted += ["commit_success.txt"] if storage.is_remote(path) else []
    return [part for part in wanted if not (path / part).is_file()]


def _check_shapes(
    report: Report, part: str, arrays: dict[str, ts.TensorStore], resolved: Resolved
) -> None:
    """Checks that parameters are the config's and that each moment has its parameter's shape."""
    rows = stored_arrays.shapes(resolved.model, resolved.specs)
    if part == "params":
        for name in [*(rows.keys() - arrays.keys()), *(arrays.keys() - rows.keys())]:
            report.problems.append(
                f"params: {name} is {'missing' if name in rows else 'no parameter of the model'}"
            )
    for name, array in arrays.items():
        of = [row for row in rows if f".{name}".endswith(f".{row}")]
        want = rows[max(of, key=len)] if of else array.shape
        if array.shape != want:
            report.problems.append(
                f"{part}: {name} has shape {list(array.shape)}, its config asks for {list(want)}"
            )


def _check_json(report: Report, metadata: dict, arrays: dict) -> None:
    """Checks that a run's data state and model are as saved, and that all parts are of one step."""
    path, steps_found = report.path, {"model/metadata": metadata.get("step")}
    if not (path / "data").is_dir():
        return
    steps_found["the folder's name"] = int(path.name) if path.name.isdecimal() else None
    found = {"model": metadata["model"]}
    try:
        found["data"] = storage.read_json(path / "data" / "metadata")
        if "step" in found["data"]:
            steps_found["data/metadata"] = found["data"]["step"]
    except ValueError as error:
        report.problems.append(str(error))
    sums = metadata.get("checksums", {}).get("json", {})
    for part, values in found.items():
        if part in sums and store.sum_json(values) != sums[part]:
            report.problems.append(f"{part}/metadata does not hold the values that were saved")
    if ("optimizer", "step") in arrays:
        try:
            steps_found["optimizer/step"] = int(arrays["optimizer", "step"].read().result())
        except ValueError:
            return  # reading all values will say it
    if len(set(steps_found.values())) > 1:
        described = ", ".join(f"{name} {step}" for name, step in steps_found.items())
        report.problems.append(f"{path}: the parts are not of one step: {described}")


def _check_values(
    report: Report,
    arrays: dict[tuple[str, str], ts.TensorStore],
    sums: dict[str, dict[str, int]],
    on_progress: Callable[[int, int, str], None],
) -> None:
    total = sum(array.size * array.dtype.numpy_dtype.itemsize for array in arrays.values())
    for (part, name), array in arrays.items():
        before = len(report.problems)
        found = 0
        for index, values in _chunks(array):
            where = f"{part}: {name}{list(array.shape)}, chunk {index}"
            if isinstance(values, ValueError):
                report.problems.append(f"{where} cannot be read: {str(values).splitlines()[0]}")
                continue
            report.num_bytes += values.nbytes
            if not np.issubdtype(values.dtype, np.integer) and not np.isfinite(values).all():
                bad = int(values.size - np.isfinite(values).sum())
                report.problems.append(f"{where} has {bad} values that are not finite")
            bits = values.view(f"uint{8 * values.dtype.itemsize}")
            found += int(bits.sum(dtype=np.uint64))
            on_progress(report.num_bytes, total, f"{part} {name}")
        report.num_arrays += 1
        recorded = sums.get(part, {}).get(name)
        if recorded is None or len(report.problems) > before:
            continue
        if found % 2**32 == recorded:
            report.num_summed += 1
        else:
            report.problems.append(f"{part}: {name} does not hold the values that were saved")


def _chunks(array: ts.TensorStore) -> Iterator[tuple[str, np.ndarray | ValueError]]:
    """Every chunk as `[begin:end, ...]` with its values or its read error; some are read ahead."""
    sizes = array.chunk_layout.read_chunk.shape or ()  # a number has no chunks
    starts = itertools.product(
        *(range(0, n, step) for n, step in zip(array.shape, sizes, strict=True))
    )
    item = array.dtype.numpy_dtype.itemsize
    ahead = max(1, _IN_FLIGHT_BYTES // max(1, int(np.prod(sizes)) * item))
    waiting: collections.deque = collections.deque()

    def next_done() -> tuple[str, np.ndarray | ValueError]:
        index, future = waiting.popleft()
        try:
            return index, np.ascontiguousarray(future.result())
        except ValueError as error:
            return index, error

    for start in starts:
        part = tuple(
            slice(a, min(a + step, n)) for a, step, n in zip(start, sizes, array.shape, strict=True)
        )
        index = "[" + ", ".join(f"{s.start}:{s.stop}" for s in part) + "]"
        waiting.append((index, array[part].read()))
        if len(waiting) >= ahead:
            yield next_done()
    while waiting:
        yield next_done()
