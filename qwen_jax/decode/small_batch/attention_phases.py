"""The attention phases of the layer kernel: attention over pages, and the merge of its splits."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from qwen_jax.decode.small_batch.kernel_types import Phase, Rows, Sizes, Tuning
from qwen_jax.ops.attention.paged import triton_blocks


def attend(
    old_kv, qkv_RW, rows: Rows, o_RXNH, lse_RXN, kv_PSCH, *, sizes: Sizes, tuning: Tuning
) -> Phase:
    """The attention phase: a unit of work is one key-value head over one split of a row."""
    del old_kv  # the same memory as kv_PSCH
    R, X = o_RXNH.shape[:2]
    K = kv_PSCH.shape[2] // 2
    units, begin = R * K * X, pl.program_id(0)

    def unit_of(i) -> triton_blocks.Split:
        unit = begin + i * tuning.programs
        r, k, x = jnp.minimum(unit // (K * X), R - 1), unit // X % K, unit % X
        length = jnp.where(unit < units, rows.lengths_R[r], 0)
        return triton_blocks.split(r, k, x, length, splits=X, tuning=tuning.attention)

    def read(i):
        return triton_blocks.read_first(
            kv_PSCH, rows.table_RM, unit_of(i), new=True, tuning=tuning.attention
        )

    def work(first):
        def one(i, loaded):
            unit = unit_of(i)

            @pl.when(unit.first < unit.last)
            def _():
                _unit(
                    qkv_RW, rows, o_RXNH, lse_RXN, kv_PSCH, unit, loaded,
                    sizes=sizes, tuning=tuning.attention,
                )  # fmt: skip

        one(0, first)
        rounds = pl.cdiv(units, tuning.programs)
        if rounds > 1:
            jax.lax.fori_loop(1, rounds, lambda i, _: one(i, read(i)), None)

    return functools.partial(read, 0), work


def _unit(
    qkv_RW,
    rows: Rows,
    o_RXNH,
    lse_RXN,
    kv_PSCH,
    unit: triton_blocks.Split,
    loaded,
    *,
    sizes,
    tuning,
) -> None:
    """Writes one unit's output and log-sum-exp, as `triton_blocks` does; applies RoPE first."""
    G, H, r, k, x = sizes.group, sizes.head_dim, unit.row, unit.head, unit.index
    height = max(triton_blocks.ROWS, pl.next_power_of_2(G))
    g = jnp.arange(height)
    head_R = k * (G + 2) + jnp.where(g < G, g, 0)
    q_RH = _rotated(qkv_RW, rows, r, head_R, H=H)
    k_H = _rotated(qkv_RW, rows, r, (k * (G + 2) + G)[None], H=H)[0]
    v_H = triton.load(qkv_RW.at[r, (k * (G + 2) + G + 1) * H + jnp.arange(H)])
    o_RH, lse_R = triton_blocks.over_blocks(
        q_RH, (k_H, v_H), kv_PSCH, kv_PSCH, rows.table_RM, unit, loaded,
        ends_R=jnp.full(height, unit.length - 1), tuning=tuning,
    )  # fmt: skip
    n_R, real_R = k * G + g, g < G
    triton.store(
        o_RXNH.at[
            r, x,
            jnp.broadcast_to(n_R[:, None], (height, H)),
            jnp.broadcast_to(jnp.arange(H)[None, :], (height, H)),
        ],
        o_RH,
        mask=jnp.broadcast_to(real_R[:, None], (height, H)),
    )  # fmt: skip
    triton.store(lse_RXN.at[r, x, n_R], lse_R, mask=real_R)


def _rotated(qkv_RW, rows: Rows, r, head_R, *, H: int) -> jax.Array:
    """Heads of one row after RoPE, as `rope.rotate` computes it: [number of heads, H]."""
    h, half = jnp.arange(H), H // 2
    shape = (head_R.shape[0], H)
    at_RH = jnp.broadcast_to(head_R[:, None] * H, shape)
    own, other = (
        triton.load(qkv_RW.at[r, at_RH + jnp.broadcast_to(i[None, :], shape)])
        for i in (h, (h + half) % H)
    )
    cos, sin = (triton.load(side.at[r, h % half]) for side in (rows.cos_Rh, rows.sin_Rh))
    other = jnp.where(h < half, -1.0, 1.0)[None, :] * other.astype(jnp.float32)
    rotated = own.astype(jnp.float32) * cos[None, :] + other * sin[None, :]
    return rotated.astype(own.dtype)


def merged(o_RXNH, lse_RXN, length, r: int, *, sizes: Sizes, tuning: triton_blocks.Tuning):
    """Attention output of one row, the sum of its splits weighted by log-sum-exp.

    [N rounded up to a power of two, H], zeros for heads beyond N and for a row that is not active.
    """
    X, N, H = o_RXNH.shape[1:]
    padded = pl.next_power_of_2(N)
    at_once = max(1, min(16384 // (padded * H), pl.next_power_of_2(X)))
    blocks, per_split = triton_blocks.blocks_of_split(length, splits=sizes.splits, tuning=tuning)
    used = pl.cdiv(blocks, per_split)
    n, h = jnp.arange(padded), jnp.arange(H)

    def several(i, carry):
        max_N, sum_N, total_NH = carry
        x = i * at_once + jnp.arange(at_once)
        real_XN = jnp.broadcast_to(x[:, None] < used, (at_once, padded)) & (n[None, :] < N)
        x_XN, n_XN = (jnp.broadcast_to(a, (at_once, padded)) for a in (x[:, None], n[None, :]))
        lse_XN = triton.load(lse_RXN.at[r, x_XN, n_XN], mask=real_XN, other=-1e30)
        shape = (at_once, padded, H)
        o_XNH = triton.load(
            o_RXNH.at[
                r,
                jnp.broadcast_to(x[:, None, None], shape),
                jnp.broadcast_to(n[None, :, None], shape),
                jnp.broadcast_to(h[None, None, :], shape),
            ],
            mask=jnp.broadcast_to(real_XN[:, :, None], shape),
            other=0,
        )
        new_N = jnp.maximum(max_N, jnp.max(lse_XN, axis=0))
        weights_XN = jnp.where(real_XN, jnp.exp2(lse_XN - new_N[None, :]), 0.0)
        old_N = jnp.exp2(max_N - new_N)
        added_NH = jnp.sum(o_XNH * weights_XN[:, :, None], axis=0)
        sum_N = sum_N * old_N + jnp.sum(weights_XN, axis=0)
        return new_N, sum_N, total_NH * old_N[:, None] + added_NH

    start = (jnp.full(padded, -1e30), jnp.zeros(padded), jnp.zeros((padded, H)))
    start = tuple(x.astype(jnp.float32) for x in start)
    _, sum_N, total_NH = jax.lax.fori_loop(0, pl.cdiv(used, at_once), several, start)
    return total_NH / jnp.where(sum_N > 0, sum_N, 1.0)[:, None]
