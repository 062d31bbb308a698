"""Logical axes -> PartitionSpec -> NamedSharding, and constraints inside a program."""

import dataclasses
import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.models.architecture import ModelConfig
from partitioning import rules as rules_lib

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh and its sharding rules, with which model functions place arrays. Hashable."""

    mesh: Mesh | jax.sharding.AbstractMesh
    rules: rules_lib.Rules

    @property
    def platform(self) -> str:
        """Platform of the mesh's devices, `tpu`, `gpu` or `cpu`; without devices JAX's default."""
        if isinstance(self.mesh, jax.sharding.AbstractMesh):
            return jax.default_backend()
        return self.mesh.devices.flat[0].platform

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes of a size above 1 that shard a dimension of this logical name."""
        return tuple(a for a in self.rules.mesh_axes(logical) if self.mesh.shape[a] > 1)

    def size(self, logical: str | None) -> int:
        """Number of devices over which a dimension of this logical name is sharded."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.mesh_axes(logical))


def platform(layout: Layout | None) -> str:
    """Platform of the layout's devices; without a layout, platform of JAX's default backend."""
    return jax.default_backend() if layout is None else layout.platform


def spec(axes: Axes, layout: Layout) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Mesh axes of size 1 are left out, so that specs read the same on every mesh.
    Raises `ValueError` if two dimensions fall on one mesh axis.
    """
    owner: dict[str, str] = {}
    entries = []
    for logical in axes:
        mesh_axes = layout.mesh_axes(logical)
        for axis in mesh_axes:
            if axis in owner:
                raise ValueError(
                    f"dimensions {owner[axis]!r} and {logical!r} of one array are both mapped to "
                    f"mesh axis {axis!r} by the rules {layout.rules.name!r}; map one of them "
                    f"elsewhere"
                )
            owner[axis] = logical
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def sharding(axes: Axes, layout: Layout) -> NamedSharding:
    """The NamedSharding of an array with these logical axes."""
    return NamedSharding(layout.mesh, spec(axes, layout))


def shardings(axes_tree, layout: Layout):
    """A tree of NamedShardings for a tree of logical axes (tuples are its leaves)."""
    return jax.tree.map(lambda axes: sharding(axes, layout), axes_tree, is_leaf=is_axes)


def is_axes(value: object) -> bool:
    """Whether `value` is one array's logical axes, a leaf of an axes tree."""
    return isinstance(value, tuple) and all(a is None or isinstance(a, str) for a in value)


