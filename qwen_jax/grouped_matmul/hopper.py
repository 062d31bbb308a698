"""The grouped product on Hopper GPUs (H100, H200), in Pallas's Mosaic GPU dialect.

Both kernels are persistent: one block of threads a multiprocessor takes tiles of the result in
turn. One of its three warpgroups only copies tiles of the operands into a ring of slots in shared
memory (TMA), also those of the next result tile; the other two multiply (wgmma), half of the tile's
rows each, and store. A group's tiles start at its own first row, rounded down to the 8 that the
copies ask for, so little of a tile is other groups' rows; those are computed and not stored.
"""

import dataclasses
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
_WARPGROUP_ROWS = 64  # of a tile
_TILE_ROWS = _WARPGROUPS * _WARPGROUP_ROWS
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232  # a thread, of 65,536 a multiprocessor


@dataclass(frozen=True)
class Blocks:
    """Columns of a tile of the result, slots of the ring, and how a finished tile is stored.

    store_n: columns that are put into shared memory, and from there into the result, at a time.
    The defaults were the fastest of those tried on an H100; `docs/experiments.md` has the table.
    """

    n: int = 256
    slots: int = 4
    store_n: int = 128


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
    N = rhs_EKN.shape[2]
    if lhs_MK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {lhs_MK.dtype} is not bfloat16 or float16"
    if M % _ROW_ALIGNMENT or M < _TILE_ROWS:
        return f"{M} rows are not {_TILE_ROWS} or more and a multiple of {_ROW_ALIGNMENT}; pad them"
    if K % _WIDTH or N % _WIDTH or min(K, N) < _TILE_ROWS:
        return f"K={K} and N={N} must be multiples of {_WIDTH} and at least {_TILE_ROWS}"
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
    def of(cls, sizes_E: jax.Array, *, M: int) -> "Tiles":
        sizes_E = sizes_E.astype(jnp.int32)
        sizes_G = jnp.append(sizes_E, M - jnp.sum(sizes_E))
        G = len(sizes_G)
        ends_G = _running_sum(sizes_G)
        starts_G = ends_G - sizes_G
        aligned_G = starts_G // _ROW_ALIGNMENT * _ROW_ALIGNMENT
        tiles_G = jnp.where(sizes_G > 0, -((aligned_G - ends_G) // _TILE_ROWS), 0)
        last_G = _running_sum(tiles_G)
        # Each group adds at most 7 rows of alignment and one tile that is not full.
        T = (M + G * (_TILE_ROWS + _ROW_ALIGNMENT - 2)) // _TILE_ROWS
        tile_T = jnp.arange(T, dtype=jnp.int32)
        group_T = jnp.minimum(jnp.sum(tile_T[:, None] >= last_G[None, :], axis=1), G - 1)
        row_T = aligned_G[group_T] + _TILE_ROWS * (tile_T - (last_G - tiles_G)[group_T])
        lo_T = jnp.maximum(starts_G[group_T] - row_T, 0)
        hi_T = jnp.minimum(ends_G[group_T] - row_T, _TILE_ROWS)
        parts = group_T, row_T, lo_T, hi_T, jnp.minimum(last_G[-1:], T)
        return cls(*(x.astype(jnp.int32) for x in parts))


jax.tree_util.register_dataclass(Tiles)


def _running_sum(x_G: jax.Array) -> jax.Array:
    """`jnp.cumsum` as one small reduction, where XLA would run a scan of many kernels."""
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
    """See `reference.rows`."""
    M = len(lhs_MK)
    N = rhs_EKN.shape[2 if rhs_order == "EKN" else 1]
    blocks = _fitted(blocks, N)
    call = _kernel(
        functools.partial(_rows_kernel, rhs_order=rhs_order, blocks=blocks),
        name=f"grouped_rows_{rhs_order.lower()}",
        out=jax.ShapeDtypeStruct((M, N), lhs_MK.dtype),
        lhs_tile=(_TILE_ROWS, _WIDTH),
        rhs_tile=(_WIDTH, blocks.n) if rhs_order == "EKN" else (blocks.n, _WIDTH),
        blocks=blocks,
    )
    tiles = Tiles.of(sizes_E, M=M)
    return call(lhs_MK, rhs_EKN, tiles.group_T, tiles.row_T, tiles.lo_T, tiles.hi_T, tiles.count_1)


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, sizes_E: jax.Array, *, blocks: Blocks | None = None
) -> jax.Array:
    """See `reference.outer`; rows of `dout_MN` past the last group must be finite."""
    K, N, E = lhs_MK.shape[1], dout_MN.shape[1], len(sizes_E)
    blocks = _fitted(blocks, N)
    call = _kernel(
        functools.partial(_outer_kernel, blocks=blocks),
        name="grouped_outer",
        out=jax.ShapeDtypeStruct((E, K, N), lhs_MK.dtype),
        lhs_tile=(_WIDTH, _TILE_ROWS),
        rhs_tile=(_WIDTH, blocks.n),
        blocks=blocks,
    )
    sizes_E = sizes_E.astype(jnp.int32)
    ends_E = _running_sum(sizes_E)
    return call(lhs_MK, dout_MN, ends_E - sizes_E, ends_E)


def _fitted(blocks: Blocks | None, N: int) -> Blocks:
    blocks = blocks or Blocks()
    return dataclasses.replace(blocks, n=min(blocks.n, N))


def _kernel(body, *, name: str, out, lhs_tile, rhs_tile, blocks: Blocks):
    """The kernel around `body`, with its shared memory: the ring, the results, the barriers."""
    ring = (gpu.TilingTransform((8, _WIDTH)), gpu.SwizzleTransform(128))
    # One row to a tile, so that any number of rows can be stored from any row on.
    result = (gpu.TilingTransform((1, _WIDTH)), gpu.SwizzleTransform(128))
    stored = (_WARPGROUPS, blocks.store_n // _WIDTH, _WARPGROUP_ROWS, _WIDTH)
    multiprocessors = _multiprocessors()
    return gpu.kernel(
        functools.partial(body, multiprocessors=multiprocessors),
        out_type=out,
        grid=(multiprocessors,),
        grid_names=("sm",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=name,
        scratch_types={
            "lhs_ring": gpu.SMEM((blocks.slots, *lhs_tile), out.dtype, transforms=ring),
            "rhs_ring": gpu.SMEM((blocks.slots, *rhs_tile), out.dtype, transforms=ring),
            "result": gpu.SMEM(stored, out.dtype, transforms=result),
            "filled": gpu.Barrier(num_arrivals=2, num_barriers=blocks.slots),
            "emptied": gpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=blocks.slots),
        },
        compiler_params=gpu.CompilerParams(
            lowering_semantics=gpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
        ),
    )


def _multiprocessors() -> int:
    """Of this GPU; an H100's where there is none, for lowering and the interpreter."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 132


def _rows_kernel(
    lhs, rhs, group_T, row_T, lo_T, hi_T, count_1, out,
    *, rhs_order, blocks, multiprocessors, lhs_ring, rhs_ring, result, filled, emptied,
):  # fmt: skip
    K, N, E = lhs.shape[1], out.shape[1], rhs.shape[0]
    columns = pl.cdiv(N, blocks.n)

    def place(work):
        return lax.div(work, jnp.int32(columns)), lax.rem(work, jnp.int32(columns))

    def steps(work):
        # The rows past the last group have no matrix: no steps, and the zeros are stored.
        return lax.select(group_T[place(work)[0]] < E, jnp.int32(K // _WIDTH), jnp.int32(0))

    def fetch(work, step, slot):
        t, column = place(work)
        inner = pl.ds(step * _WIDTH, _WIDTH)
        across = pl.ds(column * blocks.n, blocks.n)
        row = pl.multiple_of(row_T[t], _ROW_ALIGNMENT)
        matrix = (group_T[t], inner, across) if rhs_order == "EKN" else (group_T[t], across, inner)
        gpu.copy_gmem_to_smem(
            lhs.at[pl.ds(row, _TILE_ROWS), inner], lhs_ring.at[slot], filled.at[slot]
        )
        gpu.copy_gmem_to_smem(rhs.at[matrix], rhs_ring.at[slot], filled.at[slot])

    def multiply(acc, work, step, slot, wg):
        width = pl.ds(0, acc.shape[1])
        a = lhs_ring.at[slot, pl.ds(wg * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]
        if rhs_order == "EKN":
            gpu.wgmma(acc, a, rhs_ring.at[slot, :, width])
        else:
            gpu.wgmma(acc, a, rhs_ring.at[slot, width].transpose((1, 0)))

    def mine(work, wg):
        """Where this warpgroup's rows are in the result, and which of them are the group's."""
        t, _ = place(work)
        skipped = wg * _WARPGROUP_ROWS
        lo, hi = (jnp.clip(x[t] - skipped, 0, _WARPGROUP_ROWS) for x in (lo_T, hi_T))
        return row_T[t] + skipped, lo, hi

    def has_rows(work, wg):
        _, lo, hi = mine(work, wg)
        return hi > lo

    def store(work, wg, chunk, start):
        _, column = place(work)
        first, lo, hi = mine(work, wg)
        count = hi - lo
        # A copy's number of rows is fixed when it is compiled: the count's powers of two.
        size = _WARPGROUP_ROWS
        while size:

            @pl.when(count & size != 0)
            def _(size=size, lo=lo):
                gpu.copy_smem_to_gmem(
                    result.at[wg, chunk, pl.ds(lo, size)],
                    out.at[pl.ds(first + lo, size), pl.ds(column * blocks.n + start, _WIDTH)],
                    commit_group=False,
                )

            lo = lo + (count & size)
            size //= 2

    _schedule(
        count_1[0] * columns, multiprocessors,
        steps=steps, fetch=fetch, multiply=multiply, store=store, has_rows=has_rows,
        is_last=lambda work: place(work)[1] == columns - 1, last_n=N % blocks.n,
        blocks=blocks, result=result, filled=filled, emptied=emptied,
    )  # fmt: skip


def _outer_kernel(
    lhs, dout, start_E, end_E, out,
    *, blocks, multiprocessors, lhs_ring, rhs_ring, result, filled, emptied,
):  # fmt: skip
    E, K, N = out.shape
    down, across = pl.cdiv(K, _TILE_ROWS), pl.cdiv(N, blocks.n)

    def place(work):
        e = lax.div(work, jnp.int32(down * across))
        inside = lax.rem(work, jnp.int32(down * across))
        return e, lax.div(inside, jnp.int32(across)), lax.rem(inside, jnp.int32(across))

    def aligned(e):
        return lax.div(start_E[e], jnp.int32(_ROW_ALIGNMENT)) * _ROW_ALIGNMENT

    def steps(work):
        e = place(work)[0]
        needed = lax.div(end_E[e] - aligned(e) + _WIDTH - 1, jnp.int32(_WIDTH))
        return lax.select(end_E[e] > start_E[e], needed, jnp.int32(0))

    def fetch(work, step, slot):
        e, i, j = place(work)
        row = pl.ds(pl.multiple_of(aligned(e) + step * _WIDTH, _ROW_ALIGNMENT), _WIDTH)
        for source, column, ring in (
            (lhs, i * _TILE_ROWS, lhs_ring),
            (dout, j * blocks.n, rhs_ring),
        ):
            gpu.copy_gmem_to_smem(
                source.at[row, pl.ds(column, ring.shape[2])], ring.at[slot], filled.at[slot]
            )

    def multiply(acc, work, step, slot, wg):
        e = place(work)[0]
        a = lhs_ring.at[slot, :, pl.ds(wg * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]
        first = aligned(e) + step * _WIDTH

        @pl.when((first < start_E[e]) | (first + _WIDTH > end_E[e]))
        def _():
            index = first + gpu.layout_cast(
                lax.broadcasted_iota(jnp.int32, (_WIDTH, _WARPGROUP_ROWS), 0), gpu.Layout.WGMMA
            )
            a[...] = jnp.where((index >= start_E[e]) & (index < end_E[e]), a[...], 0)
            gpu.commit_smem()

        gpu.wgmma(acc, a.transpose((1, 0)), rhs_ring.at[slot, :, pl.ds(0, acc.shape[1])])

    def row_of(work, wg):
        return place(work)[1] * _TILE_ROWS + wg * _WARPGROUP_ROWS

    def store(work, wg, chunk, start):
        e, _, j = place(work)
        column = pl.ds(j * blocks.n + start, _WIDTH)
        gpu.copy_smem_to_gmem(
            result.at[wg, chunk],
            out.at[e, pl.ds(row_of(work, wg), _WARPGROUP_ROWS), column],
            commit_group=False,
        )

    _schedule(
        E * down * across, multiprocessors,
        steps=steps, fetch=fetch, multiply=multiply, store=store,
        has_rows=lambda work, wg: row_of(work, wg) < K,
        is_last=lambda work: place(work)[2] == across - 1, last_n=N % blocks.n,
        blocks=blocks, result=result, filled=filled, emptied=emptied,
    )  # fmt: skip


def _schedule(
    tiles, multiprocessors,
    *, steps, fetch, multiply, store, has_rows, is_last, last_n, blocks, result, filled, emptied,
) -> None:  # fmt: skip
    """Share the tiles among multiprocessors, and each tile's steps among the warpgroups.

    steps(work): products that make a tile, one slot of the ring each. fetch(work, step, slot) and
    multiply(acc, work, step, slot, wg) do one. store(work, wg, chunk, start) takes a warpgroup's
    columns start ... start + 64 from `result`'s chunk. is_last(work): the tile is of the result's
    last columns, and has last_n of them, if that is not 0.

    `done` counts steps over all tiles, so the ring runs on from one tile into the next: a slot is
    refilled once both multiplying warpgroups have emptied it.
    """
    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    turns = lax.div(jnp.int32(tiles) - sm + multiprocessors - 1, jnp.int32(multiprocessors))
    slots = jnp.int32(blocks.slots)

    def take_turns(turn):
        def one(i, done):
            work = sm + i * multiprocessors
            count = steps(work)
            turn(work, count, done)
            return done + count

        return lax.fori_loop(0, turns, one, jnp.int32(0))

    @pl.when(wg == _WARPGROUPS)
    def _():
        gpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        def copy(work, count, done):
            def one(step, _):
                slot = lax.rem(done + step, slots)

                @pl.when(done + step >= slots)
                def _():
                    gpu.barrier_wait(emptied.at[slot])

                fetch(work, step, slot)

            lax.fori_loop(0, count, one, None)

        done = take_turns(copy)

        def drain(use, _):
            gpu.barrier_wait(emptied.at[lax.rem(use, slots)])

        # Every phase of a barrier is waited for, also when nothing is to follow.
        lax.fori_loop(jnp.maximum(done - slots, 0), done, drain, None)

    @pl.when(wg < _WARPGROUPS)
    def _():
        gpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

        def compute(width, work, count, done):
            def product(acc):
                def one(step, _):
                    slot = lax.rem(done + step, slots)
                    gpu.barrier_wait(filled.at[slot])
                    multiply(acc, work, step, slot, wg)
                    # One product stays in flight; the one before it is done with its slot.
                    gpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _():
                        gpu.barrier_arrive(emptied.at[lax.rem(done + step - 1, slots)])

                lax.fori_loop(0, count, one, None)
                return acc[...].astype(result.dtype)

            tile = pl.run_scoped(product, gpu.ACC((_WARPGROUP_ROWS, width)))

            @pl.when(count > 0)
            def _():
                gpu.barrier_arrive(emptied.at[lax.rem(done + count - 1, slots)])

            for start in range(0, width, blocks.store_n):
                parts = range(start, min(width, start + blocks.store_n), _WIDTH)
                gpu.wait_smem_to_gmem(0, wait_read_only=True)
                for chunk, at in enumerate(parts):
                    result[wg, chunk] = tile[:, at : at + _WIDTH]
                gpu.commit_smem()
                for chunk, at in enumerate(parts):
                    store(work, wg, chunk, at)
                gpu.commit_smem_to_gmem_group()

        def skip(work, count, done):
            def one(step, _):
                slot = lax.rem(done + step, slots)
                gpu.barrier_wait(filled.at[slot])
                gpu.barrier_arrive(emptied.at[slot])

            lax.fori_loop(0, count, one, None)

        def multiply_and_store(work, count, done):
            if not last_n:
                return compute(blocks.n, work, count, done)
            return lax.cond(
                is_last(work),
                functools.partial(compute, last_n, work, count, done),
                functools.partial(compute, blocks.n, work, count, done),
            )

        def turn(work, count, done):
            lax.cond(
                has_rows(work, wg),
                functools.partial(multiply_and_store, work, count, done),
                functools.partial(skip, work, count, done),
            )

        take_turns(turn)
        gpu.wait_smem_to_gmem(0)
