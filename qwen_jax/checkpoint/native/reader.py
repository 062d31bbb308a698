"""Reads the arrays of native checkpoints: opened and checked, or restored onto devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts

from configs.models.architecture import ModelConfig
from qwen_jax import storage
from qwen_jax.checkpoint import placement, tensor_table
from qwen_jax.checkpoint.native import store
from qwen_jax.checkpoint.quantised import quantised_params, stored_arrays


def open_arrays(
    folder: Path, model: ModelConfig, specs: stored_arrays.Specs
) -> dict[str, ts.TensorStore]:
    """The stored arrays of every parameter by path, checked against the model's config.

    `specs` says which parameters are quantised. Raises `ValueError` naming the parameters that are
    missing, extra or of another shape.
    """
    stored = store.open_all_for_reading(folder / "params", store.context())
    expected = stored_arrays.shapes(model, specs)
    where = f"{folder} does not hold the parameters of {model.name}"
    if missing := [path for path in expected if path not in stored]:
        raise ValueError(f"{where}: it lacks {tensor_table.first_names(missing)}")
    if extra := [path for path in stored if path not in expected]:
        raise ValueError(f"{where}: it has also {tensor_table.first_names(extra)}")
    for path, shape in expected.items():
        if stored[path].shape != shape:
            raise ValueError(
                f"{where}: {path} has shape {list(stored[path].shape)}, "
                f"its config asks for {list(shape)}"
            )
    return {path: stored[path] for path in expected}


def restore(
    folder: Path,
    *,
    stored_model: ModelConfig,
    specs: stored_arrays.Specs,
    shardings: dict | None,
    dtype: str | None,
    model: ModelConfig,
) -> dict:
    """The parameter tree of a native checkpoint on devices; `load.load` says what the values mean.

    `stored_model` is the checkpoint's, `model` the one that the tree is for.
    """
    arrays = open_arrays(folder, stored_model, specs)
    rows = tensor_table.rows(model)
    by_path = placement.by_stored_array(model, specs, placement.by_parameter(rows, shardings))
    shapes = stored_arrays.shapes(model, specs)
    new_arrays = {
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
    flat = {**_restore_arrays(folder, restore_args), **new_arrays}
    for row in rows:
        if row.path in specs:
            names = stored_arrays.pieces(row, model, specs[row.path])
            pieces = {name: flat.pop(f"{row.path}.{name}") for name in names}
            flat[row.path] = quantised_params.gather(row, specs[row.path], pieces)
    return tensor_table.nest(flat)


def _restore_arrays(folder: Path, restore_args: dict[str, ocp.ArrayRestoreArgs]) -> dict:
    """The arrays by path, as Orbax restores them. Raises `ValueError` for a damaged checkpoint."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                storage.absolute(folder) / "params",
                args=ocp.args.PyTreeRestore(restore_args=tensor_table.nest(restore_args)),
            )
    except jax.errors.JaxRuntimeError:
        raise  # no room on a device, say
    except Exception as error:  # Orbax raises, among many others, `Exception` itself
        raise ValueError(
            f"{folder} is damaged: {str(error).strip().splitlines()[0]}. `qwen-jax checkpoint "
            f"verify` names all that is"
        ) from error
    return tensor_table.flatten(restored)
