"""The grouped product on Hopper GPUs (H100, H200): supported calls, row tiles, kernel calls."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwen_jax.ops.grouped_matmul import hopper_kernels as kernels
from qwen_jax.ops.grouped_matmul.hopper_kernels import Blocks


def unsupported(lhs_MK: jax.Array, rhs_EKN: jax.Array) -> str | None:
    """The reason why the kernels cannot run this call on JAX's default device; None: they can."""
    if jax.default_backend() != "gpu":
        return f"it needs a Hopper GPU, this is {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if str(capability) != "9.0":
        return f"it needs compute capability 9.0 (H100, H200), this GPU has {capability}"
    return unsupported_operands(lhs_MK, rhs_EKN)


def unsupported_operands(lhs_MK: jax.Array, rhs_EKN: jax.Array) -> str | None:
    """The reason why the kernels cannot take these operands on any GPU; None: they can."""
    M, K = lhs_MK.shape
    N = rhs_EKN.shape[2]
    if lhs_MK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {lhs_MK.dtype} is not bfloat16 or float16"
    least = kernels.TILE_ROWS
    if M % kernels.ROW_ALIGNMENT or least > M:
        return f"M={M} rows must be {least} or more and a multiple of {kernels.ROW_ALIGNMENT}; pad"
    if K % kernels.WIDTH or N % kernels.WIDTH or least > min(K, N):
        return f"K={K} and N={N} must be {least} or more and multiples of {kernels.WIDTH}"
    return None


@dataclass(frozen=True)
class Tiles:
    """Row tiles of all groups in order; the rows after the last group are those of group E.

    group_T, row_T: the group and the first row of each tile. lo_T, hi_T: the range of the tile's
    rows that belong to the group. count_1: number of tiles that are used, of T.
    """

    group_T: jax.Array
    row_T: jax.Array
    lo_T: jax.Array
    hi_T: jax.Array
    count_1: jax.Array

    @classmethod
    def of(cls, sizes_E: jax.Array, *, M: int) -> "Tiles":
        """Tiles of M rows with these group sizes."""
        sizes_E = sizes_E.astype(jnp.int32)
        sizes_G = jnp.append(sizes_E, M - jnp.sum(sizes_E))
        G = len(sizes_G)
        ends_G = _running_sum(sizes_G)
        starts_G = ends_G - sizes_G
        aligned_G = starts_G // kernels.ROW_ALIGNMENT * kernels.ROW_ALIGNMENT
        tiles_G = jnp.where(sizes_G > 0, -((aligned_G - ends_G) // kernels.TILE_ROWS), 0)
        last_G = _running_sum(tiles_G)
        # Each group adds at most 7 rows of alignment and one tile that is not full.
        T = (M + G * (kernels.TILE_ROWS + kernels.ROW_ALIGNMENT - 2)) // kernels.TILE_ROWS
        tile_T = jnp.arange(T, dtype=jnp.int32)
        group_T = jnp.minimum(jnp.sum(tile_T[:, None] >= last_G[None, :], axis=1), G - 1)
        row_T = aligned_G[group_T] + kernels.TILE_ROWS * (tile_T - (last_G - tiles_G)[group_T])
        lo_T = jnp.maximum(starts_G[group_T] - row_T, 0)
        hi_T = jnp.minimum(ends_G[group_T] - row_T, kernels.TILE_ROWS)
        parts = group_T, row_T, lo_T, hi_T, jnp.minimum(last_G[-1:], T)
        return cls(*(x.astype(jnp.int32) for x in parts))


jax.tree_util.register_dataclass(Tiles)


def _running_sum(x_G: jax.Array) -> jax.Array:
    """Cumulative sum [G] as one small reduction; XLA runs `jnp.cumsum` as many kernels."""
    upto_GG = jnp.arange(len(x_G))[None, :] <= jnp.arange(len(x_G))[:, None]
    return jnp.sum(jnp.where(upto_GG, x_G[None, :], 0), axis=1)


def rows(
    lhs_MK: jax.Array,
    rhs_EKN: jax.Array,
    sizes_E: jax.Array,
    *,
    rhs_order: str,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Products as in `reference.rows`."""
    M = len(lhs_MK)
    N = rhs_EKN.shape[2 if rhs_order == "EKN" else 1]
    blocks = _fitted(blocks, N)
    call = kernels.kernel(
        functools.partial(kernels.rows_body, rhs_order=rhs_order, blocks=blocks),
        name=f"grouped_rows_{rhs_order.lower()}",
        out=jax.ShapeDtypeStruct((M, N), lhs_MK.dtype),
        lhs_tile=(kernels.TILE_ROWS, kernels.WIDTH),
        rhs_tile=(kernels.WIDTH, blocks.n) if rhs_order == "EKN" else (blocks.n, kernels.WIDTH),
        blocks=blocks,
    )
    tiles = Tiles.of(sizes_E, M=M)
    return call(lhs_MK, rhs_EKN, tiles.group_T, tiles.row_T, tiles.lo_T, tiles.hi_T, tiles.count_1)


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, sizes_E: jax.Array, *, blocks: Blocks | None = None
) -> jax.Array:
    """Sums as in `reference.outer`; rows of `dout_MN` after the last group must be finite."""
    K, N, E = lhs_MK.shape[1], dout_MN.shape[1], len(sizes_E)
    blocks = _fitted(blocks, N)
    call = kernels.kernel(
        functools.partial(kernels.outer_body, blocks=blocks),
        name="grouped_outer",
        out=jax.ShapeDtypeStruct((E, K, N), lhs_MK.dtype),
        lhs_tile=(kernels.WIDTH, kernels.TILE_ROWS),
        rhs_tile=(kernels.WIDTH, blocks.n),
        blocks=blocks,
    )
    sizes_E = sizes_E.astype(jnp.int32)
    ends_E = _running_sum(sizes_E)
    return call(lhs_MK, dout_MN, ends_E - sizes_E, ends_E)


def _fitted(blocks: Blocks | None, N: int) -> Blocks:
    """The blocks, or the default ones, with at most N columns."""
    blocks = blocks or Blocks()
    return dataclasses.replace(blocks, n=min(blocks.n, N))
