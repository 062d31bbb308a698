"""The kernels of `qwen_jax.ops.grouped_matmul.hopper`, in Pallas's Mosaic GPU dialect.

Both are persistent: each multiprocessor has one block of threads, which computes tiles of the
result one after the other. One of its three warpgroups only copies tiles of the operands into a
ring of slots in shared memory (TMA), already those of the next result tile; the other two multiply
(wgmma), half of the tile's rows each, and store. A group's tiles start at its own first row,
rounded down to the multiple of 8 that the copies require, so that few rows of a tile are other
groups' rows; those are computed and not stored.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

ROW_ALIGNMENT = 8  # a tile's first row is a multiple: the copies move whole groups of 8 rows
WIDTH = 64  # elements of 128 bytes, the widest swizzle: every tile is made of such columns
_WARPGROUPS = 2  # warpgroups that multiply
_WARPGROUP_ROWS = 64  # rows of a tile that a warpgroup multiplies
TILE_ROWS = _WARPGROUPS * _WARPGROUP_ROWS
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232  # a thread, of 65,536 a multiprocessor


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel: n columns of a result tile, slots of the ring, columns of a store.

    store_n: columns that are copied through shared memory into the result at a time.
    The defaults were the fastest of those tried on an H100: the table is in
    `docs/experiments/moe.md`.
    """

    n: int = 256
    slots: int = 4
    store_n: int = 128


def kernel(body, *, name: str, out, lhs_tile, rhs_tile, blocks: Blocks):
    """The call of `body`, with its shared memory: the ring, the results, the barriers."""
    ring = (gpu.TilingTransform((8, WIDTH)), gpu.SwizzleTransform(128))
    # One row to a tile, so that any number of rows can be stored from any row on.
    result = (gpu.TilingTransform((1, WIDTH)), gpu.SwizzleTransform(128))
    stored = (_WARPGROUPS, blocks.store_n // WIDTH, _WARPGROUP_ROWS, WIDTH)
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
    """Number of multiprocessors of this GPU; without a GPU an H100's, for lowering and tests."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 132


def rows_body(
    lhs, rhs, group_T, row_T, lo_T, hi_T, count_1, out,
    *, rhs_order, blocks, multiprocessors, lhs_ring, rhs_ring, result, filled, emptied,
):  # fmt: skip
    K, N, E = lhs.shape[1], out.shape[1], rhs.shape[0]
    columns = pl.cdiv(N, blocks.n)

    def place(work):
        return lax.div(work, jnp.int32(columns)), lax.rem(work, jnp.int32(columns))

    def steps(work):
        # The rows past the last group have no matrix: no steps, and the zeros are stored.
        return lax.select(group_T[place(work)[0]] < E, jnp.int32(K // WIDTH), jnp.int32(0))

    def fetch(work, step, slot):
        t, column = place(work)
        inner = pl.ds(step * WIDTH, WIDTH)
        across = pl.ds(column * blocks.n, blocks.n)
        row = pl.multiple_of(row_T[t], ROW_ALIGNMENT)
        matrix = (group_T[t], inner, across) if rhs_order == "EKN" else (group_T[t], across, inner)
        gpu.copy_gmem_to_smem(
            lhs.at[pl.ds(row, TILE_ROWS), inner], lhs_ring.at[slot], filled.at[slot]
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
        """The first row of this warpgroup in the result, and the range of the group's rows."""
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
                    out.at[pl.ds(first + lo, size), pl.ds(column * blocks.n + start, WIDTH)],
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


def outer_body(
    lhs, dout, start_E, end_E, out,
    *, blocks, multiprocessors, lhs_ring, rhs_ring, result, filled, emptied,
):  # fmt: skip
    E, K, N = out.shape
    down, across = pl.cdiv(K, TILE_ROWS), pl.cdiv(N, blocks.n)

    def place(work):
        e = lax.div(work, jnp.int32(down * across))
        inside = lax.rem(work, jnp.int32(down * across))
        return e, lax.div(inside, jnp.int32(across)), lax.rem(inside, jnp.int32(across))

    def aligned(e):
        return lax.div(start_E[e], jnp.int32(ROW_ALIGNMENT)) * ROW_ALIGNMENT

    def steps(work):
        e = place(work)[0]
        needed = lax.div(end_E[e] - aligned(e) + WIDTH - 1, jnp.int32(WIDTH))
        return lax.select(end_E[e] > start_E[e], needed, jnp.int32(0))

    def fetch(work, step, slot):
        e, i, j = place(work)
        row = pl.ds(pl.multiple_of(aligned(e) + step * WIDTH, ROW_ALIGNMENT), WIDTH)
        for source, column, ring in (
            (lhs, i * TILE_ROWS, lhs_ring),
            (dout, j * blocks.n, rhs_ring),
        ):
            gpu.copy_gmem_to_smem(
                source.at[row, pl.ds(column, ring.shape[2])], ring.at[slot], filled.at[slot]
            )

    def multiply(acc, work, step, slot, wg):
        e = place(work)[0]
        a = lhs_ring.at[slot, :, pl.ds(wg * _WARPGROUP_ROWS, _WARPGROUP_ROWS)]
        first = aligned(e) + step * WIDTH

        @pl.when((first < start_E[e]) | (first + WIDTH > end_E[e]))
        def _():
            index = first + gpu.layout_cast(
                lax.broadcasted_iota(jnp.int32, (WIDTH, _WARPGROUP_ROWS), 0), gpu.Layout.WGMMA
            )
            a[...] = jnp.where((index >= start_E[e]) & (index < end_E[e]), a[...], 0)
            gpu.commit_smem()

        gpu.wgmma(acc, a.transpose((1, 0)), rhs_ring.at[slot, :, pl.ds(0, acc.shape[1])])

    def row_of(work, wg):
        return place(work)[1] * TILE_ROWS + wg * _WARPGROUP_ROWS

    def store(work, wg, chunk, start):
        e, _, j = place(work)
        column = pl.ds(j * blocks.n + start, WIDTH)
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
    """Computes the tiles: shared among multiprocessors, a tile's steps among warpgroups.

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
                parts = range(start, min(width, start + blocks.store_n), WIDTH)
                gpu.wait_smem_to_gmem(0, wait_read_only=True)
                for chunk, at in enumerate(parts):
                    result[wg, chunk] = tile[:, at : at + WIDTH]
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