def constrain(x: jax.Array, axes: Axes, layout: Layout | None) -> jax.Array:
    """`x` with its sharding fixed; unchanged where there is no layout (one device)."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(axes, layout))


def check_divisible(shape: tuple[int, ...], axes: Axes, layout: Layout, *, what: str) -> None:
    """Raises `ValueError` unless every sharded dimension divides by its mesh axes."""
    for size, logical in zip(shape, axes, strict=True):
        parts = layout.size(logical)
        if size % parts:
            mesh_axes = _spread_over(logical, layout)
            raise ValueError(
                f"{what}: dimension {logical}={size} is not divisible by {mesh_axes}={parts}; "
                f"use {_divisors(size, limit=parts)}"
            )


def check_model(cfg: ModelConfig, layout: Layout) -> None:
    """Raises `ValueError` if the model cannot be laid out on the mesh; the message says what can.

    Checked before anything compiles: heads, key-value heads, ffn and vocabulary over `tensor`,
    width over `fsdp`, experts over `expert`.
    """
    sizes = _sizes(cfg)
    for logical, name, size in sizes:
        parts = layout.size(logical)
        if size % parts == 0:
            continue
        mesh_axes = _spread_over(logical, layout)
        # A remedy must also divide the other sizes that lie on the same mesh axes.
        beside = [n for other, _, n in sizes if _same_axes(other, logical, layout)]
        remedy = f"use {_divisors(math.gcd(*beside), limit=parts)}"
        padded = math.ceil(size / parts) * parts
        if logical == "kv_heads":
            remedy += ", or mesh.kv_heads=replicated to hold every key-value head on each device"
        if logical == "vocab":
            remedy += f", or pad the embedding to {padded} rows (vocab_size={padded})"
        if logical == "experts":
            remedy += f", or set pad_experts_to={padded} (experts.pad_experts_to of a run)"
        raise ValueError(
            f"{name}={size} is not divisible by mesh axis {mesh_axes}={parts}; {remedy}"
        )


def pad_experts(cfg: ModelConfig, layout: Layout) -> ModelConfig:
    """`cfg` with experts padded to a multiple of the mesh axis, for parameters only in memory.

    A training run raises an error instead, because padding would change the shapes in its
    checkpoints.
    """
    if cfg.moe is None:
        return cfg
    parts = layout.size("experts")
    held = math.ceil(cfg.moe.num_experts / parts) * parts
    moe = dataclasses.replace(cfg.moe, pad_experts_to=None if held == cfg.moe.num_experts else held)
    return dataclasses.replace(cfg, moe=moe)


def _sizes(cfg: ModelConfig) -> list[tuple[str, str, int]]:
    """(logical axis, field, size) of everything that a mesh divides."""
    sizes = [
        ("heads", "num_attention_heads", cfg.num_attention_heads),
        ("kv_heads", "num_key_value_heads", cfg.num_key_value_heads),
        ("vocab", "vocab_size", cfg.vocab_size),
        ("embed", "hidden_size", cfg.hidden_size),
    ]
    if cfg.dense_layers:
        sizes.append(("ffn", "intermediate_size", cfg.intermediate_size))
    if cfg.moe is not None:
        padded = cfg.moe.pad_experts_to is not None
        held = "pad_experts_to" if padded else "num_experts"
        shared = cfg.moe.shared_expert_intermediate_size  # 0 if absent: every number divides 0
        sizes += [
            ("ffn", "moe_intermediate_size", cfg.moe.moe_intermediate_size),
            ("ffn", "shared_expert_intermediate_size", shared),
            ("experts", held, cfg.moe.num_held),
        ]
    return sizes


def legal_tensor_sizes(cfg: ModelConfig, *, limit: int = 64) -> tuple[int, ...]:
    """Sizes of the `tensor` axis that divide heads, kv heads, ffn and vocabulary alike."""
    over = ("heads", "kv_heads", "ffn", "vocab")
    common = math.gcd(*(size for logical, _, size in _sizes(cfg) if logical in over))
    return tuple(n for n in range(1, min(common, limit) + 1) if common % n == 0)


def _spread_over(logical: str, layout: Layout) -> str:
    """Mesh axes that shard a dimension, as text for messages: `fsdp*context`."""
    return "*".join(layout.mesh_axes(logical))


def _same_axes(one: str, other: str, layout: Layout) -> bool:
    return layout.rules.mesh_axes(one) == layout.rules.mesh_axes(other)


def _divisors(size: int, *, limit: int) -> str:
    smaller = [str(n) for n in range(1, limit) if size % n == 0]
    return ", ".join(smaller[-6:]) if smaller else "1"


def describe(axes_tree, shapes_tree, layout: Layout) -> list[tuple[str, str, str, str, str]]:
    """Table rows for display: parameter, shape, logical axes, spec, shape on one device."""
    rows = []
    leaves = jax.tree_util.tree_leaves_with_path(axes_tree, is_leaf=is_axes)
    for (path, axes), leaf in zip(leaves, jax.tree.leaves(shapes_tree), strict=True):
        name = ".".join(str(key.key) for key in path)
        check_divisible(leaf.shape, axes, layout, what=name)
        placed = sharding(axes, layout)
        rows.append(
            (
                name,
                "x".join(map(str, leaf.shape)),
                ", ".join(map(str, axes)),
                str(tuple(placed.spec)),
                "x".join(map(str, placed.shard_shape(leaf.shape))),
            )
        )
    return rows
