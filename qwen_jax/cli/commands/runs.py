"""Commands about training runs: presets, shardings, plans, and starting a run here or on a pod."""

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from configs.hardware import launch as launch_configs
from configs.hardware import topologies, xla_flags
from configs.recipes import registry as recipes
from configs.train import TrainConfig
from qwen_jax.cli import compose
from qwen_jax.cli.apps import Flat, Positional, app, registry, train_app


@app.command
def models() -> int:
    """List the presets: parameters, memory and legal tensor-parallel sizes."""
    from qwen_jax.cli import tables

    tables.show_models()
    return 0


@app.command
def shardings(
    model: Positional[str],
    *,
    mesh: str,
    rules: Literal["train", "engine"] = "train",
) -> int:
    """Show where every parameter goes on a mesh, and what one device holds.

    Args:
        model: A preset's name (`qwen-jax models`).
        mesh: Axis sizes, for example fsdp=4,tensor=2; kv_heads=replicated is understood too.
        rules: Whose rules: training's, or a batch engine's (weights whole along their width).
    """
    from qwen_jax.cli import tables

    tables.show_shardings(model, mesh=mesh, rules=rules)
    return 0


@app.command
def plan(
    *,
    model: str | None = None,
    recipe: str | None = None,
    topology: str = "any",
    mesh: str = "",
    length: int | None = None,
    rows: int | None = None,
    batch: int | None = None,
    remat: str | None = None,
    purpose: Literal["train", "eval", "decode"] = "train",
    picture: str | None = None,
    compile: bool = False,
    save: str | None = None,
) -> int:
    """Say what a run needs: which slice to rent, mesh, memory and time of a step.

    Args:
        model: A preset's name (`qwen-jax models`); by default the recipe's.
        recipe: A recipe's name (`qwen-jax train --help`): its length, batch and optimizer.
        topology: A slice, such as v5p-128, v6e-256, 2xv5e-256, h100-8 or cpu-8; any ranks slices.
        mesh: Axis sizes, for example fsdp=16,tensor=4; by default every legal one is tried.
        length: Tokens of a row; in decoding, positions of the cache.
        rows: Sequences that a device works on at one time; by default several are tried.
        batch: Sequences of a whole step; by default the recipe's, or what is fastest.
        remat: Rematerialisation policy; by default those without offloading are tried.
        purpose: What runs: a training step, an evaluation, or the decoding of a token.
        picture: File for a picture of memory and sharding, for example plan.png.
        compile: Compile what is recommended for the slice, which need not be here.
        save: Folder for the compiled programs, which `train --executables` then runs.
    """
    if topology == "any" or topologies.parse(topology).chip.platform == "tpu":
        for name, value in xla_flags.WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
    from qwen_jax.cli import plan_command

    request = plan_command.Request(
        model=model, recipe=recipe, topology=topology, mesh=mesh, length=length, rows=rows,
        batch=batch, remat=remat, purpose=purpose,
    )  # fmt: skip
    compiles = compile or save is not None
    if compiles and topology == "any":
        raise ValueError("--compile and --save need a --topology to compile for")
    chosen = plan_command.run(request, picture=picture)
    if compiles:
        compose.compile_job(chosen.job, save=save)
    return 0


@app.command
def quickstart(*, output: str = "runs/quickstart", num_steps: int = 300) -> int:
    """All three jobs in minutes on a CPU, with this machine's Python sources for text.

    Args:
        output: Folder for everything that is made.
        num_steps: Training steps.
    """
    from qwen_jax.cli import quickstart as quickstart_lib

    quickstart_lib.run(Path(output), num_steps=num_steps)
    return 0


@app.command
def launch(
    target: Positional[launch_configs.Target],
    *,
    job: Annotated[launch_configs.LaunchConfig, Flat],
    files: str = "launch",
) -> int:
    """Write checked files that start a training run on Cloud TPUs; nothing is contacted.

    Args:
        target: queued-resource (gcloud alone), xpk, or gke (a JobSet).
        files: Folder to write to; the job's name is added.
    """
    from qwen_jax.launch import render, rendered_checks

    recipe, *flags = job.train_words  # a wrong flag stops here, not after hours in a queue
    config = tyro.cli(
        TrainConfig,
        prog=f"qwen-jax train {recipe}",
        args=[*flags, "--output", job.output],
        default=recipes.recipe(recipe),
        registry=registry(),
    )
    recipes.check_complete(config)
    texts = render.render(job, target=target)
    rendered_checks.check(texts, job)
    print(render.write(texts, job, folder=Path(files) / job.name))
    return 0


def _train_command(name: str) -> None:
    default = recipes.recipe(name)

    def command(
        config: Annotated[TrainConfig, Flat] = default,
    ) -> int:
        return compose.train(config)

    command.__doc__ = recipes.RECIPES[name].__doc__
    train_app.command(command, name=name)


for _name in recipes.RECIPES:
    _train_command(_name)
