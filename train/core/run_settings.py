"""Recipe of a run, saved in its output: a run resumes only with the recipe it started with."""

import dataclasses
import json
import socket
import time
import uuid
from pathlib import Path

import jax

from configs import schema
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning.processes import cluster
from qwen_jax import storage

FILE = "recipe.json"
_SEEN_SECONDS = 10

# Fields that may change between two starts of one run: they change the numbers of a step by no more
# than rounding, or only set when the run stops, evaluates, logs or saves.
HARMLESS = frozenset(
    (
        "output", "accumulate_steps", "remat", "attention", "loss_chunk", "mesh", "checkpoint",
        "cluster", "log_every_steps", "eval_every_steps", "eval_batches", "profile_steps",
        "spike_factor", "spike_patience", "executables", "data.worker_count", "data.prefetch",
    )
)  # fmt: skip
# With these schedules the learning rate before the decay does not depend on the run's length.
_OPEN_ENDED = {"constant": {"num_steps"}, "wsd": {"num_steps", "optimizer.decay_steps"}}


def claim(output: Path, config: TrainConfig, cfg: ModelConfig) -> None:
    """Write the recipe to `output`, or check it against the recipe saved there.

    Every process calls it; the first one reads and writes, when all have agreed on one recipe.
    Raises `ValueError` naming every field that differs and would break the run's continuity, or
    that differs between processes; and the processes to which `output` is another folder.
    """
    path = output / FILE
    values = json.loads(json.dumps(schema.to_dict(dataclasses.replace(config, model=cfg))))
    cluster.agree(schema.flatten({**values, "cluster": None, "output": None}))
    if jax.process_index() == 0:
        _claim(path, values, config)
    _check_shared(output)


def _claim(path: Path, values: dict, config: TrainConfig) -> None:
    output = path.parent
    if path.exists():
        _check_same(path, json.loads(path.read_text(encoding="utf-8")), values, config)
    output.mkdir(parents=True, exist_ok=True)
    storage.write_text(path, json.dumps(values, indent=2) + "\n")


def _check_shared(output: Path) -> None:
    """Raises `ValueError`, in every process, unless all see a file that process 0 writes."""
    if jax.process_count() == 1:
        return
    name = cluster.gather(f".shared-{uuid.uuid4().hex}")[0]
    if jax.process_index() == 0:
        (output / name).write_bytes(b"")
    cluster.gather(None)
    # A network file system may cache the absence of a name for some seconds.
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := (output / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    apart = [
        f"process {n} on {host}"
        for n, (host, sees) in enumerate(cluster.gather([socket.gethostname(), seen]))
        if not sees
    ]
    if jax.process_index() == 0:
        (output / name).unlink()
    if apart:
        raise ValueError(
            f"output={output} is not the same folder for all processes: {', '.join(apart)} cannot "
            f"see what process 0 writes there; give a folder on a shared file system, or gs://"
        )


def _check_same(path: Path, saved: dict, values: dict, config: TrainConfig) -> None:
    harmless = HARMLESS | _OPEN_ENDED.get(config.optimizer.schedule, set())
    before, now = schema.flatten(saved), schema.flatten(values)
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
