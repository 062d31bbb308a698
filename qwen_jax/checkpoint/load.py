"""Loads the parameters of a resolved checkpoint into any sharding."""

from pathlib import Path

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import dtypes, resolve
from qwen_jax.checkpoint.huggingface import loader
from qwen_jax.checkpoint.native import reader
from qwen_jax.checkpoint.resolve import Resolved


def load(
    resolved: Resolved,
    *,
    shardings: dict | None = None,
    dtype: str | None = None,
    model: ModelConfig | None = None,
) -> dict:
    """The parameter tree of a checkpoint, each device reading its own part.

    `shardings` is a tree like the parameters'; without it everything lies on the first device.
    `dtype` (`float32`, `bfloat16`, `float16`) defaults to the stored one. With `model`, the
    checkpoint must have its shapes, except for experts that pad their number, which are added as
    zeros or left out, and router biases, which begin as zeros.

    Raises `ValueError` for a checkpoint that is damaged or of another model.
    """
    if model is not None:
        resolve.check_same_model(resolved, model)
    if dtype is not None:
        dtypes.check_name(dtype)
    model = model or resolved.model
    if resolved.kind == "huggingface":
        return loader.load(resolved, shardings=shardings, dtype=dtype, model=model)
    return reader.restore(
        resolved.folder,
        stored_model=resolved.model,
        specs=resolved.specs,
        shardings=shardings,
        dtype=dtype,
        model=model,
    )


def load_params(
    path: Path | str,
    *,
    shardings: dict | None = None,
    dtype: str | None = None,
    model: ModelConfig | None = None,
) -> dict:
    """The parameter tree of the checkpoint at `path`: `resolve`, then `load`."""
    return load(resolve.resolve(path), shardings=shardings, dtype=dtype, model=model)
