"""Tokens to their experts and back: dropless or with a capacity, on one device or over a mesh.

Letters beside the project's own: M tokens, J choices a token (top-k), R rows in expert order,
C places of an expert, X devices of the mesh axes that hold experts.

Over a mesh everything runs under `shard_map`. A device keeps its own tokens; experts lie over the
mesh axis `expert`, their hidden width over `tensor`, and their other width is gathered over `fsdp`:

dropless    [M, D] -> all-gather -> [X M, D], each device runs its experts on all rows that chose
            them, [X M, D] -> reduce-scatter -> [M, D]. A device may get every token of its X, so
            the exact buffer has X M min(J, E / X) rows whatever is sent; gathering moves X M rows,
            padded all-to-all buffers J times as many. Where every device has all tokens already
            (`rules.ENGINE`), nothing is gathered, and the sums meet by an all-reduce.
capacity    [E, C, D] -> all-to-all -> [E_X, X C, D], a batched product, and back.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from partitioning import gradients, sharding
from partitioning.sharding import Layout

# (kernels, rows [R, D], weights [R], sizes [E]) -> [R, D]: rows grouped by expert, weighted sums.
Grouped = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
# (kernels, rows [B, E, C, D], weights [B, E, C]) -> [B, E, C, D].
Batched = Callable[[Any, jax.Array, jax.Array], jax.Array]


_ROW_ALIGNMENT = 16  # kernels take whole tiles of rows, of so many in bfloat16


@dataclass(frozen=True)
class Compute:
    """Arithmetic of the experts in both forms, and the logical axes of their kernels."""

    grouped: Grouped
    batched: Batched
    axes: Any  # logical axes, a tree of the same structure as the kernels


def run(
    compute: Compute,
    x_BTD: jax.Array,
    weights_BTJ: jax.Array,
    experts_BTJ: jax.Array,
    kernels: Any,
    *,
    num_experts: int,
    capacity_factor: float | None,
    layout: Layout | None,
) -> tuple[jax.Array, jax.Array]:
    """Sum over the chosen experts, sum_j w_j E_j(x), [B, T, D]; dropped choices, [B, shards of T].

    `num_experts` is the number of experts that `kernels` hold; a choice equal to that number names
    no expert and adds nothing. With a `capacity_factor` f, an expert takes the first
    ceil(f T J / E) tokens of a sequence that choose it; where the length is sharded, the rule
    applies to each device's shard of the sequence.
    """
    if capacity_factor is None:
        local = functools.partial(_dropless, compute, num_experts=num_experts, spread_tokens=True)
    else:
        local = functools.partial(
            _with_capacity, compute, num_experts=num_experts, capacity_factor=capacity_factor
        )
    if layout is None or layout.mesh.size == 1:
        return local(x_BTD, weights_BTJ, experts_BTJ, kernels, axes=())
    over = layout.mesh_axes
    axes = over("experts")
    if not set(axes) <= set(over("batch")):
        if capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={capacity_factor} needs tokens spread over mesh axes {axes}; "
                f"these rules ({layout.rules.name}) keep them whole: leave it out"
            )
        local = functools.partial(local, spread_tokens=False)

    def body(x_BTD, weights_BTJ, experts_BTJ, kernels):
        kernels = jax.tree.map(
            lambda kernel, axes: gradients.all_gather(
                kernel, axes.index("expert_embed"), "expert_embed", layout
            ),
            kernels,
            compute.axes,
        )
        y_BTD, dropped_BP = local(x_BTD, weights_BTJ, experts_BTJ, kernels, axes=axes)
        return y_BTD[None], dropped_BP

    tokens = jax.sharding.PartitionSpec(over("batch"), over("length"))
    specs = jax.tree.map(
        functools.partial(sharding.spec, layout=layout), compute.axes, is_leaf=sharding.is_axes
    )
    parts_ZBTD, dropped_BP = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(tokens, tokens, tokens, specs),
        # Each device of `tensor` returns a partial sum. A sum outside `shard_map` has a copy as its
        # gradient; a sum inside, where varying axes are not tracked, would add an all-reduce.
        out_specs=(
            jax.sharding.PartitionSpec(over("act_ffn"), over("batch"), over("length")),
            tokens,
        ),
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(x_BTD, weights_BTJ, experts_BTJ, kernels)
    return parts_ZBTD.sum(axis=0), dropped_BP


@dataclass(frozen=True)
class Routes:
    """Maps between tokens [M, J] and rows [R] in expert order.

    source_R: token that the row copies, or M for an empty row.
    slots_MJ: row of each choice, or R for a choice without a row.
    order_R: choice m J + j that the row belongs to, or M J for an empty row.
    sizes_E: number of rows of each expert.
    """

    source_R: jax.Array
    slots_MJ: jax.Array
    order_R: jax.Array
    sizes_E: jax.Array


def sort(experts_MJ: jax.Array, *, num_experts: int, num_rows: int) -> Routes:
    """Routes whose rows are sorted by expert, and by token within an expert.

    Choices outside [0, num_experts) get no row; `num_rows` must suffice for the others, and may be
    more.
    """
    M, J = experts_MJ.shape
    flat = experts_MJ.reshape(M * J)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    choices = jnp.arange(M * J, dtype=jnp.int32)
    in_order, order = jax.lax.sort((flat, choices), num_keys=1, is_stable=True)
    place = jnp.zeros_like(choices).at[order].set(choices, unique_indices=True)
    order = jnp.where(in_order < num_experts, order, M * J)[:num_rows]
    order_R = jnp.pad(order, (0, num_rows - len(order)), constant_values=M * J)
    exists = order_R < M * J
    slots_MJ = jnp.where(flat < num_experts, place, num_rows).reshape(M, J)
    # Counted by comparison: a scatter-add of ones would serialise on a few addresses.
    sizes_E = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    return Routes(jnp.where(exists, order_R // J, M), slots_MJ, order_R, sizes_E)


@jax.custom_vjp
def spread(x_MD: jax.Array, source_R: jax.Array, slots_MJ: jax.Array) -> jax.Array:
    """Rows [R, D]: row r is token source_r, or zeros. `spread` and `collect` are transposes.

    Both functions are gathers, forward and backward: a scatter-add of rows would be slower, and on
    a GPU its sums would differ from run to run.
    """
    del slots_MJ
    return x_MD.at[source_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collect(rows_RD: jax.Array, slots_MJ: jax.Array, source_R: jax.Array) -> jax.Array:
    """Tokens [M, D]: the sum of a token's rows, added in float32."""
    del source_R
    rows_MJD = rows_RD.at[slots_MJ].get(mode="fill", fill_value=0)
    return jnp.sum(rows_MJD, axis=1, dtype=jnp.float32).astype(rows_RD.dtype)


