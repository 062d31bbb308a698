"""The matrix products of the layer kernel, each a `kernel_types.Phase` that loads weights first."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.decode.small_batch import attention_phases, row_products
from qwen_jax.decode.small_batch.kernel_types import Phase, Rows, Sizes, Tuning, Weights


def qkv(x_RD, weights: Weights, qkv_RW, *, sizes: Sizes, tuning: Tuning) -> Phase:
    """Queries, keys and values of the normalised input, before RoPE."""
    tile, W = row_products.Tile(tuning.qkv, tuning.warps), weights.qkv_WD.shape[0]
    begin = pl.program_id(0)

    def read(index):
        return row_products.read_tile(weights.qkv_WD, index, tile=tile)

    def work(first):
        x = row_products.normalise(x_RD, weights.norm_D, tile=tile, eps=sizes.eps)

        def use(index, w_TD):
            o = index * tile.outputs + jnp.arange(tile.outputs)
            bias = triton.load(weights.bias_W.at[o], mask=o < W, other=0).astype(x_RD.dtype)
            y = [y.astype(x_RD.dtype) + bias for y in row_products.times(w_TD, x)]
            row_products.write(qkv_RW, index * tile.outputs, y)

        count = pl.cdiv(W, tile.outputs)
        row_products.over_tiles(count, read, use, first=first, begin=begin, stride=tuning.programs)

    return functools.partial(read, begin), work


def o(
    o_RXNH, lse_RXN, rows: Rows, x_RD, weights: Weights, y_RD, *, sizes: Sizes, tuning: Tuning
) -> Phase:
    """x plus the output projection of attention, whose splits every program merges for itself."""
    outputs, D = tuning.o, x_RD.shape[1]
    N, H = o_RXNH.shape[2:]
    width = pl.next_power_of_2(N) * H
    begin = pl.program_id(0)

    def read(tile):
        o, c = tile * outputs + jnp.arange(outputs), jnp.arange(width)
        real = jnp.broadcast_to(o[:, None] < D, (outputs, width)) & (c[None, :] < N * H)
        o, c = (jnp.broadcast_to(i, (outputs, width)) for i in (o[:, None], c[None, :]))
        return (triton.load(weights.o_DC.at[o, c], mask=real, other=0),)

    def work(first):
        o = [
            attention_phases.merged(
                o_RXNH, lse_RXN, rows.lengths_R[r], r, sizes=sizes, tuning=tuning.attention
            )
            .reshape(1, width)
            .astype(x_RD.dtype)
            for r in range(x_RD.shape[0])
        ]

        def use(tile, w_TC):
            _add(y_RD, x_RD, tile * outputs, row_products.times(w_TC, [(x,) for x in o]))

        count = pl.cdiv(D, outputs)
        row_products.over_tiles(count, read, use, first=first, begin=begin, stride=tuning.programs)

    return functools.partial(read, begin), work


def _add(y_RD, x_RD, first, sums: list[jax.Array]) -> None:
    """Writes y = x + sums, both rounded to the dtype of x first."""
    x = row_products.read_outputs(x_RD, first, outputs=sums[0].shape[0])
    row_products.write(y_RD, first, [a + b.astype(a.dtype) for a, b in zip(x, sums, strict=True)])


def gate_up(x_RD, weights: Weights, h_RF, *, sizes: Sizes, tuning: Tuning) -> Phase:
    """The hidden activations of SwiGLU for the normalised input."""
    tile, F = row_products.Tile(tuning.gate_up, tuning.warps), weights.gate_up_2FD.shape[1]
    begin = pl.program_id(0)

    def read(index):
        return [
            row_products.read_tile(weights.gate_up_2FD, index, tile=tile, leading=(side,))
            for side in (0, 1)
        ]

    def work(first):
        x = row_products.normalise(x_RD, weights.post_norm_D, tile=tile, eps=sizes.eps)

        def use(index, pair):
            gates, ups = (row_products.times(w_TD, x) for w_TD in pair)
            h = [_gated(g, u, h_RF.dtype) for g, u in zip(gates, ups, strict=True)]
            row_products.write(h_RF, index * tile.outputs, h)

        count = pl.cdiv(F, tile.outputs)
        row_products.over_tiles(count, read, use, first=first, begin=begin, stride=tuning.programs)

    return functools.partial(read, begin), work


def _gated(gate_T, up_T, dtype) -> jax.Array:
    """silu(gate) * up, each operand rounded to `dtype` first."""
    gate_T, up_T = gate_T.astype(dtype), up_T.astype(dtype)
    wide_T = gate_T.astype(jnp.float32)
    gate_T = (wide_T / (1.0 + jnp.exp(-wide_T))).astype(dtype)
    return gate_T * up_T


def down(h_RF, x_RD, weights: Weights, y_RD, *, sizes: Sizes, tuning: Tuning) -> Phase:
    """x plus the down projection of the hidden activations."""
    del sizes
    tile, D = row_products.Tile(tuning.down, tuning.warps), weights.down_DF.shape[0]
    begin = pl.program_id(0)

    def read(index):
        return row_products.read_tile(weights.down_DF, index, tile=tile)

    def work(first):
        h = [row_products.read_row(h_RF, r, tile=tile) for r in range(h_RF.shape[0])]

        def use(index, w_TF):
            _add(y_RD, x_RD, index * tile.outputs, row_products.times(w_TF, h))

        count = pl.cdiv(D, tile.outputs)
        row_products.over_tiles(count, read, use, first=first, begin=begin, stride=tuning.programs)

    return functools.partial(read, begin), work
