"""Renders the launch files of a job as text; nothing is contacted or started."""

import json
import posixpath
import shlex
from collections.abc import Mapping
from pathlib import Path

import jinja2

from configs.hardware import launch, topologies, xla_flags

TEMPLATES: Mapping[launch.Target, tuple[str, ...]] = {
    "queued-resource": ("create.sh", "startup.sh", "watch.sh", "ssh.sh", "delete.sh"),
    "xpk": ("workload.sh",),
    "gke": ("node_pools.sh", "jobset.yaml"),
}

# docs.cloud.google.com/tpu/docs/runtimes, for JAX.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

# A disk of the machine: a restarted run compiles nothing, a replaced machine compiles once.
CACHE = "/var/tmp/qwen-jax-compiled"


def render(job: launch.LaunchConfig, *, target: launch.Target) -> dict[str, str]:
    """The text of each launch file by name.

    Raises:
        ValueError: what `job` says does not suit `target` (`LaunchConfig.check_target`).
    """
    job.check_target(target)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qwen_jax.launch"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML: every value goes through a filter or a checked pattern
    )
    environment.filters |= {"quote": shlex.quote, "join_quoted": shlex.join, "tojson": json.dumps}
    values = _values(job)
    return {
        name: environment.get_template(f"{name}.j2").render(values) for name in TEMPLATES[target]
    }


def write(texts: Mapping[str, str], job: launch.LaunchConfig, *, folder: Path) -> str:
    """Writes the files; the text that says what they rent and which to run first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    part = job.slice
    first = {"create.sh": "watch.sh"}.get(next(iter(texts)), next(iter(texts)))
    return (
        f"{folder}: {', '.join(texts)}\n"
        f"{job.topology}: {part.num_chips} {part.chip.name} chips, {part.num_devices} jax devices, "
        f"{part.hosts} machines, {part.num_slices} x {part.shape_name}\n"
        f"every machine runs: {shlex.join(command(job))}\n"
        f"syntax, options and chips checked; start with {folder / first}; docs/cloud_tpu.md"
    )


def command(job: launch.LaunchConfig) -> list[str]:
    """The command that every machine runs, and runs again after an interruption."""
    ours = ["--output", job.output, "--cluster.launch", "auto"]
    return ["qwen-jax", "train", *job.train_words, *ours]


def _values(job: launch.LaunchConfig) -> dict[str, object]:
    part = job.slice
    standard = topologies.parse(part.cloud_name).shape == part.shape
    return {
        "job": job,
        "slice": part,
        "standard": standard,
        "runtime": RUNTIMES.get(part.chip.name),
        "command": command(job),
        "environment": {
            "JAX_COMPILATION_CACHE_DIR": CACHE,
            "PYTHONUNBUFFERED": "1",
            **xla_flags.environment(part.chip),
        },
        "cache": CACHE,
        "ended": posixpath.join(job.output, "launch", "exit_code"),
        "package_file": posixpath.basename(job.package),
        "machine_type": machine_type(part),
        # tpu7x: a workload policy says the shape, in place of --tpu-topology (GKE, TPU7x).
        "policy": part.chip.name == "tpu7x" and part.hosts_per_slice > 1,
        "tpu_type": (
            part.cloud_name
            if standard
            else f"{part.chip.cloud_prefix}-{part.shape_name}"  # as xpk names other shapes
        ),
    }


def machine_type(part: topologies.Slice) -> str:
    """Compute Engine's machine type with as many chips as one machine of the slice has."""
    family = str(part.chip.machine_type).removesuffix(f"{part.chip.chips_per_host}t")
    return f"{family}{part.chips_per_host}t"
