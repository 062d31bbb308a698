"""The tiny model that the other examples use where no `--model` is given."""

import argparse
from pathlib import Path

import pretrain_tiny

from qwen_jax.checkpoint.huggingface import exporter

FOLDER = Path("runs/examples")


def arguments(description: str) -> argparse.Namespace:
    """Command-line arguments that every example has: `folder` to write to, and `model`."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results are written")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; default: a tiny model")
    given = parser.parse_args()
    given.model = given.model or make(given.folder)
    return given


def make(folder: Path) -> Path:
    """A Hugging Face folder below `folder` with a tiny trained model; made once, then reused."""
    model = folder / "tiny"
    if not model.exists():
        pretrain_tiny.main(folder / "pretrain")
        exporter.export_checkpoint(folder / "pretrain" / "run", model)
    return model
