"""`qwen-jax plan`: reads its flags, searches, and prints."""

import dataclasses
from pathlib import Path

from configs import presets, recipes, remat, schema, topologies
from partitioning import mesh as mesh_lib
from qwen_jax.plan import report, search
from qwen_jax.plan.job import Purpose
from qwen_jax.plan.search import Candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks; None where the plan is to choose."""

    model: str | None
    recipe: str | None
    topology: str
    mesh: str
    length: int | None
    rows: int | None
    remat: str | None
    purpose: Purpose


def settings(request: Request) -> tuple[schema.Model, schema.Train]:
    """The model, and the run that the recipe and the flags make.

    Raises `ValueError` for unknown names and impossible values.
    """
    config = recipes.recipe(request.recipe) if request.recipe else schema.Train()
    if request.model is None and request.recipe is None:
        raise ValueError(
            f"plan needs --model or --recipe; models: {', '.join(presets.PRESETS)}; recipes: "
            f"{', '.join(recipes.RECIPES)}"
        )
    named = config.model if request.model is None else request.model
    cfg = presets.preset(named) if isinstance(named, str) else named
    for name, value in (("length", request.length), ("rows", request.rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if request.remat is not None:
        remat.check(request.remat)
    length = request.length or config.data.sequence_length
    data = dataclasses.replace(config.data, sequence_length=length)
    # The plan finds the batch, so nothing needs splitting.
    config = dataclasses.replace(config, data=data, accumulate_steps=1)
    return cfg, config


def run(request: Request, *, picture: str | None) -> Candidate:
    """Prints the plan and returns what it recommends.

    Raises `ValueError` for bad input, and where nothing fits.
    """
    cfg, config = settings(request)
    held = {"policy": request.remat, "rows": request.rows}
    if request.topology == "any":
        if request.mesh:
            raise ValueError(f"mesh={request.mesh} needs a --topology whose devices it divides")
        best = search.to_rent(cfg, config, purpose=request.purpose, **held)
        if not best.ranked:
            raise ValueError(f"{cfg.name} fits no slice: " + "; ".join(best.skipped.values()))
        report.show_rent(best.ranked, best.skipped)
        chosen = best.ranked[0]
    else:
        where = topologies.parse(request.topology)
        mesh = mesh_lib.parse(request.mesh) if request.mesh else None
        found, refused = search.candidates(
            cfg, config, where, purpose=request.purpose, mesh=mesh, **held
        )
        chosen = search.recommend(found, refused)
        report.show(found, refused, chosen)
    if picture is not None:
        from qwen_jax.plan import picture as picture_lib

        picture_lib.save(chosen, Path(picture))
        print(f"{picture}: memory and sharding of the recommended plan")
    return chosen
