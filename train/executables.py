"""Programs of a training run, lowered for devices that may be absent, or loaded from a bundle."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax

from configs import schema
from configs.hardware import topologies
from configs.hardware.topologies import Slice
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from partitioning.sharding import Layout
from qwen_jax.analysis import ahead_of_time
from train.core import step

# Settings that a compiled step depends on; the others are its inputs, or affect only the host.
_FIELDS = (
    "batch_size", "accumulate_steps", "compute_dtype", "remat", "layer_loop", "attention",
    "context_parallel", "z_loss", "loss_chunk", "mesh",
)  # fmt: skip
_OPTIMIZER_FIELDS = ("b1", "b2", "eps", "clip_norm", "weight_decay", "moment_dtype")


def lower(
    cfg: ModelConfig, config: TrainConfig, layout: Layout, *, purpose: Literal["train", "eval"]
) -> dict[str, jax.stages.Lowered]:
    """Lowered programs of a purpose, by name, for the devices of `layout`.

    train: `step`, whose learning rate is an input, and `evaluate`. eval: `evaluate`.
    Raises `ValueError` where model, batch or length do not divide over the mesh.
    """
    lowered = _lower_run(step.make(cfg, config, layout))
    return {"evaluate": lowered["evaluate"]} if purpose == "eval" else lowered


def _lower_run(program: step.Program) -> dict[str, jax.stages.Lowered]:
    return {
        "step": program.step.lower(*program.inputs),
        "evaluate": program.evaluate.lower(program.state.params, program.batch),
    }


def key(
    lowered: Mapping[str, jax.stages.Lowered],
    cfg: ModelConfig,
    config: TrainConfig,
    where: Slice,
) -> dict:
    """The key of a bundle of these programs."""
    values = {name: getattr(config, name) for name in _FIELDS}
    values["mesh"] = dataclasses.asdict(config.mesh)
    values["optimizer"] = {name: getattr(config.optimizer, name) for name in _OPTIMIZER_FIELDS}
    values["sequence_length"] = config.data.sequence_length
    described = values | {"model": schema.to_dict(cfg)}
    return ahead_of_time.key(lowered, where, described)


def with_bundle(
    program: step.Program, cfg: ModelConfig, config: TrainConfig, layout: Layout
) -> step.Program:
    """`program` with its step and evaluation from the bundle `config.executables`.

    Raises `ValueError` if the bundle was made for another model, config or mesh.
    """
    where = topologies.parse(ahead_of_time.read_key(config.executables)["slice"])
    if where.num_devices != layout.mesh.size:
        raise ValueError(
            f"{config.executables} was compiled for {where.name}, {where.num_devices} devices; "
            f"this run has {layout.mesh.size}"
        )
    lowered = _lower_run(program)
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh_lib.resolve(config.mesh, layout.mesh.size)),
    )
    loaded = ahead_of_time.load(config.executables, lowered, key(lowered, cfg, config, where))
    return dataclasses.replace(program, step=loaded["step"], evaluate=loaded["evaluate"])
