"""What `qwen-jax plan` has compiled: a job's programs, held against its estimate, and kept."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from configs import schema
from configs.engine import EngineConfig
from configs.hardware import topologies
from configs.hardware.topologies import Slice
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from partitioning import rules, sharding
from partitioning.sharding import Layout
from qwen_jax.analysis import ahead_of_time
from qwen_jax.analysis.ahead_of_time import Compiled
from qwen_jax.analysis.plan import memory
from qwen_jax.analysis.plan.job import Job, Purpose
from qwen_jax.decode import programs, slot_state, weights
from train.core import step

# What of a run's settings a compiled step depends on; the rest is data, or for the host alone.
_FIELDS = (
    "batch_size", "accumulate_steps", "compute_dtype", "remat", "layer_loop", "attention",
    "context_parallel", "z_loss", "loss_chunk", "mesh",
)  # fmt: skip
_OF_OPTIMIZER = ("b1", "b2", "eps", "clip_norm", "weight_decay", "moment_dtype")


def lower(
    cfg: ModelConfig, config: TrainConfig, layout: Layout, *, purpose: Purpose
) -> dict[str, jax.stages.Lowered]:
    """The programs of a purpose, by name, for the devices of `layout`.

    train: `step`, whose learning rate is an input, and `evaluate`. eval: `evaluate`. decode: an
    engine's `advance`, which draws `decode_steps` tokens for each of its slots, of
    `sequence_length` positions; engines of other replicas run the same.
    Raises `ValueError` where model, batch or length do not divide over the mesh.
    """
    if purpose == "decode":
        return {"advance": _lower_decode(cfg, config, layout)}
    lowered = _lower_run(step.make(cfg, config, layout))
    return {"evaluate": lowered["evaluate"]} if purpose == "eval" else lowered


def _lower_run(program: step.Program) -> dict[str, jax.stages.Lowered]:
    return {
        "step": program.step.lower(*program.inputs),
        "evaluate": program.evaluate.lower(program.state.params, program.batch),
    }


def _lower_decode(cfg: ModelConfig, config: TrainConfig, layout: Layout) -> jax.stages.Lowered:
    sharding.check_model(cfg, layout)
    settings, dtype = EngineConfig(), jnp.dtype(config.compute_dtype)
    replicas = layout.mesh.size // (layout.mesh.shape["tensor"] * layout.mesh.shape["expert"])
    slots = config.batch_size // replicas
    width = -(-config.data.sequence_length // settings.page_size)
    state = slot_state.shapes(
        cfg,
        num_slots=slots,
        width=width,
        num_pages=slots * width,
        page_size=settings.page_size,
        dtype=dtype,
        layout=layout,
    )
    form = weights.best_form(layout)

    def whole(*shape: int, dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding((), layout))

    return programs.advance.lower(
        cfg,
        weights.shapes(cfg, dtype=dtype, form=form, layout=layout),
        state,
        whole(slots),
        whole(slots, -(-cfg.vocab_size // 32), dtype=jnp.uint32),
        how="greedy",
        eos_E=whole(len(cfg.eos_token_ids)),
        num_steps=settings.decode_steps,
        layout=layout,
    )


def placed(job: Job) -> Layout:
    """The job's layout on devices of its slice, which may exist in the compiler alone."""
    config = job.config.mesh
    devices = ahead_of_time.devices(job.where)
    kind = "engine" if job.purpose == "decode" else "train"
    chosen = rules.rule_set(kind, kv_heads=config.kv_heads)
    return Layout(mesh_lib.make(config, devices=devices), chosen)


def check(job: Job, *, save: str | None) -> dict[str, Compiled]:
    """Compiles the job's programs, prints them beside the estimate, and keeps them in `save`.

    Raises `ValueError` where the slice cannot be compiled for, or `save` is there already.
    """
    output = Console()
    lowered = lower(job.cfg, job.config, placed(job), purpose=job.purpose)
    compiled = {}
    for name, one in lowered.items():
        with output.status(f"compiling {name} for {job.where.name}; minutes for large models"):
            compiled[name] = ahead_of_time.compile_program(
                one, flags=ahead_of_time.flags(job.where)
            )
    main = next(iter(compiled))
    _show(output, job, main, compiled)
    if save is not None:
        made = key(lowered, job.cfg, job.config, job.where)
        size = ahead_of_time.save(save, compiled, made)
        output.print(f"{save}: {', '.join(compiled)}, {size / 1e6:.0f} MB", highlight=False)
    return compiled


def key(
    lowered: Mapping[str, jax.stages.Lowered],
    cfg: ModelConfig,
    config: TrainConfig,
    where: Slice,
) -> dict:
    """The key of a bundle of these programs."""
    values = {name: getattr(config, name) for name in _FIELDS}
    values["mesh"] = dataclasses.asdict(config.mesh)
    values["optimizer"] = {name: getattr(config.optimizer, name) for name in _OF_OPTIMIZER}
    values["sequence_length"] = config.data.sequence_length
    described = values | {"model": schema.to_dict(cfg)}
    return ahead_of_time.key(lowered, where, described)


def with_bundle(
    program: step.Program, cfg: ModelConfig, config: TrainConfig, layout: Layout
) -> step.Program:
    """`program` with its step and evaluation from the bundle `config.executables`.

    Raises `ValueError` where that bundle was made for anything else.
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


def _show(output: Console, job: Job, main: str, compiled: Mapping[str, Compiled]) -> None:
    estimate = memory.estimate(job).total
    for name, one in compiled.items():
        table = Table(title=f"{name}, compiled for {job.where.name} in {one.seconds:.0f} s")
        table.title_justify = "left"
        table.add_column("of a device")
        table.add_column("", justify="right")
        for label, value in (
            ("arguments", one.arguments),
            ("peak, arguments included", one.peak),
            ("heap, fragmentation included", one.temporary),
            ("code", one.code),
            ("in host memory", one.host),
        ):
            table.add_row(label, f"{value / 2**30:.2f} GiB")
        if name == main:
            table.add_row("peak as estimated", f"{estimate / 2**30:.2f} GiB")
            table.add_row("estimate / compiled", f"{estimate / one.peak:.2f}")
        for kind, moved in one.hlo.moved.items():
            beside = f", {moved.overlapped} beside other work" if moved.overlapped else ""
            table.add_row(f"{kind}{beside}", f"{moved.count} x, {moved.num_bytes / 1e9:.2f} GB")
        if one.hlo.cycles:
            table.add_row("cycles of fusions", f"{one.hlo.cycles:.3g}")
        table.add_row("FLOP, loop bodies once", f"{one.flops:.3g}")
        table.add_row("bytes accessed, loop bodies once", f"{one.accessed_bytes:.3g}")
        output.print(table)
