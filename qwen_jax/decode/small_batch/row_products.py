"""Building blocks of Triton kernels: a few rows times a matrix whose rows are its outputs.

Each weight is read once and multiplied outside the tensor cores: with so few rows, time goes into
reading. Tiles [T, C] are held in chunks of inputs such that each thread has 8 of them, 16 bytes,
and the same threads hold the same inputs of the rows.

Letters beyond `qwen_jax/model/module.py`: R rows, C inputs, O outputs, T outputs of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PER_THREAD = 8

Chunks = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Tile:
    """Outputs of a tile, and the warps that hold it."""

    outputs: int
    warps: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of one chunk."""
        return self.outputs, max(1, 32 * self.warps // self.outputs) * PER_THREAD

    def inputs(self, C: int) -> list[tuple[jax.Array, jax.Array]]:
        """Indices of each chunk of C inputs, and whether each index exists."""
        width, chunks = self.shape[1], []
        for i in range(pl.cdiv(C, width)):
            c = i * width + jnp.arange(width)
            chunks.append(tuple(jnp.broadcast_to(x[None, :], self.shape) for x in (c, c < C)))
        return chunks


def read_row(x_RC, r: int, *, tile: Tile) -> Chunks:
    """One row, repeated for every output of a tile; zeros beyond its last input."""
    return tuple(
        triton.load(x_RC.at[r, c], mask=real, other=0) for c, real in tile.inputs(x_RC.shape[1])
    )


def normalise(x_RC, scale_C, *, tile: Tile, eps: float) -> list[Chunks]:
    """RMSNorm of every row, rounded as `layers.RMSNorm` rounds."""
    (R, C), dtype = x_RC.shape, x_RC.dtype
    scales = [
        triton.load(scale_C.at[c], mask=real, other=0).astype(dtype) for c, real in tile.inputs(C)
    ]
    rows = []
    for r in range(R):
        x = [chunk.astype(jnp.float32) for chunk in read_row(x_RC, r, tile=tile)]
        total = jnp.sum(sum(chunk * chunk for chunk in x), axis=1, keepdims=True)
        inverse = jax.lax.rsqrt(total / C + eps)
        rows.append(tuple((a * inverse).astype(dtype) * s for a, s in zip(x, scales, strict=True)))
    return rows


def read_tile(w_OC, index, *, tile: Tile, leading: tuple[int, ...] = ()) -> Chunks:
    """Tile number `index` of the matrix; zeros beyond it.

    leading: indices of the matrix where there are several, [..., O, C].
    """
    O, C = w_OC.shape[-2:]  # noqa: E741
    o = index * tile.outputs + jnp.arange(tile.outputs)
    o, inside = (jnp.broadcast_to(x[:, None], tile.shape) for x in (o, o < O))
    return tuple(
        triton.load(w_OC.at[(*leading, o, c)], mask=inside & real, other=0)
        for c, real in tile.inputs(C)
    )


def times(weights: Chunks, rows: list[Chunks]) -> list[jax.Array]:
    """The tile's products with every row, [T] each, summed in float32."""
    wide = [w.astype(jnp.float32) for w in weights]
    return [
        jnp.sum(sum(w * x.astype(jnp.float32) for w, x in zip(wide, row, strict=True)), axis=1)
        for row in rows
    ]


def write(y_RO, first, values: list[jax.Array]) -> None:
    """Writes every row's outputs from index `first` on."""
    o = first + jnp.arange(values[0].shape[0])
    for r, y in enumerate(values):
        triton.store(y_RO.at[r, o], y.astype(y_RO.dtype), mask=o < y_RO.shape[1])


def read_outputs(y_RO, first, *, outputs: int) -> list[jax.Array]:
    """Every row's outputs from index `first` on, as `write` wrote them."""
    o = first + jnp.arange(outputs)
    return [
        triton.load(y_RO.at[r, o], mask=o < y_RO.shape[1], other=0) for r in range(y_RO.shape[0])
    ]


def over_tiles(count: int, read: Callable, use: Callable, *, first, begin, stride: int) -> None:
    """Runs `use(tile, read(tile))` for tiles begin, begin + stride, ... below `count`.

    first: the result of `read(begin)`. Each read is issued one tile before its use.
    """
    rounds = pl.cdiv(count, stride)
    if rounds == 1:
        use(begin, first)
        return

    def body(i, loaded):
        tile = begin + i * stride
        following = read(tile + stride)
        use(tile, loaded)
        return following

    jax.lax.fori_loop(0, rounds, body, first)
