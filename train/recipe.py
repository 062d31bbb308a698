"""The recipe a run was started with, kept beside it: a run goes on only with what it began with."""

import dataclasses
import json
import os
from pathlib import Path

from configs import schema

FILE = "recipe.json"

# What may change between two starts of one run, because it leaves every number of a step as it is
# up to rounding, or only says when to stop, to look or to save.
HARMLESS = frozenset(
    (
        "output", "accumulate_steps", "remat", "attention", "loss_chunk", "mesh", "checkpoint",
        "log_every_steps", "eval_every_steps", "eval_batches", "profile_steps", "spike_factor",
        "spike_patience", "data.worker_count", "data.prefetch",
    )
)  # fmt: skip
# With these schedules the length is no part of the curve before the decay.
_OPEN_ENDED = {"constant": {"num_steps"}, "wsd": {"num_steps", "optimizer.decay_steps"}}


def claim(output: Path, config: schema.Train, cfg: schema.Model) -> None:
    """Write the recipe to `output`, or check it against the one that is there.

    Raises `ValueError` naming every field that differs and would break the run's continuity.
    """
    path = output / FILE
    values = json.loads(json.dumps(schema.to_dict(dataclasses.replace(config, model=cfg))))
    if path.exists():
        _check_same(path, json.loads(path.read_text(encoding="utf-8")), values, config)
    output.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{FILE}.{os.getpid()}")
    written.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    written.replace(path)


def _check_same(path: Path, saved: dict, values: dict, config: schema.Train) -> None:
    harmless = HARMLESS | _OPEN_ENDED.get(config.optimizer.schedule, set())
    before, now = _flatten(saved), _flatten(values)
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(name == known or name.startswith(known + ".") for known in harmless)
    ]
    if changed:
        raise ValueError(
            f"{path} was written for a run with other settings ({'; '.join(changed)}); put them "
            f"back to go on, or choose another output"
        )


def _flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