spread.defvjp(
    lambda x, source, slots: (spread(x, source, slots), (source, slots)),
    lambda kept, d_rows: (collect(d_rows, kept[1], kept[0]), None, None),
)
collect.defvjp(
    lambda rows, slots, source: (collect(rows, slots, source), (source, slots)),
    lambda kept, d_x: (spread(d_x, kept[0], kept[1]), None, None),
)


def _spread_weights(weights_MJ: jax.Array, order_R: jax.Array, slots_MJ: jax.Array) -> jax.Array:
    M, J = weights_MJ.shape
    return spread(weights_MJ.reshape(M * J, 1), order_R, slots_MJ.reshape(M * J, 1))[:, 0]


def _dropless(
    compute: Compute,
    x_BTD: jax.Array,
    weights_BTJ: jax.Array,
    experts_BTJ: jax.Array,
    kernels: Any,
    *,
    num_experts: int,
    axes: tuple[str, ...],
    spread_tokens: bool,
) -> tuple[jax.Array, jax.Array]:
    """Expert sums without a capacity. `spread_tokens`: whether `axes` shard the tokens."""
    B, T, D = x_BTD.shape
    J = experts_BTJ.shape[-1]
    x_MD, weights_MJ, experts_MJ = (x.reshape(B * T, -1) for x in (x_BTD, weights_BTJ, experts_BTJ))
    if axes and spread_tokens:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=0, tiled=True)
        x_MD, weights_MJ, experts_MJ = map(gather, (x_MD, weights_MJ, experts_MJ))
    if axes:
        num_experts //= jax.lax.axis_size(axes)
        experts_MJ = experts_MJ - jax.lax.axis_index(axes) * num_experts
    # The choices of a token are distinct, so a device needs at most min(J, experts) rows a token.
    num_rows = x_MD.shape[0] * min(J, num_experts)
    num_rows += -num_rows % _ROW_ALIGNMENT
    routes = sort(experts_MJ, num_experts=num_experts, num_rows=num_rows)
    rows_RD = spread(x_MD, routes.source_R, routes.slots_MJ)
    weights_R = _spread_weights(weights_MJ, routes.order_R, routes.slots_MJ)
    rows_RD = compute.grouped(kernels, rows_RD, weights_R, routes.sizes_E)
    y_MD = collect(rows_RD, routes.slots_MJ, routes.source_R)
    if axes and spread_tokens:
        y_MD = jax.lax.psum_scatter(y_MD, axes, scatter_dimension=0, tiled=True)
    elif axes:
        y_MD = jax.lax.psum(y_MD, axes)
    return y_MD.reshape(B, T, D), jnp.zeros((B, 1), jnp.float32)


