"""The grouped product on a TPU, by the Megablox kernels that JAX carries (Pallas).

Source: Gale et al., MegaBlocks, https://arxiv.org/abs/2211.15841.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# The package hides its module `gmm` behind a function of that name.
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# A kernel may use 16 MiB of VMEM on every generation unless it asks for more; the compiler needs
# some for itself (masks, float32 copies of the blocks).
_VMEM = 11 * 2**20
# Rough costs in bfloat16 operations, of a byte of HBM (166 on v5p, 240 on v5e, 560 on v6e) and of
# the start of a step of a kernel's loop (a third of a microsecond). They rank blocks, nothing else.
_FLOPS_PER_BYTE = 300
_FLOPS_PER_STEP = 7e7
_LANES = 128


@dataclass(frozen=True)
class Blocks:
    """Sizes of one step: rows, contracted columns, result columns; for `outer`: rows, K, N."""

    m: int
    k: int
    n: int

    def as_tuple(self) -> tuple[int, int, int]:
        """(m, k, n), as the kernels take them."""
        return self.m, self.k, self.n


def unsupported(lhs_MK: jax.Array, rhs_EKN: jax.Array) -> str | None:
    """The reason why the kernels cannot take these operands on any TPU; None: they can."""
    M, K = lhs_MK.shape
    if lhs_MK.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {lhs_MK.dtype} is not bfloat16 or float32"
    if not _row_blocks(M, lhs_MK.dtype):
        return f"{M} rows are not a multiple of {_sublanes(lhs_MK.dtype)}; pad them"
    if K % _LANES or rhs_EKN.shape[2] % _LANES:
        return f"K={K} and N={rhs_EKN.shape[2]} must both be multiples of {_LANES}"
    return None


def rows(lhs_MK: jax.Array, rhs_EKN: jax.Array, sizes_E: jax.Array, *, rhs_order: str) -> jax.Array:
    """Products as in `reference.rows`."""
    M, K = lhs_MK.shape
    E, _, N = rhs_EKN.shape if rhs_order == "EKN" else _swapped(rhs_EKN.shape)
    out_MN = gmm(
        lhs_MK,
        rhs_EKN,
        sizes_E,
        lhs_MK.dtype,
        rows_blocks(M, K, N, E, lhs_MK.dtype).as_tuple(),
        transpose_rhs=rhs_order == "ENK",
    )
    # The kernel does not write blocks after the last group: they hold arbitrary memory.
    return jnp.where((jnp.arange(M) < jnp.sum(sizes_E))[:, None], out_MN, 0)


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Sums as in `reference.outer`."""
    M, K = lhs_MK.shape
    N = dout_MN.shape[1]
    return tgmm(
        lhs_MK.T,  # the kernel transposes it back, which cancels
        dout_MN,
        sizes_E,
        lhs_MK.dtype,
        outer_blocks(M, K, N, len(sizes_E), lhs_MK.dtype).as_tuple(),
    )


def rows_blocks(M: int, K: int, N: int, E: int, dtype) -> Blocks:
    """Block sizes of `rows` with the least estimated time among those that fit VMEM.

    A block of rhs stays in VMEM from one row block to the next while neither the group nor the
    column changes, which needs all of K in one block.
    """
    size = jnp.dtype(dtype).itemsize

    def fits(b: Blocks) -> bool:
        blocks = 2 * size * (b.m * b.k + b.k * b.n + b.m * b.n)
        return blocks + 4 * b.m * b.n <= _VMEM

    def cost(b: Blocks) -> float:
        visits = M // b.m + E - 1
        columns = -(-N // b.n)
        steps_k = -(-K // b.k)
        rhs_reads = E if steps_k == 1 else visits
        moved = size * (columns * (visits * b.m * K + rhs_reads * K * b.n) + M * N)
        return _cost(b, visits * steps_k * columns, moved)

    return min(filter(fits, _candidates(M, K, N, dtype)), key=cost)


def outer_blocks(M: int, K: int, N: int, E: int, dtype) -> Blocks:
    """Block sizes of `outer` with the least estimated time among those that fit VMEM.

    Rows are the innermost loop; the result of a group stays in VMEM.
    """
    size = jnp.dtype(dtype).itemsize

    def fits(b: Blocks) -> bool:
        blocks = 2 * size * (b.m * b.k + b.m * b.n + b.k * b.n)
        # Both operands are masked in float32.
        return blocks + 4 * (b.k * b.n + b.m * (b.k + b.n)) <= _VMEM

    def cost(b: Blocks) -> float:
        visits = M // b.m + E - 1
        blocks = -(-K // b.k) * -(-N // b.n)
        moved = size * (blocks * visits * b.m * (b.k + b.n) + E * K * N)
        return _cost(b, visits * blocks, moved)

    return min(filter(fits, _candidates(M, K, N, dtype)), key=cost)


def _cost(b: Blocks, steps: int, moved: float) -> float:
    """Estimated time in operations.

    The larger of arithmetic and memory traffic, a tenth of the smaller, and the steps' starts.
    """
    # The matrix unit takes as long for fewer rows than it has.
    arithmetic = steps * 2 * max(b.m, _LANES) * b.k * b.n
    terms = sorted((arithmetic, moved * _FLOPS_PER_BYTE))
    return terms[1] + 0.1 * terms[0] + steps * _FLOPS_PER_STEP


def _candidates(M: int, K: int, N: int, dtype) -> list[Blocks]:
    """Block sizes that the kernels accept for these shapes."""
    ks = [k for k in range(_LANES, K + 1, _LANES) if K % k == 0]
    ns = range(_LANES, N + 1, _LANES)
    return [Blocks(*b) for b in itertools.product(_row_blocks(M, dtype), ks, ns)]


def _row_blocks(M: int, dtype) -> list[int]:
    """Block sizes in rows that divide M, as the kernels require, and fill whole register tiles."""
    return [m for m in (512, 256, 128, 64, 32, 16, 8) if M % m == 0 and m >= _sublanes(dtype)]


def _sublanes(dtype) -> int:
    """Rows of a register tile of this dtype."""
    return 32 // jnp.dtype(dtype).itemsize


def _swapped(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape with its last two sizes exchanged."""
    E, N, K = shape
    return E, K, N
