"""Exact causal attention over lengths that no device holds whole: the schedules, and zigzag order.

Ring attention (arXiv 2310.01889) with the zigzag split: a sequence has 2n chunks, and device i of n
holds chunks i and 2n-1-i, so that causal work is the same on every device. Keys and values go round
the ring; in every round a device computes two chunk x chunk products, without a causal mask:

    round 0           its own two chunks: ordinary causal attention
    from device j<i   both of its chunks see chunk j, and none sees chunk 2n-1-j
    from device j>i   chunk 2n-1-i alone sees both chunks j and 2n-1-j

Blocks are merged by their log-sum-exp. The kernel of a block is an argument (`Blocks`): this file
only holds the schedule of blocks and of transfers. Everything here runs inside `jax.shard_map`;
arrays are one device's shard. `ids` are segment ids of packed rows, or None.

Each device needs 1/n of the memory of attention on one device: the backward pass keeps q, k, v, o
and the log-sum-exp of the local chunks, and sends keys and values round the ring again, together
with the float32 sums of their gradients.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from partitioning import sharding
from partitioning.sharding import Layout

# Name of the residuals that a remat policy keeps so that the backward pass skips the forward ring.
RESIDUAL_NAME = "attention_out"


@dataclass(frozen=True)
class BlockMask:
    """Mask of a block: a query sees a key if every condition that is set holds.

    causal: s <= t, both counted from the block's start. q_ids_BT, kv_ids_BS: segment ids of queries
    and keys must be equal. Tokens of one segment are contiguous, and in a block that is not causal
    every query lies behind every key.
    """

    causal: bool
    q_ids_BT: jax.Array | None = None
    kv_ids_BS: jax.Array | None = None


jax.tree_util.register_dataclass(BlockMask, ["q_ids_BT", "kv_ids_BS"], ["causal"])


@dataclass(frozen=True)
class Rows:
    """Residuals of a block's queries, over all their keys, for the backward pass.

    o, its gradient do, the log-sum-exp, and di = sum_h(o do); a kernel may use only some of them.
    """

    o_BTNH: jax.Array
    do_BTNH: jax.Array
    lse_BNT: jax.Array
    di_BNT: jax.Array


jax.tree_util.register_dataclass(Rows, ["o_BTNH", "do_BTNH", "lse_BNT", "di_BNT"], [])


@dataclass(frozen=True)
class Blocks:
    """Forward and backward kernels of attention over one block of keys.

    forward(q_BTNH, k_BSKH, v_BSKH, mask=BlockMask) -> o_BTNH, lse_BNT: normalised within the block,
    and the float32 log-sum-exp of its scores q k^T: q comes scaled. Where a query sees no key of
    the block, o is finite and lse so low that exp(lse) is 0.

    backward(q, k, v, mask=BlockMask, rows=Rows) -> dq, dk, dv: the block's share.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def zigzag(x_BT: jax.Array, layout: Layout) -> jax.Array:
    """Tokens in zigzag order, [B, T_X], from tokens in sequence order, [B, T_X].

    [B, T_X] -> collective-permute -> [B, T_X], where X are the n devices that shard `length`.
    Before, device i holds chunks 2i and 2i+1; one permutation moves the even chunks, another the
    odd chunks.
    Raises `ValueError` if T does not divide into 2n chunks.
    """
    n = layout.size("length")
    if n == 1:
        return x_BT
    check_length(x_BT.shape[1], n)
    (axis,) = layout.rules.mesh_axes("length")
    order = chunk_order(n)

    def local(x_BT: jax.Array) -> jax.Array:
        even, odd = (
            jax.lax.ppermute(half, axis, [(i, order.index(2 * i + parity) // 2) for i in range(n)])
            for parity, half in enumerate(_halves(x_BT))
        )
        even_first = jax.lax.axis_index(axis) % 2 == 0  # chunk i is the lower one
        return jnp.concatenate(
            [jnp.where(even_first, even, odd), jnp.where(even_first, odd, even)], axis=1
        )

    spec: PartitionSpec = sharding.spec(("batch", "length"), layout)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=spec, out_specs=spec, check_vma=False)(
        x_BT
    )


def chunk_order(num_devices: int) -> tuple[int, ...]:
    """Chunk numbers of a sequence in zigzag order, two for each device."""
    last = 2 * num_devices - 1
    return tuple(chunk for i in range(num_devices) for chunk in (i, last - i))


def check_length(length: int, num_devices: int) -> None:
    """Raises `ValueError` unless a sequence splits into two chunks a device."""
    chunks = 2 * num_devices
    if length % chunks:
        raise ValueError(
            f"sequence length {length} does not split into {chunks} chunks, two for each of "
            f"context={num_devices} devices; use a multiple of {chunks}, such as "
            f"{max(1, round(length / chunks)) * chunks}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attention(
    schedule: str, blocks: Blocks, axis: str, q_BTNH, k_BTKH, v_BTKH, ids_BT
) -> jax.Array:
    """Causal attention of this device's two chunks over the whole sequence -> [B, T, N, H].

    schedule `ring`: [B, T_X, K, H] -> collective-permute, n - 1 times, each beside the block that
    it does not concern. `all_gather`: [B, T_X, K, H] -> all-gather -> [X, B, T, K, H] before the
    first block but the own one, and gradients by reduce-scatter; keys and values of the whole
    sequence are on every device while a layer runs.
    """
    return _forward(schedule, blocks, axis, q_BTNH, k_BTKH, v_BTKH, ids_BT)[0]


def _forward(schedule, blocks, axis, q, k, v, ids):
    forward, _ = _SCHEDULES[schedule]
    (early_o, early_lse), (late_o, late_lse) = forward(blocks, axis, _scaled(q), k, v, ids)
    o = checkpoint_name(jnp.concatenate([early_o, late_o], axis=1).astype(q.dtype), RESIDUAL_NAME)
    lse = checkpoint_name(jnp.concatenate([early_lse, late_lse], axis=2), RESIDUAL_NAME)
    return o, (q, k, v, ids, o, lse)


def _backward(schedule, blocks, axis, residuals, do):
    _, backward = _SCHEDULES[schedule]
    q, k, v, ids, o, lse = residuals
    # float32 island: these sums cancel most of dP.
    di = jnp.einsum("btnh,btnh->bnt", o, do, preferred_element_type=jnp.float32)
    rows = Rows(o, do, lse, di)
    dq, dk, dv = backward(blocks, axis, _scaled(q), k, v, ids, rows)
    dq = jnp.concatenate(dq, axis=1)
    return _scaled(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attention.defvjp(_forward, _backward)


def _ring_forward(blocks, axis, q, k, v, ids):
    n = jax.lax.axis_size(axis)
    visitors = _shift((k, v, ids), axis)
    total = _own_forward(blocks, q, k, v, ids)
    visit = functools.partial(_visit_forward, blocks, axis, _both_and_second(q, ids))

    def round_(carry, distance):
        total, visitors = carry
        coming = _shift(visitors, axis)  # issued before the block, which does not need it
        return (visit(total, visitors, distance), coming), None

    if n > 2:
        (total, visitors), _ = jax.lax.scan(round_, (total, visitors), jnp.arange(1, n - 1))
    return visit(total, visitors, n - 1)


def _ring_backward(blocks, axis, q, k, v, ids, rows):
    n = jax.lax.axis_size(axis)
    visitors = _shift((k, v, ids), axis)
    dq, *d_own = _own_backward(blocks, q, k, v, ids, rows)
    visit = functools.partial(_visit_backward, blocks, axis, _both_and_second(q, ids, rows))

    def round_(carry, distance):
        dq, visitors, sums = carry
        coming, sums = _shift((visitors, sums), axis)
        dq, *d_visitors = visit(dq, visitors, distance)
        return (dq, coming, _add(sums, d_visitors)), None

    # Gradients travel with their keys and values from the first device that has some to add.
    coming = _shift(visitors, axis) if n > 2 else None
    dq, *sums = visit(dq, visitors, 1)
    sums = _float32(sums)
    if n > 2:
        carry = (dq, coming, sums)
        (dq, visitors, sums), _ = jax.lax.scan(round_, carry, jnp.arange(2, n - 1))
        sums = _shift(sums, axis)
        dq, *d_visitors = visit(dq, visitors, n - 1)
        sums = _add(sums, d_visitors)
    return dq, *_add(_shift(sums, axis), d_own)


def _gather_forward(blocks, axis, q, k, v, ids):
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    everyone = jax.lax.all_gather((k, v, ids), axis)
    visit = functools.partial(_visit_forward, blocks, axis, _both_and_second(q, ids))

    def round_(total, distance):
        visitors = jax.tree.map(lambda x: x[(i - distance) % n], everyone)
        return visit(total, visitors, distance), None

    total = _own_forward(blocks, q, k, v, ids)
    return jax.lax.scan(round_, total, jnp.arange(1, n))[0]


def _gather_backward(blocks, axis, q, k, v, ids, rows):
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    everyone = jax.lax.all_gather((k, v, ids), axis)
    visit = functools.partial(_visit_backward, blocks, axis, _both_and_second(q, ids, rows))

    def round_(carry, distance):
        dq, sums = carry
        j = (i - distance) % n
        dq, *d_visitors = visit(dq, jax.tree.map(lambda x: x[j], everyone), distance)
        return (dq, set_row(sums, d_visitors, j)), None

    def set_row(sums, d_visitors, j):
        return [to.at[j].set(x.astype(to.dtype)) for to, x in zip(sums, d_visitors, strict=True)]

    dq, *d_own = _own_backward(blocks, q, k, v, ids, rows)
    sums = [jnp.zeros((n, *x.shape), jnp.float32) for x in d_own]
    carry = (dq, set_row(sums, d_own, i))
    (dq, sums), _ = jax.lax.scan(round_, carry, jnp.arange(1, n))
    return dq, *jax.lax.psum_scatter(sums, axis)


_SCHEDULES = {
    "ring": (_ring_forward, _ring_backward),
    "all_gather": (_gather_forward, _gather_backward),
}


def _own_forward(blocks, q, k, v, ids):
    """(o, lse) in float32, for each chunk's queries over the two local chunks of keys."""
    o, lse = blocks.forward(q, k, v, mask=BlockMask(True, ids, ids))
    return tuple(zip(_halves(o.astype(jnp.float32)), _halves(lse), strict=True))


def _own_backward(blocks, q, k, v, ids, rows):
    """Gradients in float32 of each chunk's queries, and of the local keys and values."""
    gradients = blocks.backward(q, k, v, mask=BlockMask(True, ids, ids), rows=rows)
    dq, dk, dv = _float32(gradients)
    return tuple(_halves(dq)), dk, dv


def _both_and_second(*trees):
    """Arrays of the queries of both chunks, and a copy of those of the second chunk.

    The barrier makes XLA copy the second chunk once; XLA would otherwise copy it in every round.
    """
    return trees, jax.lax.optimization_barrier(_second(trees))


def _visit_forward(blocks, axis, queries, total, visitors, distance):
    """(o, lse) of each chunk: `total` merged with the keys of the device `distance` before it.

    The two chunks are separate arrays, merged inside the branches, because many rounds leave the
    first chunk unchanged.
    """
    (q, ids), (late_q, late_ids) = queries

    def from_before():
        k, v, kv_ids = _first(visitors)
        o, lse = blocks.forward(q, k, v, mask=BlockMask(False, ids, kv_ids))
        parts = zip(_halves(o), _halves(lse), strict=True)
        return tuple(map(merge, total, parts))

    def from_behind():
        k, v, kv_ids = visitors
        part = blocks.forward(late_q, k, v, mask=BlockMask(False, late_ids, kv_ids))
        return total[0], merge(total[1], part)

    return jax.lax.cond(jax.lax.axis_index(axis) >= distance, from_before, from_behind)


def _visit_backward(blocks, axis, queries, dq, visitors, distance):
    """(dq, dk, dv) of the blocks of `_visit_forward`; dk and dv hold this round's terms alone."""
    (q, ids, rows), (late_q, late_ids, late_rows) = queries

    def from_before():
        k, v, kv_ids = _first(visitors)
        mask = BlockMask(False, ids, kv_ids)
        more, dk, dv = blocks.backward(q, k, v, mask=mask, rows=rows)
        return tuple(_add(dq, _halves(more))), _padded(dk), _padded(dv)

    def from_behind():
        k, v, kv_ids = visitors
        mask = BlockMask(False, late_ids, kv_ids)
        more, dk, dv = blocks.backward(late_q, k, v, mask=mask, rows=late_rows)
        return (dq[0], dq[1] + more), dk, dv

    before = jax.lax.axis_index(axis) >= distance
    dq, *d_visitors = jax.lax.cond(before, from_before, from_behind)
    # The barrier keeps XLA from moving casts to float32 into the branches: twice the bytes.
    return dq, *jax.lax.optimization_barrier(d_visitors)


def merge(total, part):
    """(o, lse) over the union of two disjoint sets of keys, from (o, lse) over each; float32."""
    (o_BTNH, lse_BNT), (part_BTNH, part_BNT) = total, part
    new_BNT = jnp.logaddexp(lse_BNT, part_BNT)
    of_total, of_part = (
        jnp.swapaxes(jnp.exp(x - new_BNT), 1, 2)[..., None] for x in (lse_BNT, part_BNT)
    )
    return of_total * o_BTNH + of_part * part_BTNH.astype(jnp.float32), new_BNT


def _shift(tree, axis: str):
    """Arrays of the previous device on the ring."""
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % n) for i in range(n)])


def _scaled(q_BTNH: jax.Array) -> jax.Array:
    """q / sqrt(H), the scale of the scores; the gradient of q has the same scale."""
    return q_BTNH / math.sqrt(q_BTNH.shape[-1])


def _add(tree, other):
    return [a + b for a, b in zip(tree, other, strict=True)]


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _first(tree):
    return jax.tree.map(lambda x: _halves(x)[0], tree)


def _second(tree):
    return jax.tree.map(lambda x: _halves(x)[1], tree)


def _halves(x: jax.Array) -> list[jax.Array]:
    """The two chunks of [B, T], [B, T, N, H] or [B, N, T]."""
    return jnp.split(x, 2, axis=2 if x.ndim == 3 else 1)


def _padded(x_BTNH: jax.Array) -> jax.Array:
    """Gradient of both chunks: that of the first chunk, and zeros for the second chunk."""
    return jnp.concatenate([x_BTNH, jnp.zeros_like(x_BTNH)], axis=1)
