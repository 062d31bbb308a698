"""The job that is planned: a model, its settings, the slice, and the layout of its parameters.

Letters beside the project's own: M tokens that a device works on at one time.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

import jax
from jax.sharding import AbstractMesh

from configs import mesh as mesh_config
from configs.hardware.topologies import Slice
from configs.mesh import MeshConfig
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from partitioning import rules, sharding
from partitioning.sharding import Layout
from qwen_jax.model import transformer
from qwen_jax.ops.attention import context_parallelism

Purpose = Literal["train", "eval", "decode"]
# Logical axes of parameters that are split in storage and gathered for use.
GATHERED_AXES = ("embed", "expert_embed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run whose settings are all fixed and divide over the slice's devices.

    `config.batch_size` counts sequences over all devices; in decoding they are the slots of all
    replicas' engines, of `config.data.sequence_length` positions.
    """

    cfg: ModelConfig
    config: TrainConfig
    where: Slice
    purpose: Purpose
    layout: Layout

    @property
    def length(self) -> int:
        return self.config.data.sequence_length

    @property
    def replicas(self) -> int:
        """Number of parts of the mesh that work on sequences of their own; in decoding, engines."""
        if self.purpose == "decode":
            mesh = self.layout.mesh
            return mesh.size // (mesh.shape["tensor"] * mesh.shape["expert"])
        return self.layout.size("batch")

    @property
    def rows(self) -> int:
        """Sequences that a device works on at one time."""
        parts = self.config.accumulate_steps if self.purpose == "train" else 1
        return self.config.batch_size // parts // self.replicas

    @property
    def tokens(self) -> int:
        """M, the tokens that a device works on at one time, of whole sequences."""
        return self.rows * self.length // self.layout.size("length")

    @property
    def context_variant(self) -> str | None:
        """Implementation of attention for rows that are split over devices; None where none is."""
        return context_parallelism.choose(
            self.config.context_parallel, length=self.length, layout=self.layout
        )

    @property
    def mesh_text(self) -> str:
        """The mesh as the flag `--mesh` takes it."""
        return mesh_text(self.config.mesh)


def mesh_text(mesh: MeshConfig) -> str:
    """The mesh as text, `fsdp=16,tensor=4`, without axes of size 1."""
    named = [(axis, getattr(mesh, axis)) for axis in (*mesh_config.MESH_AXES, "dcn_data")]
    parts = [f"{axis}={size}" for axis, size in named if size != 1]
    parts += ["kv_heads=replicated"] if mesh.kv_heads == "replicated" else []
    return ",".join(parts) or "fsdp=1"


def make(
    cfg: ModelConfig, config: TrainConfig, where: Slice, *, rows: int, purpose: Purpose = "train"
) -> Job:
    """The job whose devices work on `rows` sequences each at one time.

    `config.mesh` may hold a -1; `config.batch_size` follows from `rows` and `accumulate_steps`.
    Slices of TPUs are replicas, whether the mesh says so or not; GPU hosts where it does.
    Raises `ValueError` if mesh, model or length do not divide.
    """
    if where.chip.torus_rank > 0 and config.mesh.dcn_data == 1:
        mesh = dataclasses.replace(config.mesh, dcn_data=where.num_slices)
        config = dataclasses.replace(config, mesh=mesh)
    sizes = mesh_lib.resolve(config.mesh, where.num_devices)
    mesh = dataclasses.replace(config.mesh, **sizes)
    check_torus(mesh, where)
    kind = "engine" if purpose == "decode" else "train"
    layout = Layout(_abstract(mesh), rules.rule_set(kind, kv_heads=mesh.kv_heads))
    sharding.check_model(cfg, layout)
    config = dataclasses.replace(config, mesh=mesh)
    job = Job(cfg=cfg, config=config, where=where, purpose=purpose, layout=layout)
    config = dataclasses.replace(config, batch_size=rows * job.replicas * config.accumulate_steps)
    job = dataclasses.replace(job, config=config)
    if purpose == "decode" and mesh.context > 1:
        raise ValueError(
            f"decoding does not spread a sequence: context={mesh.context}; use context=1"
        )
    transformer.check_length(cfg, job.length)
    _ = job.context_variant  # raises where the length does not divide
    return job


@functools.lru_cache(maxsize=4096)
def _abstract(mesh: MeshConfig) -> AbstractMesh:
    return mesh_lib.abstract(mesh)


def torus(where: Slice) -> tuple[int, ...]:
    """Sides of one slice's torus in devices; tpu7x has two devices a chip."""
    if where.chip.torus_rank == 0:
        return (where.devices_per_slice,)
    return (*where.shape, *((where.chip.devices,) if where.chip.devices > 1 else ()))


