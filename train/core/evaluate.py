"""Held-out evaluation: means over all weighted tokens of some batches."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from train.core import batches as batches_lib
from train.core.step import Program, Sums


def evaluate(
    program: Program,
    params: dict,
    batches: Iterable[batches_lib.HostBatch],
    *,
    put: Callable[[batches_lib.HostBatch], dict[str, jax.Array]],
) -> dict[str, float]:
    """Mean loss and metrics a token over `batches`, and the number of tokens.

    Tokens count by weight, not batches by number: a padded last batch weighs what it holds.
    Raises `ValueError` if no token carries weight.
    """
    total: Sums | None = None
    for batch in batches:
        sums = program.evaluate(params, put(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    total = jax.device_get(total)
    if total is None or total.weight == 0:
        raise ValueError(
            "the held-out data has no token to evaluate; raise data.eval_fraction, or give "
            "data.eval_paths"
        )
    weight = float(total.weight)
    means = {name: float(value) / weight for name, value in total.metrics.items()}
    return {"loss": float(total.loss) / weight, **means, "tokens": weight}
