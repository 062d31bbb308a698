"""Training recipes by name: whole runs, each to be given data and an output folder."""

from collections.abc import Callable

from configs.recipes import long_context, pretrain
from configs.train import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": pretrain.quickstart,
    "pretrain-0.5b": pretrain.pretrain_0_5b,
    "pretrain-7b": pretrain.pretrain_7b,
    "finetune": pretrain.finetune,
    "long-context": long_context.long_context,
}


def recipe(name: str) -> TrainConfig:
    """The recipe called `name`. Raises `ValueError` with the known names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()


def check_complete(config: TrainConfig) -> None:
    """Raises `ValueError` where a run lacks data that no recipe names, or has it in a bucket."""
    for name, value, meaning in (
        ("output", config.output, "the folder where the run lives"),
        ("data.paths", config.data.paths, "the text to train on"),
        ("data.tokenizer", config.data.tokenizer, "a folder or file with a tokenizer"),
    ):
        if not value:
            raise ValueError(f"{name} is empty; give {meaning}")
    if remote := [path for path in (*config.data.paths, *config.data.eval_paths) if "://" in path]:
        raise ValueError(
            f"data.paths {remote[0]} is in a bucket; text is read from disks: copy it, or mount "
            f"the bucket (gcsfuse)"
        )
