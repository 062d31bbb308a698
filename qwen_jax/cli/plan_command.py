"""The command `qwen-jax plan`: it reads the flags, searches, and prints the plan."""

import dataclasses
from pathlib import Path

import jax

from configs.hardware import topologies
from configs.models import presets, remat
from configs.models.architecture import ModelConfig
from configs.recipes import registry as recipes
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from qwen_jax.analysis.plan import search
from qwen_jax.analysis.plan.job import Purpose
from qwen_jax.analysis.plan.search import Candidate
from qwen_jax.cli import plan_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The flags of `qwen-jax plan`; None where the plan is to choose."""

    model: str | None
    recipe: str | None
    topology: str
    mesh: str
    length: int | None
    rows: int | None
    batch: int | None
    remat: str | None
    purpose: Purpose


def settings(request: Request) -> tuple[ModelConfig, TrainConfig]:
    """The model and the training config that the recipe and the flags describe.

    Raises `ValueError` for unknown names and impossible values.
    """
    config = recipes.recipe(request.recipe) if request.recipe else TrainConfig()
    if request.model is None and request.recipe is None:
        raise ValueError(
            f"plan needs --model or --recipe; models: {', '.join(presets.PRESETS)}; recipes: "
            f"{', '.join(recipes.RECIPES)}"
        )
    named = config.model if request.model is None else request.model
    cfg = presets.preset(named) if isinstance(named, str) else named
    for name in ("length", "rows", "batch"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if request.remat is not None:
        remat.check(request.remat)
    length = request.length or config.data.sequence_length
    data = dataclasses.replace(config.data, sequence_length=length)
    # The search splits the batch into micro-batches itself.
    config = dataclasses.replace(config, data=data, accumulate_steps=1)
    return cfg, config


def batch_of(request: Request) -> int | None:
    """Sequences of a training step, from the flag or the recipe; None where the plan chooses.

    Raises `ValueError` for a batch of a purpose other than training.
    """
    if request.purpose != "train":
        if request.batch is not None:
            raise ValueError(
                f"batch={request.batch} is of training; use rows for {request.purpose}"
            )
        return None
    if request.recipe is None:
        return request.batch
    return request.batch or recipes.recipe(request.recipe).batch_size


def run(request: Request, *, picture: str | None) -> Candidate:
    """Prints the plan and returns what it recommends.

    Raises `ValueError` for bad input, and where nothing fits.
    """
    # A plan needs no device: looking for one would wait for it, or take it from a run.
    jax.config.update("jax_platforms", "cpu")
    cfg, config = settings(request)
    fixed = {"policy": request.remat, "rows": request.rows, "batch": batch_of(request)}
    if request.topology == "any":
        if request.mesh:
            raise ValueError(f"mesh={request.mesh} needs a --topology whose devices it divides")
        best = search.rank_slices(cfg, config, purpose=request.purpose, **fixed)
        if not best.ranked:
            reasons = "; ".join(f"{chip}: {reason}" for chip, reason in best.skipped.items())
            raise ValueError(f"{cfg.name} fits no slice: {reasons}")
        plan_report.show_slices(best, recipe=request.recipe)
        chosen = best.ranked[0]
    else:
        where = topologies.parse(request.topology)
        mesh = mesh_lib.parse(request.mesh) if request.mesh else None
        found, refused = search.candidates(
            cfg, config, where, purpose=request.purpose, mesh=mesh, **fixed
        )
        chosen = search.recommend(found, refused)
        plan_report.show_slice(found, refused, chosen, recipe=request.recipe)
    if picture is not None:
        from qwen_jax.cli import plan_picture

        plan_picture.save(chosen, Path(picture))
        print(f"{picture}: memory and sharding of the recommended plan")
    return chosen
