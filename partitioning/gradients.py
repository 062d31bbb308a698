"""Gradients of weights: every device's own part first, which then meet by reduce-scatter.

Left alone, XLA's partitioner sums a weight's gradient over the devices that share it, and only then
drops what each does not keep. Its TPU backend makes that an all-reduce of the whole gradient
wherever the group spans the torus: twice the bytes, and the whole gradient in memory. Here a device
contracts its own tokens under `shard_map`, and where one mesh axis is the whole torus, its parts go
where they belong in two steps, over all sides of the torus but one (A), then over that (B):

    [D, F] -> reduce-scatter over A -> [D_A, F] -> reduce-scatter over B -> [D_AB, F]
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from partitioning import sharding
from partitioning.sharding import Axes, Layout

# What an axis of a weight is called in an activation.
_OF_ACTIVATION = {
    "embed": "act_embed",
    "heads": "act_heads",
    "kv_heads": "act_kv_heads",
    "ffn": "act_ffn",
    "vocab": "act_vocab",
}


def contract(
    einsum: str, x: jax.Array, kernel: jax.Array, *, axes: Axes, layout: Layout | None
) -> jax.Array:
    """`jnp.einsum(einsum, x, kernel)` of tokens x [B, T, ...] with a weight of logical `axes`.

    `einsum` names batch and length `b` and `t`, such as `btd,dnh->btnh`. Where the rules spread
    `embed`, the gradient of the kernel is reduce-scattered, in the kernel's dtype. On GPUs XLA does
    that by itself, and hides it better (7B's layers on two H100: 96% of one, against 85% by hand).
    """
    alone = layout is None or "embed" not in axes or layout.size("embed") == 1
    if alone or layout.platform == "gpu":
        return jnp.einsum(einsum, x, kernel)
    return _contract(x, kernel, einsum, axes, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _contract(x, kernel, einsum, axes, layout):
    del axes, layout
    return jnp.einsum(einsum, x, kernel)


def _forward(x, kernel, einsum, axes, layout):
    return _contract(x, kernel, einsum, axes, layout), (x, kernel)


def _backward(einsum, axes, layout, residuals, slope):
    x, kernel = residuals
    inputs, result = einsum.split("->")
    of_x, of_kernel = inputs.split(",")
    logical = dict(zip(of_kernel, (_OF_ACTIVATION.get(axis) for axis in axes), strict=True))
    logical |= {"b": "batch", "t": "length"}
    spec = lambda letters: sharding.spec(tuple(logical[i] for i in letters), layout)  # noqa: E731

    place = axes.index("embed")
    width = of_kernel[place]

    def local(x, slope):
        width_first = width + of_kernel.replace(width, "")
        gradient = jnp.einsum(f"{of_x},{result}->{width_first}", x, slope)
        return jnp.moveaxis(meet(gradient, layout=layout), 0, place)

    kernel_slope = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(spec(of_x), spec(result)),
        out_specs=sharding.spec(axes, layout),
        check_vma=False,  # the sum over groups of an axis is not known to vary over the axis
    )(x, slope)
    x_slope = jnp.einsum(f"{result},{of_kernel}->{of_x}", slope, kernel)
    return x_slope, kernel_slope.astype(kernel.dtype)


_contract.defvjp(_forward, _backward)


def meet(local: jax.Array, *, layout: Layout) -> jax.Array:
    """Inside `shard_map`: the sum of all devices' parts of a gradient -> this device's share of it.

    [D, ...] -> reduce-scatter over the axes of `embed` -> [D_embed, ...] -> all-reduce over what is
    left of those of batch and length.
    """
    local = _scatter(local, 0, "embed", layout)
    tokens = (*layout.mesh_axes("batch"), *layout.mesh_axes("length"))
    rest = tuple(axis for axis in tokens if axis not in layout.mesh_axes("embed"))
    return jax.lax.psum(local, rest) if rest else local


def _scatter(local: jax.Array, dim: int, logical: str, layout: Layout) -> jax.Array:
    for axis in layout.mesh_axes(logical):
        for groups in _stages(axis, layout):
            local = jax.lax.psum_scatter(
                local, axis, scatter_dimension=dim, axis_index_groups=groups, tiled=True
            )
    return local


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(local: jax.Array, dim: int, logical: str, layout: Layout) -> jax.Array:
    """Inside `shard_map`: [..., D_X, ...] -> all-gather along `dim` -> [..., D, ...].

    X are the axes of `logical`. The gradient goes back by reduce-scatter, in steps.
    """
    axes = layout.mesh_axes(logical)
    return jax.lax.all_gather(local, axes, axis=dim, tiled=True) if axes else local


gather.defvjp(
    lambda local, dim, logical, layout: (gather(local, dim, logical, layout), None),
    lambda dim, logical, layout, _, slope: (_scatter(slope, dim, logical, layout),),
)


@dataclass(frozen=True)
class Way:
    """How the output kernel's gradient, [D, V] in float32, is had from chunks of logits.

    piece None: summed over the chunks, whole on every device; the devices' sums meet once, after
    the loop. Else the logits' gradient of all chunks is kept in the arithmetic's dtype, and one
    product after the loop takes `piece` rows at a time of each device's share of D: nothing is read
    and written once a chunk, and the gradient is never whole.
    """

    chunk: int
    piece: int | None


# A matrix unit's arithmetic for each byte of the other factor that it reads.
_ENOUGH = 512


def pick_way(
    *, rows: int, length: int, hidden_size: int, chunk: int, devices: int, itemsize: int
) -> Way:
    """By memory: pieces where the logits' gradient of a device's rows x length tokens takes less.

    `devices` share the kernel, each a part of D; `itemsize` is that of the arithmetic, in bytes.
    """
    share = hidden_size // devices
    whole = [n for n in range(1, share + 1) if share % n == 0]
    piece = next((n for n in whole if devices * n >= _ENOUGH), share)
    if itemsize * rows * length + 4 * devices * piece < 4 * hidden_size:
        return Way(min(chunk, length, _ENOUGH), piece)
    return Way(min(chunk, length), None)  # each round reads and writes the sum: not more than asked


@functools.lru_cache(maxsize=1024)
def _stages(axis: str, layout: Layout) -> tuple[list[list[int]] | None, ...]:
    """Groups along a mesh axis: (all sides of the torus but one, that one); None is all of it."""
    size, inner = layout.mesh.shape[axis], _inner(axis, layout)
    if inner in (1, size):
        return (None,)
    across = [list(range(i, size, inner)) for i in range(inner)]
    along = [list(range(i, i + inner)) for i in range(0, size, inner)]
    return across, along


def _inner(axis: str, layout: Layout) -> int:
    """How many devices follow each other on the axis before a second coordinate changes.

    1 where the axis leaves a side of the torus to others: XLA scatters over it in one step.
    """
    if isinstance(layout.mesh, jax.sharding.AbstractMesh):
        return 1
    at = layout.mesh.axis_names.index(axis)
    line = layout.mesh.devices.swapaxes(at, 0).reshape(layout.mesh.shape[axis], -1)[:, 0]
    coords = _coordinates(line)
    changing = _changing(coords)
    if len(changing) < 2 or changing != _changing(_coordinates(layout.mesh.devices.flat)):
        return 1
    first = (next(n for n, at in enumerate(coords) if at[i] != coords[0][i]) for i in changing)
    return sorted(first)[1]


def _coordinates(devices) -> list[tuple[int, ...]]:
    """Places on the torus; empty on CPU and GPU, which have none."""
    return [tuple(getattr(device, "coords", ())) for device in devices]


def _changing(coords: list[tuple[int, ...]]) -> list[int]:
    return [i for i, values in enumerate(zip(*coords, strict=True)) if len(set(values)) > 1]
