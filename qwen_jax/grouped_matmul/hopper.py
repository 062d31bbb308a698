"""The grouped product on Hopper GPUs (H100, H200), in Pallas's Mosaic GPU dialect.

Both kernels are persistent: one block of threads a multiprocessor takes tiles of the result in
turn. One of its three warpgroups only copies tiles of the operands into a ring of slots in shared
memory (TMA), also those of the next result tile; the other two multiply (wgmma), half of the tile's
rows each, and store. A group's tiles start at its own first row, rounded down to the 8 that the
copies ask for, so little of a tile is other groups' rows; those are computed and not stored.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

_ROW_ALIGNMENT = 8  # of a tile's first row: the copies move whole groups of 8 rows
_WIDTH = 64  # elements of 128 bytes, the widest swizzle: every tile is made of such columns
_WARPGROUPS = 2  # that multiply
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232  # a thread, of 65,536 a multiprocessor
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Blocks:
    """Tile of the result [m, n] of one block of threads, and the slots of the ring.

    store_n: columns of a finished tile that are put into shared memory at a time.
    """

    m: int = 128
    n: int = 256
    slots: int = 4
    store_n: int = 128

    @property
    def wg_m(self) -> int:
        return self.m // _WARPGROUPS


ROWS = Blocks()
OUTER = Blocks()


def why_not(lhs_MK: jax.Array, rhs_EKN: jax.Array) -> str | None:
    """Why the kernels cannot run this call here, or None."""
    if jax.default_backend() != "gpu":
        return f"it needs a Hopper GPU, this is {jax.default_backend()}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if str(capability) != "9.0":
        return f"it needs compute capability 9.0 (H100, H200), this GPU has {capability}"
    return shape_reason(lhs_MK, rhs_EKN)


def shape_reason(lhs_MK: jax.Array, rhs_EKN: jax.Array) -> str | None:
    """Why the kernels cannot take these operands on any GPU, or None."""
    M, K = lhs_MK.shape
    if lhs_MK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {lhs_MK.dtype} is not bfloat16 or float16"
    if M % _ROW_ALIGNMENT:
        return f"{M} rows are not a multiple of {_ROW_ALIGNMENT}; pad them"
    if K % _WIDTH or rhs_EKN.shape[2] % _WIDTH:
        return f"K={K} and N={rhs_EKN.shape[2]} must both be multiples of {_WIDTH}"
    return None


@dataclass(frozen=True)
class Tiles:
    """Row tiles of all groups in order; the rows past the last group are group E's.

    group_T, row_T: the group and the first row of a tile. lo_T, hi_T: which of the tile's rows are
    the group's. count_1: how many of the T tiles there are.
    """

    group_T: jax.Array
    row_T: jax.Array
    lo_T: jax.Array
    hi_T: jax.Array
    count_1: jax.Array

    @classmethod
    def of(cls, sizes_E: jax.Array, *, M: int, block: int) -> "Tiles":
        sizes_E = sizes_E.astype(jnp.int32)
        sizes_G = jnp.append(sizes_E, M - jnp.sum(sizes_E))
        ends_G = jnp.cumsum(sizes_G)
        starts_G = ends_G - sizes_G
        aligned_G = starts_G // _ROW_ALIGNMENT * _ROW_ALIGNMENT
        tiles_G = jnp.where(sizes_G > 0, -((aligned_G - ends_G) // block), 0)
        last_G = jnp.cumsum(tiles_G)
        # Each group adds at most 7 rows of alignment and one tile that is not full.
        G = len(sizes_E) + 1
        T = (M + G * (block + _ROW_ALIGNMENT - 2)) // block
        tile_T = jnp.arange(T, dtype=jnp.int32)
        group_T = jnp.minimum(jnp.sum(tile_T[:, None] >= last_G[None, :], axis=1), G - 1)
        row_T = aligned_G[group_T] + block * (tile_T - (last_G - tiles_G)[group_T])
        lo_T = jnp.maximum(starts_G[group_T] - row_T, 0)
        hi_T = jnp.minimum(ends_G[group_T] - row_T, block)
        return cls(*(x.astype(jnp.int32) for x in (group_T, row_T, lo_T, hi_T)), last_G[-1:])


jax.tree_util.register_dataclass(Tiles)


def rows(
    lhs_MK: jax.Array,
    rhs_EKN: jax.Array,
    sizes_E: jax.Array,
    *,
    rhs_order: str,
    blocks: Blocks = ROWS,
) -> jax.Array:
    """See `reference.rows`."""
    M, K = lhs_MK.shape
    N = rhs_EKN.shape[2 if rhs_order == "EKN" else 1]
    kernel = functools.partial(_rows_kernel, rhs_order=rhs_order, blocks=blocks)
    rhs_tile = (_WIDTH, blocks.n) if rhs_order == "EKN" else (blocks.n, _WIDTH)
    call = _kernel(
        kernel,
        name=f"grouped_rows_{rhs_order.lower()}",
        out=jax.ShapeDtypeStruct((M, N), lhs_MK.dtype),
        lhs_tile=(blocks.m, _WIDTH),
        rhs_tile=rhs_tile,
        blocks=blocks,
    )
    tiles = Tiles.of(sizes_E, M=M, block=blocks.m)
    return call(lhs_MK, rhs_EKN, tiles.group_T, tiles.row_T, tiles.lo_T, tiles.hi_T, tiles.count_1)


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, sizes_E: jax.Array, *, blocks: Blocks = OUTER
) -> jax.Array:
    """See `reference.outer`; rows of `dout_MN` past the last group must be finite."""
    K, N, E = lhs_MK.shape[1], dout_MN.shape[1], len(sizes_E)
    call = _kernel(
        functools.partial(_outer_kernel, blocks=blocks),
        name="grouped_outer",
        out=jax.ShapeDtypeStruct((E, K, N), lhs_MK.dtype),
        lhs_tile=(_WIDTH, blocks.m),
        rhs_tile=(_WIDTH, blocks.n),
        blocks=blocks,
    )
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    return call(lhs_MK, dout_MN, ends_E - sizes_E.astype(jnp.int32), ends_E)


def _kernel(body, *, name: str, out, lhs_tile, rhs_tile, blocks: Blocks):
    """The kernel around `body`, with its shared memory: the ring, the results, the barriers."""
    ring = (gpu.TilingTransform((8, _WIDTH)), gpu.SwizzleTransform(128))
    # One row to a tile, so that any number of rows can be stored from any row on.
    result = (gpu.TilingTransform((1, _WIDTH)), gpu.SwizzleTransform(128))
    dtype = out.dtype
    return gpu.kernel(
        body,
        out_type=out,
        grid=(_MULTIPROCESSORS,),
        grid_names=("sm",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=name,
        scratch_types={
            "lhs_ring": gpu.SMEM((blocks.slots, *lhs_tile), dtype, transforms=ring),
            "rhs_ring": gpu.SMEM((blocks.slots, *rhs_tile), dtype, transforms=ring),
            "result": gpu.SMEM(
                (_WARPGROUPS, blocks.store_n // _WIDTH, blocks.wg_m, _WIDTH),
                dtype,
                transforms=result,
            ),
            "filled": gpu.Barrier(num_arrivals=2, num_barriers=blocks.slots),
            "emptied": gpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=blocks.slots),
        },
        compiler_params=gpu.CompilerParams(
            lowering_semantics=gpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
    )


def _rows_kernel(
    lhs, rhs, group_T, row_T, lo_T, hi_T, count_1, out, *, rhs_order, blocks,
    lhs_ring, rhs_ring, result, filled, emptied,
):  # fmt: skip
    K, N, E = lhs.shape[1], out.shape[1], rhs.shape[0]
    columns = pl.cdiv(N, blocks.n)

    def tile(work):
        t = lax.div(work, jnp.int32(columns))
        # The rows past the last group have no matrix: no steps, and the zeros are stored.
        return t, lax.rem(work, jnp.int32(columns)), lax.select(group_T[t] < E, K // _WIDTH, 0)

    def fetch(work, step, slot):
        t, column, _ = tile(work)
        inner = pl.ds(step * _WIDTH, _WIDTH)
        across = pl.ds(column * blocks.n, blocks.n)
        row = pl.multiple_of(row_T[t], _ROW_ALIGNMENT)
        source = (group_T[t], inner, across) if rhs_order == "EKN" else (group_T[t], across, inner)
        gpu.copy_gmem_to_smem(
            lhs.at[pl.ds(row, blocks.m), inner], lhs_ring.at[slot], filled.at[slot]
        )
        gpu.copy_gmem_to_smem(rhs.at[source], rhs_ring.at[slot], filled.at[slot])

    def multiply(acc, work, step, slot, wg):
        b = rhs_ring.at[slot]
        gpu.wgmma(
            acc,
            lhs_ring.at[slot, pl.ds(wg * blocks.wg_m, blocks.wg_m)],
            b if rhs_order == "EKN" else b.transpose((1, 0)),
        )

    def mine(work, wg):
        """This warpgroup's first row, and which of its rows belong to the tile's group."""
        t, _, _ = tile(work)
        skipped = wg * blocks.wg_m
        lo = jnp.clip(lo_T[t] - skipped, 0, blocks.wg_m)
        return row_T[t] + skipped, lo, jnp.clip(hi_T[t] - skipped, 0, blocks.wg_m)

    def store(work, wg, start):
        _, column, _ = tile(work)
        first, lo, hi = mine(work, wg)
        _store_rows(result.at[wg], out, first, lo, hi - lo, column * blocks.n + start)

    def has_rows(work, wg):
        _, lo, hi = mine(work, wg)
        return hi > lo

    _schedule(
        count_1[0] * columns, lambda work: tile(work)[2], fetch, multiply, store, has_rows,
        result=result, filled=filled, emptied=emptied, blocks=blocks,
    )  # fmt: skip


def _outer_kernel(
    lhs, dout, start_E, end_E, out, *, blocks, lhs_ring, rhs_ring, result, filled, emptied
):
    E, K, N = out.shape
    down, across = pl.cdiv(K, blocks.m), pl.cdiv(N, blocks.n)

    def tile(work):
        e = lax.div(work, jnp.int32(down * across))
        inside = lax.rem(work, jnp.int32(down * across))
        return e, lax.div(inside, jnp.int32(across)), lax.rem(inside, jnp.int32(across))

    def aligned(e):
        return lax.div(start_E[e], jnp.int32(_ROW_ALIGNMENT)) * _ROW_ALIGNMENT

    def steps(work):
        e = tile(work)[0]
        needed = lax.div(end_E[e] - aligned(e) + _WIDTH - 1, jnp.int32(_WIDTH))
        return lax.select(end_E[e] > start_E[e], needed, 0)

    def fetch(work, step, slot):
        e, i, j = tile(work)
        row = pl.ds(pl.multiple_of(aligned(e) + step * _WIDTH, _ROW_ALIGNMENT), _WIDTH)
        for source, column, ring in ((lhs, i * blocks.m, lhs_ring), (dout, j * blocks.n, rhs_ring)):
            width = ring.shape[2]
            gpu.copy_gmem_to_smem(
                source.at[row, pl.ds(column, width)], ring.at[slot], filled.at[slot]
            )

    def multiply(acc, work, step, slot, wg):
        e = tile(work)[0]
        a = lhs_ring.at[slot, :, pl.ds(wg * blocks.wg_m, blocks.wg_m)]
        first = aligned(e) + step * _WIDTH

        @pl.when((first < start_E[e]) | (first + _WIDTH > end_E[e]))
        def _():
            index = first + gpu.layout_cast(
                lax.broadcasted_iota(jnp.int32, (_WIDTH, blocks.wg_m), 0), gpu.Layout.WGMMA
            )
            a[...] = jnp.where((index >= start_E[e]) & (index < end_E[e]), a[...], 0)
            gpu.commit_smem()

        gpu.wgmma(acc, a.transpose((1, 0)), rhs_ring.at[slot])

    def store(work, wg, start):
        e, i, j = tile(work)
        row = i * blocks.m + wg * blocks.wg_m
        for c in range(blocks.store_n // _WIDTH):
            column = j * blocks.n + start + c * _WIDTH

            @pl.when((row < K) & (column < N))
            def _(c=c, column=column):
                gpu.copy_smem_to_gmem(
                    result.at[wg, c],
                    out.at[e, pl.ds(row, blocks.wg_m), pl.ds(column, _WIDTH)],
                    commit_group=False,
                )

    _schedule(
        E * down * across, steps, fetch, multiply, store, lambda work, wg: True,
        result=result, filled=filled, emptied=emptied, blocks=blocks,
    )  # fmt: skip


def _schedule(
    work_items, steps, fetch, multiply, store, has_rows, *, result, filled, emptied, blocks
) -> None:
    """Share the tiles among multiprocessors, and each tile's steps among the warpgroups.

    `done` counts steps over all tiles, so the ring runs on from one tile into the next: a slot is
    refilled once both multiplying warpgroups have emptied it.
    """
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    turns = lax.div(jnp.int32(work_items) - sm + _MULTIPROCESSORS - 1, jnp.int32(_MULTIPROCESSORS))
    slots = jnp.int32(blocks.slots)

    @pl.when(wg == _WARPGROUPS)
    def _():
        gpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        def turn(i, done):
            work = sm + i * _MULTIPROCESSORS

            def copy(step, done):
                slot = lax.rem(done, slots)

                @pl.when(done >= slots)
                def _():
                    gpu.barrier_wait(emptied.at[slot])

                fetch(work, step, slot)
                return done + 1

            return lax.fori_loop(0, steps(work), copy, done)

        done = lax.fori_loop(0, turns, turn, jnp.int32(0))

        def drain(use, _):
            gpu.barrier_wait(emptied.at[lax.rem(use, slots)])

        # Every phase of a barrier is waited for, also when nothing is to follow.
        lax.fori_loop(jnp.maximum(done - slots, 0), done, drain, None)

    @pl.when(wg < _WARPGROUPS)
    def _():
        gpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

        def turn(i, done):
            work = sm + i * _MULTIPROCESSORS
            count = steps(work)

            def product(acc):
                def step_of(step, _):
                    slot = lax.rem(done + step, slots)
                    gpu.barrier_wait(filled.at[slot])
                    multiply(acc, work, step, slot, wg)
                    # One product stays in flight; the one before it is done with its slot.
                    gpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _():
                        gpu.barrier_arrive(emptied.at[lax.rem(done + step - 1, slots)])

                lax.fori_loop(0, count, step_of, None)
                return acc[...].astype(result.dtype)

            def compute():
                tile = pl.run_scoped(product, gpu.ACC((blocks.wg_m, blocks.n)))

                @pl.when(count > 0)
                def _():
                    gpu.barrier_arrive(emptied.at[lax.rem(done + count - 1, slots)])

                for start in range(0, blocks.n, blocks.store_n):
                    gpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for c in range(blocks.store_n // _WIDTH):
                        at = start + c * _WIDTH
                        result[wg, c] = tile[:, at : at + _WIDTH]
                    gpu.commit_smem()
                    store(work, wg, start)
                    gpu.commit_smem_to_gmem_group()

            def skip():
                def step_of(step, _):
                    slot = lax.rem(done + step, slots)
                    gpu.barrier_wait(filled.at[slot])
                    gpu.barrier_arrive(emptied.at[slot])

                lax.fori_loop(0, count, step_of, None)

            lax.cond(has_rows(work, wg), compute, skip)
            return done + count

        lax.fori_loop(0, turns, turn, jnp.int32(0))
        gpu.wait_smem_to_gmem(0)


def _store_rows(tile, out, first, lo, count, column) -> None:
    """Rows lo ... lo + count of a warpgroup's result [columns, rows, width] to out[first + lo...].

    A copy's number of rows is fixed when it is compiled, so a count is stored as its powers of two.
    """
    size = tile.shape[1]
    while size:

        @pl.when(count & size != 0)
        def _(size=size, lo=lo):
            for c in range(tile.shape[0]):
                at = column + c * _WIDTH

                @pl.when(at < out.shape[1])
                def _(c=c, at=at):
                    gpu.copy_smem_to_gmem(
                        tile.at[c, pl.ds(lo, size)],
                        out.at[pl.ds(first + lo, size), pl.ds(at, _WIDTH)],
                        commit_group=False,
                    )

        lo = lo + (count & size)
        size //= 2
