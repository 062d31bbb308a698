"""Tables for people: the presets, and where parameters go on a mesh."""

import math
from collections.abc import Mapping
from typing import Literal

import jax
from rich import console, table

from configs.models import presets
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from partitioning import sharding
from qwen_jax.analysis import ahead_of_time, flops
from qwen_jax.analysis.plan import memory
from qwen_jax.analysis.plan.job import Job
from qwen_jax.model import transformer as model_lib


def show_models() -> None:
    """Prints the presets: parameters, memory and legal tensor-parallel sizes."""
    grid = table.Table(title="Presets")
    headings = ("model", "parameters", "activated", "bf16 weights", "training state", "positions")
    for heading in (*headings, "tensor"):
        first = heading == "model"
        grid.add_column(heading, justify="left" if first else "right", no_wrap=first)
    for name in presets.PRESETS:
        cfg = presets.preset(name)
        count = flops.parameters(cfg)
        grid.add_row(
            name,
            _count(count),
            _count(flops.parameters(cfg, count="activated")) if cfg.moe else "",
            f"{2 * count / 2**30:.2f} GiB",
            f"{16 * count / 2**30:.1f} GiB",
            f"{cfg.max_position_embeddings:,}",
            ", ".join(map(str, sharding.legal_tensor_sizes(cfg))),
        )
    output = console.Console()
    output.print(grid)
    output.print(
        "activated: parameters that one token uses, where experts are chosen\n"
        "training state: float32 parameters, two Adam moments and gradients, 16 bytes a parameter\n"
        "tensor: sizes of the mesh's tensor axis; mesh.kv_heads=replicated allows more",
        highlight=False,
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number > 1e8 else f"{number / 1e6:.3f} M"


def show_shardings(name: str, *, mesh: str, rules: Literal["train", "engine"]) -> None:
    """Prints every parameter's shape, axes and spec on `mesh`, and what one device holds.

    Raises `ValueError` if the preset is unknown or does not divide over the mesh.
    """
    cfg, config = presets.preset(name), mesh_lib.parse(mesh)
    layout = sharding.Layout(
        mesh_lib.abstract(config), rules_lib.rule_set(rules, kv_heads=config.kv_heads)
    )
    sharding.check_model(cfg, layout)
    shapes = model_lib.shapes(cfg)
    grid = table.Table(title=f"{name} on {mesh}, rules {layout.rules.name!r}")
    for heading in ("parameter", "shape", "logical axes", "spec", "on one device"):
        grid.add_column(heading, overflow="fold")
    held = 0
    for row in sharding.describe(model_lib.axes(cfg), shapes, layout):
        grid.add_row(*row)
        held += math.prod(map(int, row[-1].split("x")))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    output = console.Console()
    output.print(grid)
    output.print(
        f"one device holds {held / 1e9:.3f} B of {total / 1e9:.3f} B parameters: "
        f"{4 * held / 2**30:.2f} GiB in float32, {2 * held / 2**30:.2f} GiB in bfloat16"
    )


def show_compiled(
    output: console.Console, job: Job, compiled: Mapping[str, ahead_of_time.Compiled]
) -> None:
    """Prints a table a program: bytes of one device, collectives, and the first beside the plan."""
    estimate = memory.estimate(job).total
    for index, (name, one) in enumerate(compiled.items()):
        shown = table.Table(title=f"{name}, compiled for {job.where.name} in {one.seconds:.0f} s")
        shown.title_justify = "left"
        shown.add_column("of a device")
        shown.add_column("", justify="right")
        for label, value in (
            ("arguments", one.arguments),
            ("peak, arguments included", one.peak),
            ("heap, fragmentation included", one.temporary),
            ("code", one.code),
            ("in host memory", one.host),
        ):
            shown.add_row(label, f"{value / 2**30:.2f} GiB")
        if index == 0:
            shown.add_row("peak as estimated", f"{estimate / 2**30:.2f} GiB")
            shown.add_row("estimate / compiled", f"{estimate / one.peak:.2f}")
        for kind, moved in one.hlo.moved.items():
            beside = f", {moved.overlapped} beside other work" if moved.overlapped else ""
            shown.add_row(f"{kind}{beside}", f"{moved.count} x, {moved.num_bytes / 1e9:.2f} GB")
        if one.hlo.cycles:
            shown.add_row("cycles of fusions", f"{one.hlo.cycles:.3g}")
        shown.add_row("FLOP, loop bodies once", f"{one.flops:.3g}")
        shown.add_row("bytes accessed, loop bodies once", f"{one.accessed_bytes:.3g}")
        output.print(shown)