def _with_capacity(
    compute: Compute,
    x_BTD: jax.Array,
    weights_BTJ: jax.Array,
    experts_BTJ: jax.Array,
    kernels: Any,
    *,
    num_experts: int,
    capacity_factor: float,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Expert sums with a capacity: each expert takes its first C choices in each sequence.

    Earlier tokens come first, so a dropped choice depends neither on later tokens of the sequence
    nor on other sequences.
    """
    B, T, D = x_BTD.shape
    E, J = num_experts, experts_BTJ.shape[-1]
    C = min(T, -int(-capacity_factor * T * J // E))
    place = jax.vmap(functools.partial(_places, num_experts=E, capacity=C))(experts_BTJ)
    source_BR, slots_BTJ, order_BR, dropped_B = place
    rows_BECD = jax.vmap(spread)(x_BTD, source_BR, slots_BTJ).reshape(B, E, C, D)
    weights_BEC = jax.vmap(_spread_weights)(weights_BTJ, order_BR, slots_BTJ).reshape(B, E, C)
    if axes:
        there = functools.partial(
            jax.lax.all_to_all, axis_name=axes, split_axis=1, concat_axis=0, tiled=True
        )
        rows_BECD, weights_BEC = there(rows_BECD), there(weights_BEC)
    rows_BECD = compute.batched(kernels, rows_BECD, weights_BEC)
    if axes:
        rows_BECD = jax.lax.all_to_all(rows_BECD, axes, split_axis=0, concat_axis=1, tiled=True)
    y_BTD = jax.vmap(collect)(rows_BECD.reshape(B, E * C, D), slots_BTJ, source_BR)
    return y_BTD, dropped_B[:, None].astype(jnp.float32)


def _places(experts_TJ: jax.Array, *, num_experts: int, capacity: int):
    """(source [E C], slots [T, J], order [E C], dropped) of one sequence."""
    T, J = experts_TJ.shape
    E, C = num_experts, capacity
    routes = sort(experts_TJ, num_experts=E, num_rows=T * J)
    starts_E = jnp.cumsum(routes.sizes_E) - routes.sizes_E
    owner_TJ = jnp.minimum(experts_TJ, E - 1)
    rank_TJ = routes.slots_MJ - starts_E[owner_TJ]
    fits_TJ = (experts_TJ < E) & (rank_TJ < C)
    slots_TJ = jnp.where(fits_TJ, owner_TJ * C + rank_TJ, E * C)
    rank_1C = jnp.arange(C)[None]
    order_EC = routes.order_R.at[starts_E[:, None] + rank_1C].get(mode="fill", fill_value=T * J)
    order_R = jnp.where(rank_1C < routes.sizes_E[:, None], order_EC, T * J).reshape(E * C)
    source_R = jnp.where(order_R < T * J, order_R // J, T)
    dropped = jnp.sum((experts_TJ < E) & ~fits_TJ)
    return source_R, slots_TJ, order_R, dropped
