"""Finds checkpoints and restores parameters from them into any sharding.

A native checkpoint is a folder:

    params/         an Orbax PyTree checkpoint of the parameter tree
    model/metadata  JSON: {"format": 1, "model": <ModelConfig>, ...}
    assets/         files of the Hugging Face folder that it came from

A step of a training run, OUTPUT/checkpoints/STEP, is one too; its assets are in OUTPUT/assets.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts

from configs.models import architecture, huggingface
from configs.models.architecture import ModelConfig
from qwen_jax import storage
from qwen_jax.checkpoint import tensor_table
from qwen_jax.checkpoint.huggingface import loader, source
from qwen_jax.checkpoint.native import store
from qwen_jax.checkpoint.quantised import parameters as quantised_parameters
from qwen_jax.checkpoint.quantised import stored_arrays


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a path turned out to be."""

    kind: Literal["huggingface", "native", "training"]
    path: Path  # the Hugging Face folder, or the native checkpoint
    assets: Path | None  # folder with config.json, tokenizer files and the like, where there is one
    model: ModelConfig
    metadata: dict  # of a native checkpoint; empty for a Hugging Face folder
    step: int | None = None  # of a training run


def resolve(path: Path | str) -> Resolved:
    """The checkpoint at `path`: a Hugging Face folder, a native one, or a training run's newest.

    Raises `ValueError` saying what is missing where it is none of these.
    """
    path = storage.folder(path)
    if not path.is_dir():
        partial = path.with_name(path.name + ".partial")
        hint = f"; {partial} is an unfinished import: run it again" if partial.is_dir() else ""
        raise ValueError(f"{path} is not a folder{hint}")
    if (path / "import.json").exists() and path.name.endswith(".partial"):
        raise ValueError(f"{path} is an unfinished import; run the import again to finish it")
    if (path / "params").is_dir() or (path / "model").is_dir():
        return _resolve_native(path)
    if (path / "checkpoints").is_dir():
        return _resolve_training(path)
    if (path / "config.json").is_file():
        return _resolve_huggingface(path)
    raise ValueError(
        f"{path} is no checkpoint: it has neither config.json (Hugging Face), params/ and "
        f"model/metadata (native), nor checkpoints/ (a training run)"
    )


def _resolve_huggingface(path: Path) -> Resolved:
    if storage.is_remote(path):
        raise ValueError(f"{path} is a Hugging Face folder in a bucket; copy it to a disk")
    config = source.read_json(path / "config.json")
    model = huggingface.read_model(config, name=path.resolve().name)
    if source.weight_files(path) is None:
        raise ValueError(f"{path} has config.json but neither safetensors nor pytorch_model.bin")
    return Resolved(kind="huggingface", path=path, assets=path, model=model, metadata={})


def _is_complete(path: Path) -> bool:
    whole = (path / "params" / "_METADATA").is_file() and (path / "model" / "metadata").is_file()
    # In a bucket, where nothing can be renamed, Orbax writes this file last.
    return whole and (not storage.is_remote(path) or (path / "commit_success.txt").is_file())


def _resolve_native(path: Path) -> Resolved:
    for part in ("params/_METADATA", "model/metadata"):
        if not (path / part).is_file():
            raise ValueError(f"{path} is an incomplete native checkpoint: {part} is missing")
    values = source.read_json(path / "model" / "metadata")
    if values.get("format") != store.FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {values.get('format')!r}; "
            f"this version reads {store.FORMAT}"
        )
    if not isinstance(values.get("model"), dict):
        raise ValueError(f"{path / 'model' / 'metadata'} has no model")
    try:
        model = architecture.model_from_dict(values["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / 'model' / 'metadata'}: {error}") from None
    # A step of a training run shares the run's assets.
    candidates = [path / "assets"]
    home = storage.absolute(path).parent
    if home.name == "checkpoints":
        candidates.append(home.parent / "assets")
    assets = next((folder for folder in candidates if folder.is_dir()), None)
    return Resolved(kind="native", path=path, assets=assets, model=model, metadata=values)


def _resolve_training(path: Path) -> Resolved:
    folder = path / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())
    complete = [step for step in steps if _is_complete(folder / str(step))]
    if not complete:
        raise ValueError(f"{path} is a training run without a complete checkpoint yet")
    found = _resolve_native(folder / str(complete[-1]))
    assets = path / "assets"
    return Resolved(
        kind="training",
        path=found.path,
        assets=assets if assets.is_dir() else found.assets,
        model=found.model,
        metadata=found.metadata,
        step=complete[-1],
    )


def open_arrays(resolved: Resolved, context: ts.Context) -> dict[str, ts.TensorStore]:
    """The stored array of every parameter by path, checked against the model's config.

    Raises `ValueError` naming the parameters that are missing, extra or of another shape.
    """
    stored = store.open_all_for_reading(resolved.path / "params", context)
    expected = stored_arrays.shapes(resolved.model, specs(resolved))
    where = f"{resolved.path} does not hold the parameters of {resolved.model.name}"
    if missing := [path for path in expected if path not in stored]:
        raise ValueError(f"{where}: it lacks {source.listed(missing)}")
    if extra := [path for path in stored if path not in expected]:
        raise ValueError(f"{where}: it has also {source.listed(extra)}")
    for path, shape in expected.items():
        if stored[path].shape != shape:
            raise ValueError(
                f"{where}: {path} has shape {list(stored[path].shape)}, "
                f"its config asks for {list(shape)}"
            )
    return {path: stored[path] for path in expected}


