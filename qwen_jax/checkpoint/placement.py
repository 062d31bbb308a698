"""Shardings of a checkpoint's arrays, one for each path of the parameter tree."""

import jax

from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import tensor_table
from qwen_jax.checkpoint.quantised import quantised_params, stored_arrays


def by_parameter(
    rows: tuple[tensor_table.Row, ...], shardings: dict | None
) -> dict[str, jax.sharding.Sharding]:
    """The sharding of each parameter by path; the first device for all where `shardings` is None.

    Raises `ValueError` naming the paths in which the tree `shardings` differs from the parameters.
    """
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {row.path: first for row in rows}
    flat = tensor_table.flatten(shardings)
    paths = {row.path for row in rows}
    if wrong := sorted(paths ^ set(flat)):
        raise ValueError(
            f"shardings and the model's parameters differ in {tensor_table.first_names(wrong)}"
        )
    return flat


def by_stored_array(
    model: ModelConfig, specs: stored_arrays.Specs, by_path: dict[str, jax.sharding.Sharding]
) -> dict[str, jax.sharding.Sharding]:
    """The sharding of each stored array by path; a quantised parameter is stored as several."""
    found = {}
    for row in tensor_table.rows(model):
        if row.path not in specs:
            found[row.path] = by_path[row.path]
            continue
        arrays = quantised_params.array_shardings(row, model, specs[row.path], by_path[row.path])
        found |= {f"{row.path}.{name}": sharding for name, sharding in arrays.items()}
    return found
