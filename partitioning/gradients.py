"""Gradients of weights: each device's partial gradient, then a reduce-scatter over the devices.

XLA's partitioner sums a weight's gradient over the devices that share the weight, and then slices
each device's shard out of the sum. XLA's TPU backend makes that an all-reduce of the whole gradient
wherever the group of devices spans the torus: twice the bytes, and the whole gradient in memory.
Here each device computes the partial gradient of its own tokens under `shard_map`. Where one mesh
axis spans the whole torus, the reduce-scatter has two steps: over all dimensions of the torus but
one (A), then over that one (B):

    [D, F] -> reduce-scatter over A -> [D_A, F] -> reduce-scatter over B -> [D_AB, F]
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from partitioning import sharding
from partitioning.sharding import Axes, Layout

# Logical axis of a weight -> logical axis of the activation that a product contracts it with.
_OF_ACTIVATION = {
    "embed": "act_embed",
    "heads": "act_heads",
    "kv_heads": "act_kv_heads",
    "ffn": "act_ffn",
    "vocab": "act_vocab",
}


def scattered_einsum(
    einsum: str, x: jax.Array, kernel: jax.Array, *, axes: Axes, layout: Layout | None
) -> jax.Array:
    """Product `jnp.einsum(einsum, x, kernel)` whose weight gradient is reduce-scattered.

    x holds tokens [B, T, ...]; `axes` are the logical axes of the kernel, a dimension each.

    `einsum` names batch and length `b` and `t`, such as `btd,dnh->btnh`. Where the rules shard
    `embed`, the gradient of the kernel is reduce-scattered, in the kernel's dtype. On GPUs, XLA
    emits that reduce-scatter itself and overlaps it better (the layers of 7B on two H100: 96% of
    one GPU, against 85% with this code), so the plain product is used there.
    """
    alone = layout is None or "embed" not in axes or layout.size("embed") == 1
    if alone or layout.platform == "gpu":
        return jnp.einsum(einsum, x, kernel)
    return _einsum(x, kernel, einsum, axes, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _einsum(x, kernel, einsum, axes, layout):
    del axes, layout
    return jnp.einsum(einsum, x, kernel)


def _forward(x, kernel, einsum, axes, layout):
    return _einsum(x, kernel, einsum, axes, layout), (x, kernel)


def _backward(einsum, axes, layout, residuals, cotangent):
    x, kernel = residuals
    inputs, result = einsum.split("->")
    of_x, of_kernel = inputs.split(",")
    logical = dict(zip(of_kernel, (_OF_ACTIVATION.get(axis) for axis in axes), strict=True))
    logical |= {"b": "batch", "t": "length"}
    spec = lambda letters: sharding.spec(tuple(logical[i] for i in letters), layout)  # noqa: E731

    place = axes.index("embed")
    width = of_kernel[place]

    def local(x, cotangent):
        width_first = width + of_kernel.replace(width, "")
        gradient = jnp.einsum(f"{of_x},{result}->{width_first}", x, cotangent)
        return jnp.moveaxis(reduce_to_shard(gradient, layout=layout), 0, place)

    kernel_gradient = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(spec(of_x), spec(result)),
        out_specs=sharding.spec(axes, layout),
        check_vma=False,  # the sum over groups of an axis is not known to vary over the axis
    )(x, cotangent)
    x_gradient = jnp.einsum(f"{result},{of_kernel}->{of_x}", cotangent, kernel)
    return x_gradient, kernel_gradient.astype(kernel.dtype)


_einsum.defvjp(_forward, _backward)


def reduce_to_shard(local: jax.Array, *, layout: Layout) -> jax.Array:
    """This device's shard of a gradient: the sum of the partial gradients of all devices.

    Called inside `shard_map`:

    [D, ...] -> reduce-scatter over the mesh axes of `embed` -> [D_embed, ...] -> all-reduce over
    the mesh axes of batch and length that are not among them.
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
def all_gather(local: jax.Array, dim: int, logical: str, layout: Layout) -> jax.Array:
    """The whole array from its shards, inside `shard_map`.

    [..., D_X, ...] -> all-gather -> [..., D, ...].

    X are the mesh axes of `logical`, D is dimension `dim`. The gradient is reduce-scattered in the
    steps that the module's docstring names.
    """
    axes = layout.mesh_axes(logical)
    return jax.lax.all_gather(local, axes, axis=dim, tiled=True) if axes else local


all_gather.defvjp(
    lambda local, dim, logical, layout: (all_gather(local, dim, logical, layout), None),
    lambda dim, logical, layout, _, cotangent: (_scatter(cotangent, dim, logical, layout),),
)


@dataclass(frozen=True)
class OutputGradient:
    """Plan of the LM head's gradient, [D, V] in float32, which chunks of logits contribute to.

    chunk: tokens of a sequence whose logits exist at one time.
    piece None: each device adds every chunk to a whole [D, V] sum; the sums of the devices are
    reduce-scattered once, after the loop over chunks. Otherwise the gradient of the logits of all
    chunks is stored in the compute dtype, and one product after the loop computes `piece` rows of
    each device's shard of D at a time: no sum is read and written for each chunk, and the whole
    gradient never exists.
    """

    chunk: int
    piece: int | None


# Fewest rows of a matrix product that keep the matrix unit busy while it reads the other factor.
_ENOUGH = 512


def plan_output_gradient(
    *, rows: int, length: int, hidden_size: int, chunk: int, devices: int, itemsize: int
) -> OutputGradient:
    """The plan of the LM head's gradient that needs less memory.

    Pieces need the gradient of the logits of a device's `rows` x `length` tokens; the other plan
    needs a whole [D, V] sum. `devices` share the kernel, each a shard of D; `itemsize` is the size
    of the compute dtype in bytes.
    """
    share = hidden_size // devices
    whole = [n for n in range(1, share + 1) if share % n == 0]
    piece = next((n for n in whole if devices * n >= _ENOUGH), share)
    if itemsize * rows * length + 4 * devices * piece < 4 * hidden_size:
        return OutputGradient(min(chunk, length, _ENOUGH), piece)
    return OutputGradient(
        min(chunk, length), None
    )  # every chunk reads and writes the sum, so chunks are never smaller than requested


@functools.lru_cache(maxsize=1024)
def _stages(axis: str, layout: Layout) -> tuple[list[list[int]] | None, ...]:
    """Device groups of each step of a reduce-scatter along a mesh axis; None: one group of all."""
    size, inner = layout.mesh.shape[axis], _inner(axis, layout)
    if inner in (1, size):
        return (None,)
    across = [list(range(i, size, inner)) for i in range(inner)]
    along = [list(range(i, i + inner)) for i in range(0, size, inner)]
    return across, along


def _inner(axis: str, layout: Layout) -> int:
    """Number of consecutive devices on a mesh axis that differ in one torus coordinate alone.

    1 where the axis does not span the whole torus: XLA then scatters over it in one step.
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
    """Torus coordinates of the devices; empty tuples on CPU and GPU, which have none."""
    return [tuple(getattr(device, "coords", ())) for device in devices]


def _changing(coords: list[tuple[int, ...]]) -> list[int]:
    return [i for i, values in enumerate(zip(*coords, strict=True)) if len(set(values)) > 1]