def specs(resolved: Resolved) -> dict[str, stored_arrays.Spec]:
    """Which parameters of a checkpoint are quantised, and how; none of most."""
    if resolved.kind == "huggingface":
        return {}
    where = str(resolved.path / "model" / "metadata")
    return stored_arrays.from_metadata(resolved.metadata, resolved.model, where=where)


def check_plain(resolved: Resolved, *, what: str) -> None:
    """Raises `ValueError` for a quantised checkpoint, which serves inference alone."""
    packed = resolved.kind == "huggingface" and source.is_packed(resolved.path)
    if packed or specs(resolved):
        raise ValueError(
            f"{resolved.path} is quantised, for inference alone; {what} the checkpoint that it was "
            f"made from"
        )


def check_same_model(resolved: Resolved, model: ModelConfig) -> None:
    """Raises `ValueError` naming every parameter shape in which `model` differs.

    `model` may pad the number of its experts otherwise, and may add router biases.
    """
    if tensor_table.has_router_bias(resolved.model) and not tensor_table.has_router_bias(model):
        raise ValueError(
            f"{resolved.path} has router biases, without which other experts would be chosen; "
            f"set experts.bias_update_rate to go on with them"
        )
    theirs, ours = (
        {row.path: tensor_table.shape(row, plain) for row in tensor_table.rows(plain)}
        for plain in (_without_extras(resolved.model), _without_extras(model))
    )
    differing = [
        f"{path} {list(theirs.get(path, ()))} instead of {list(ours.get(path, ()))}"
        for path in dict.fromkeys([*ours, *theirs])
        if theirs.get(path) != ours.get(path)
    ]
    if differing:
        raise ValueError(
            f"{resolved.path} is a checkpoint of another model ({resolved.model.name}, not "
            f"{model.name}): {source.listed(differing)}"
        )


def _without_extras(model: ModelConfig) -> ModelConfig:
    if model.moe is None:
        return model
    moe = dataclasses.replace(model.moe, pad_experts_to=None, bias_update_rate=None)
    return dataclasses.replace(model, moe=moe)


def load_params(
    checkpoint: Path | str | Resolved,
    *,
    shardings: dict | None = None,
    dtype: str | None = None,
    model: ModelConfig | None = None,
) -> dict:
    """The parameters of any checkpoint that `resolve` knows, each device reading its own part.

    `shardings` is a tree like the parameters'; without it everything lies on the first device.
    `dtype` (`float32`, `bfloat16`, `float16`) defaults to the stored one. With `model`, the
    checkpoint must have its shapes, but for experts that pad their number, which are added as zeros
    or left out, and router biases, which begin as zeros.

    Raises `ValueError` for a checkpoint that is not one, of another model, or damaged.
    """
    resolved = checkpoint if isinstance(checkpoint, Resolved) else resolve(checkpoint)
    if model is not None:
        check_same_model(resolved, model)
    if dtype is not None:
        loader.checked_dtype(dtype)
    model = model or resolved.model
    if resolved.kind == "huggingface":
        return loader.load_huggingface(resolved.path, shardings=shardings, dtype=dtype, model=model)
    arrays = open_arrays(resolved, store.context())
    packed = specs(resolved)
    rows = tensor_table.rows(model)
    by_path = _of_pieces(model, packed, loader.per_row(rows, shardings))
    shapes = stored_arrays.shapes(model, packed)
    fresh = {
        path: jax.device_put(jnp.zeros(shape), by_path[path])
        for path, shape in shapes.items()
        if path not in arrays
    }
    plain = {row.path for row in rows}
    restore_args = {
        path: ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=by_path[path],
            global_shape=shape,
            dtype=jnp.dtype(dtype) if dtype and path in plain else arrays[path].dtype.numpy_dtype,
            strict=shape == arrays[path].shape,
        )
        for path, shape in shapes.items()
        if path in arrays
    }
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                storage.absolute(resolved.path) / "params",
                args=ocp.args.PyTreeRestore(restore_args=tensor_table.nest(restore_args)),
            )
    except jax.errors.JaxRuntimeError:
        raise  # no room on a device, say
    except Exception as error:  # Orbax raises, among many others, `Exception` itself
        raise ValueError(
            f"{resolved.path} is damaged: {str(error).strip().splitlines()[0]}. `qwen-jax "
            f"checkpoint verify` names all that is"
        ) from error
    flat = {**tensor_table.flatten(restored), **fresh}
    for row in rows:
        if row.path in packed:
            names = stored_arrays.pieces(row, model, packed[row.path])
            pieces = {name: flat.pop(f"{row.path}.{name}") for name in names}
            flat[row.path] = quantised_parameters.gather(row, packed[row.path], pieces)
    return tensor_table.nest(flat)


def _of_pieces(
    model: ModelConfig, packed: stored_arrays.Specs, by_path: dict[str, jax.sharding.Sharding]
) -> dict[str, jax.sharding.Sharding]:
    """One sharding for each stored array, from one for each parameter."""
    found = {}
    for row in tensor_table.rows(model):
        if row.path not in packed:
            found[row.path] = by_path[row.path]
            continue
        pieces = quantised_parameters.placed(row, model, packed[row.path], by_path[row.path])
        found |= {f"{row.path}.{name}": sharding for name, sharding in pieces.items()}
    return found
