"""Cuts parameters into blocks, so that the memory of a conversion is known before it starts.

A block is what is read, transposed and written at one time: contiguous rows of one Hugging Face
tensor, or the same small tensor of several layers, or of several experts of a layer. Stored arrays
are chunked along the same borders, and each block's other large dimension in up to eight, so that a
device that holds an eighth of the array reads an eighth of the bytes.
"""

import itertools
import math
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import tensor_table

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done
MIB = 1 << 20
BLOCK_BYTES = 32 * MIB
_SMALLEST_BLOCK_BYTES = MIB
_SMALL_TENSOR_BYTES = MIB  # smaller tensors are grouped in their stack; chunks are not cut below it
CONVERTING = 3  # blocks that are read and transposed at one time, a thread each
UNDER_WAY = 6  # blocks that are converted or written at one time
# Copies of a block that live at one time while importing, found by measuring: the source's pages
# and the transpose of each block being converted, the encoding of each block being written.
_BLOCKS_HELD = 3 * UNDER_WAY + 1
_FIXED_BYTES = 48 * MIB  # buffers and code pages that do not depend on the block


@dataclass(frozen=True, kw_only=True)
class Array:
    """One stored parameter and how it is cut; `chunks` has the rank of `shape`."""

    row: tensor_table.Row
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    stacked_per_block: int  # tensors along the last dimension of the stack
    lead_per_block: int  # rows of the Hugging Face tensor's first dimension letter

    @property
    def path(self) -> str:
        return self.row.path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block: the tensors of the stack, one range per dimension of it, and the region of each."""

    stack: tuple[range, ...]
    region: dict[str, slice]

    def index(self, row: tensor_table.Row) -> tuple[slice, ...]:
        """The slices of the stored array that the block covers."""
        stack = (slice(part.start, part.stop) for part in self.stack)
        return (*stack, *(self.region[dim] for dim in row.dims))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The tensors, bytes and memory of a conversion, known before it starts."""

    source: Path
    target: Path
    model: ModelConfig
    num_tensors: int
    total_bytes: int  # of the parameters written
    done_bytes: int  # of these, written by an earlier run
    block_bytes: int
    peak_bytes: int  # resident memory, what the process holds already included
    max_memory: int | None

    def __str__(self) -> str:
        bound = f" (bound {self.max_memory / MIB:.0f} MiB)" if self.max_memory else ""
        done = f", {self.done_bytes / 1e9:.2f} GB of them done before" if self.done_bytes else ""
        return (
            f"{self.source} -> {self.target}: {self.num_tensors} tensors, "
            f"{self.total_bytes / 1e9:.2f} GB{done}; planned peak memory "
            f"{self.peak_bytes / MIB:.0f} MiB{bound}"
        )


def array(
    row: tensor_table.Row, model: ModelConfig, dtype: np.dtype, *, block_bytes: int = BLOCK_BYTES
) -> Array:
    """A parameter cut into chunks and blocks of at most `block_bytes`, at least one row each."""
    size = tensor_table.sizes(model)
    lead, *others = row.hf_dims.split()
    tensor_bytes = math.prod(size[dim] for dim in row.dims) * dtype.itemsize
    pieces = min(math.ceil(tensor_bytes / block_bytes), size[lead[0]])
    lead_per_block = math.ceil(size[lead[0]] / pieces)
    small = min(_SMALL_TENSOR_BYTES, block_bytes)
    stack = tensor_table.stack_shape(row, model)
    grouped = max(1, min(stack[-1], small // tensor_bytes)) if stack else 1
    chunk = {**{dim: size[dim] for dim in row.dims}, lead[0]: lead_per_block}
    if others:
        split = others[0][0]
        chunk_bytes = math.prod(chunk.values()) * dtype.itemsize
        parts = next(
            n
            for n in (8, 4, 2, 1)
            if n == 1 or (size[split] % n == 0 and chunk_bytes // n >= small)
        )
        chunk[split] = size[split] // parts
    return Array(
        row=row,
        shape=tensor_table.shape(row, model),
        chunks=(*[1] * len(stack[1:]), *[grouped] * len(stack[:1]), *(chunk[d] for d in row.dims)),
        dtype=dtype,
        stacked_per_block=grouped,
        lead_per_block=lead_per_block,
    )


def blocks(stored: Array, model: ModelConfig) -> Iterator[Block]:
    """The blocks of an array, in the order in which they are converted."""
    row, size = stored.row, tensor_table.sizes(model)
    lead = row.hf_dims[0]
    *outer, last = tensor_table.stack_shape(row, model) or (1,)
    step = stored.stacked_per_block
    stacks = itertools.product(
        *([range(i, i + 1) for i in range(count)] for count in outer),
        [range(i, min(i + step, last)) for i in range(0, last, step)],
    )
    starts = range(0, size[lead], stored.lead_per_block)
    for stack, start in itertools.product(stacks, starts):
        rows = slice(start, min(start + stored.lead_per_block, size[lead]))
        region = {**tensor_table.whole(row, size), lead: rows}
        yield Block(stack=stack if row.stack else (), region=region)


def block_bytes(stored: Array, block: Block) -> int:
    """Number of bytes of a block's elements."""
    elements = math.prod(part.stop - part.start for part in block.index(stored.row))
    return elements * stored.dtype.itemsize


def chunk_keys(stored: Array, block: Block) -> Iterator[str]:
    """Names under which the chunks of a block are stored in a zarr array."""
    spans = [
        range(part.start // chunk, -(-part.stop // chunk))
        for part, chunk in zip(block.index(stored.row), stored.chunks, strict=True)
    ]
    for position in itertools.product(*spans):
        yield ".".join(map(str, position))


def resident_bytes() -> int:
    """Resident bytes of this process now; its peak so far where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(block_bytes: int) -> int:
    """Resident bytes that an import with blocks of `block_bytes` reaches."""
    return resident_bytes() + _FIXED_BYTES + _BLOCKS_HELD * block_bytes


def choose_block_bytes(max_memory: int | None) -> int:
    """The largest block size in bytes with which an import stays within `max_memory` bytes.

    Raises `ValueError` naming the least memory that would do.
    """
    block = BLOCK_BYTES
    while max_memory is not None and peak_bytes(block) > max_memory:
        block //= 2
        if block < _SMALLEST_BLOCK_BYTES:
            least = math.ceil(peak_bytes(_SMALLEST_BLOCK_BYTES) / MIB)
            raise ValueError(
                f"max_memory={max_memory / MIB:.0f} MiB is too little; "
                f"this import needs at least {least} MiB"
            )
    return block