def sides(mesh: MeshConfig, where: Slice) -> dict[str, tuple[int, ...]] | None:
    """The whole sides of the torus that each mesh axis takes; None where an axis fits none.

    `mesh_utils.create_device_mesh` gives an axis whole sides or refuses. Without a torus any size
    fits.
    """
    sizes = {axis: getattr(mesh, axis) for axis in mesh_config.MESH_AXES if getattr(mesh, axis) > 1}
    if where.chip.torus_rank == 0:
        return {axis: (size,) for axis, size in sizes.items()}
    return _assign(tuple(sizes.items()), tuple(side for side in torus(where) if side > 1))


@functools.lru_cache(maxsize=65536)
def _assign(
    sizes: tuple[tuple[str, int], ...], free: tuple[int, ...]
) -> dict[str, tuple[int, ...]] | None:
    if not sizes:
        return {} if not free else None
    (axis, size), *rest = sizes
    for bits in range(1, 2 ** len(free)):
        taken = tuple(side for i, side in enumerate(free) if bits >> i & 1)
        if math.prod(taken) != size:
            continue
        left = tuple(side for i, side in enumerate(free) if not bits >> i & 1)
        others = _assign(tuple(rest), left)
        if others is not None:
            return {axis: taken, **others}
    return None


def spans_hosts(mesh: MeshConfig, where: Slice, axes: tuple[str, ...]) -> bool:
    """Whether the devices along one of the axes lie in several GPU hosts.

    Without a torus a mesh takes devices in order, host by host, its last axis fastest.
    """
    at_once = 1
    for axis in reversed(mesh_config.MESH_AXES):
        at_once *= getattr(mesh, axis)
        if axis in axes and at_once > where.devices_per_slice:
            return True
    return False


def check_torus(mesh: MeshConfig, where: Slice) -> None:
    """Raises `ValueError` for a mesh that cannot be laid on the torus."""
    if sides(mesh, where) is not None:
        return
    products = {
        math.prod(side for i, side in enumerate(torus(where)) if bits >> i & 1)
        for bits in range(2 ** len(torus(where)))
    }
    raise ValueError(
        f"mesh {mesh_text(mesh)} does not lie on {where.name}: each axis takes whole sides of its "
        f"{'x'.join(map(str, torus(where)))} network, so sizes are products of them; use sizes out "
        f"of {', '.join(map(str, sorted(products)))}"
    )


@dataclass(frozen=True)
class Leaf:
    """A parameter: its logical axes, its shape, and what one device holds.

    gathered_size: elements on a device after the FSDP gather, all layers together.
    gathered_over: the logical axis that FSDP splits; None where the parameter is not gathered.
    """

    name: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    local: tuple[int, ...]
    gathered_size: int
    gathered_over: str | None

    @property
    def stacked(self) -> bool:
        """Whether the parameter belongs to the layers, which compute in the arithmetic's dtype."""
        return self.axes[0] == "layers"

    @property
    def local_size(self) -> int:
        return math.prod(self.local)


@functools.lru_cache(maxsize=64)
def _parameters(cfg: ModelConfig) -> tuple[tuple[str, tuple, tuple], ...]:
    axes = jax.tree_util.tree_leaves_with_path(transformer.axes(cfg), is_leaf=sharding.is_axes)
    shapes = jax.tree.leaves(transformer.shapes(cfg))
    return tuple(
        (".".join(str(key.key) for key in path), names, leaf.shape)
        for (path, names), leaf in zip(axes, shapes, strict=True)
    )


def parameters(job: Job) -> tuple[Leaf, ...]:
    """Every parameter of the model, and what one device holds of it."""
    return _placed(job.cfg, job.layout)


@functools.lru_cache(maxsize=4096)
def _placed(cfg: ModelConfig, layout: Layout) -> tuple[Leaf, ...]:
    def part(shape: tuple[int, ...], parts: list[int]) -> tuple[int, ...]:
        return tuple(-(-n // p) for n, p in zip(shape, parts, strict=True))

    leaves = []
    for name, axes, shape in _parameters(cfg):
        local = part(shape, [layout.size(a) for a in axes])
        over = next((a for a in axes if a in GATHERED_AXES and layout.size(a) > 1), None)
        gathered = part(shape, [1 if a == over else layout.size(a) for a in axes])
        leaves.append(Leaf(name, axes, shape, local, math.prod(gathered), over))
    return tuple(leaves)
