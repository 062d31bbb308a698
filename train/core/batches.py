"""Host-local batches of numpy arrays to global arrays on the devices, a few steps ahead."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from partitioning.processes import cluster

HostBatch = dict[str, np.ndarray]


class Source(Protocol):
    """Host-local training batches, whose position in the data is plain JSON."""

    def __next__(self) -> HostBatch: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Share:
    """Number of the part, of `count` equal parts of every global batch, that a process reads."""

    index: int
    count: int


def share(where: NamedSharding, shape: tuple[int, int]) -> Share:
    """This process's part of global batches [B, T] = `shape`, placed as `where`.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same part.
    Raises `ValueError` if parts overlap without being equal.
    """
    rows = collections.defaultdict(set)
    for device, (index, _) in where.devices_indices_map(shape).items():
        rows[device.process_index].update(range(*index.indices(shape[0])))
    parts = sorted({(min(held), max(held) + 1) for held in rows.values()})
    sizes = {stop - start for start, stop in parts}
    if len(sizes) != 1 or len(parts) * sizes.pop() != shape[0]:
        raise ValueError(
            f"the mesh {dict(where.mesh.shape)} gives processes unequal or overlapping rows "
            f"{parts} of a batch; let data and fsdp vary slowest over hosts"
        )
    mine = rows[jax.process_index()]
    return Share(index=parts.index((min(mine), max(mine) + 1)), count=len(parts))


def place(batch: HostBatch, where: NamedSharding, *, part: Share) -> dict[str, jax.Array]:
    """This process's rows [B / count, T] as its piece of global arrays [B, T].

    The rows are whole. Where `length` is spread over processes, each device takes its columns.
    """

    def put(rows: np.ndarray) -> jax.Array:
        first, length = part.index * rows.shape[0], rows.shape[1]

        def take(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(part.count * rows.shape[0])
            return rows[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((part.count * rows.shape[0], length), where, take)

    return {name: put(rows) for name, rows in batch.items()}


def prefetch(
    source: Source, put: Callable[[HostBatch], dict[str, jax.Array]], *, ahead: int = 2
) -> Iterator[tuple[dict[str, jax.Array], dict]]:
    """Batches on the devices, placed `ahead` batches early, each with the data state after it."""
    waiting: collections.deque = collections.deque()
    for batch in iter(source.__next__, None):
        waiting.append((put(batch), source.get_state()))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def gather_states(state: dict, part: Share) -> list[dict]:
    """Data states of all parts, in order, on every process; all processes call it together."""
    states = dict(cluster.gather([part.index, state]))
    return [states[index] for index in range(part.count)]
