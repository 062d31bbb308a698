"""Compilation for a slice that need not be here, and bundles that store compiled programs.

A bundle is a folder: `bundle.json` with its key, and one file for each program. The key describes
what the programs were compiled from: versions, slice, flags, the config in readable form, and a
digest of each lowered program, which differs whenever code or config would make another program. A
bundle whose key differs from the reader's is refused. Its files are pickles: load only your own.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import serialize_executable, topologies
from jax.experimental.compilation_cache import compilation_cache

from configs import schema
from configs.hardware import xla_flags
from configs.hardware.topologies import Slice
from configs.mesh import MeshConfig
from partitioning import mesh, rules
from partitioning.sharding import Layout
from qwen_jax import storage
from qwen_jax.analysis import hlo

Lowered = Mapping[str, jax.stages.Lowered]

FILE, FORMAT = "bundle.json", 1
_PACKAGES = ("jax", "jaxlib", "libtpu", "qwen-jax")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, the bytes that it needs on one device, and the work that it does.

    peak: arguments and everything live beside them at the worst moment. temporary: the heap,
    fragmentation included. hlo: collectives and cycles, loop bodies multiplied by their trip
    counts. flops, accessed_bytes: XLA's own counts, each loop body once.
    """

    program: jax.stages.Compiled
    seconds: float
    arguments: int
    temporary: int
    peak: int
    code: int
    host: int
    flops: float
    accessed_bytes: float
    hlo: hlo.Program


def devices(where: Slice) -> list[jax.Device]:
    """Devices of the slice to compile for; those of a TPU slice exist in the compiler alone.

    On a machine without TPUs, `xla_flags.WITHOUT_TPU` has to be in the environment.

    Raises `ValueError` where the slice's compiler is not installed or needs the devices.
    """
    if where.topology_name is None:
        here = [device for device in jax.devices() if device.platform == where.chip.platform]
        if len(here) < where.num_devices:
            raise ValueError(
                f"{where.name} has {where.num_devices} {where.chip.platform} device(s), "
                f"{len(here)} are here: XLA compiles for CPUs and GPUs only where they are; run "
                f"this there (on CPUs, with JAX_NUM_CPU_DEVICES={where.num_devices}), or leave "
                f"--compile out"
            )
        return here[: where.num_devices]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"compiling for {where.name} needs libtpu, which needs no TPU; install qwen-jax[tpu]"
        )
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=where.topology_name, **where.topology_options
    )
    return list(topology.devices)


def layout(where: Slice, config: MeshConfig, *, kind: Literal["train", "engine"]) -> Layout:
    """A mesh of the slice's devices, as `devices` gives them, with the rules of `kind`."""
    made = mesh.make(config, devices=devices(where))
    return Layout(made, rules.rule_set(kind, kv_heads=config.kv_heads))


def flags(where: Slice) -> dict[str, xla_flags.Value]:
    """Compiler options for the slice's chip; empty for a GPU, whose flags go into XLA_FLAGS."""
    return xla_flags.options(where.chip) if where.chip.platform == "tpu" else {}


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """A context in which programs are compiled, whatever JAX's persistent cache holds.

    A program from the cache is not dumped, and no compiler runs that could refuse a flag. The trap:
    on a CPU, XLA serialises a program that came from the cache without the code of its fusions, and
    a bundle of it fails when it runs.
    """
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def compile_program(lowered: jax.stages.Lowered, *, flags: Mapping[str, object]) -> Compiled:
    """The program, compiled with the compiler options `flags`, and its measures."""
    begin = time.perf_counter()
    with without_cache():
        program = lowered.compile(compiler_options=dict(flags) or None)
    seconds = time.perf_counter() - begin
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Compiled(
        program=program,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        code=memory.generated_code_size_in_bytes,
        host=memory.host_temp_size_in_bytes,
        flops=cost.get("flops", 0.0),
        accessed_bytes=cost.get("bytes accessed", 0.0),
        hlo=hlo.read(program.as_text()),
    )


def key(lowered: Lowered, where: Slice, config: dict) -> dict:
    """The key of a bundle of these programs; `config` names differences in readable form."""
    return {
        "format": FORMAT,
        "versions": {name: _version(name) for name in _PACKAGES},
        "slice": where.name,
        "flags": flags(where),
        "config": config,
        "programs": {
            name: hashlib.sha256(one.as_text().encode()).hexdigest()
            for name, one in lowered.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(folder: Path | str, compiled: Mapping[str, Compiled], key: dict) -> int:
    """The size in bytes of the bundle that this call writes, whole or not at all.

    Raises `ValueError` where something is there already.
    """
    target = storage.folder(folder)
    if target.exists():
        raise ValueError(f"{target} is there already; remove it, or save to another folder")
    with tempfile.TemporaryDirectory() as here:
        made = Path(here)
        for name, one in compiled.items():
            serialized, _, _ = serialize_executable.serialize(one.program)
            (made / name).write_bytes(serialized)
        (made / FILE).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        storage.publish(made, target)
    return sum(storage.size(file) for file in storage.files(target))


def read_key(folder: Path | str) -> dict:
    """The key that a bundle was saved under.

    Raises `ValueError` where `folder` is no bundle, or of another version.
    """
    folder = storage.folder(folder)
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} is no bundle: it has no {FILE}; make one by plan --save")
    try:
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / FILE} is not valid JSON: {error}") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{folder / FILE} is not of format {FORMAT}; make it again by plan --save")
    return saved


def load(folder: Path | str, lowered: Lowered, key: dict) -> dict[str, jax.stages.Compiled]:
    """The programs of a bundle, ready to run, if its key is `key`, made from the same `lowered`.

    Raises `ValueError` that says what differs, and where the bundle is not whole.
    """
    folder, saved = storage.folder(folder), read_key(folder)
    if differences := _differences(saved, json.loads(json.dumps(key))):
        raise ValueError(
            f"{folder} was not compiled for this run ({'; '.join(differences)}); make another by "
            f"plan --save, or run without it"
        )
    programs = {}
    for name, one in lowered.items():
        try:
            serialized = (folder / name).read_bytes()
            programs[name] = serialize_executable.deserialize_and_load(
                serialized, one.in_tree, one.out_tree
            )
        except (OSError, EOFError, pickle.UnpicklingError, jax.errors.JaxRuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder / name} cannot be loaded: {reason}") from error
    return programs


def _differences(saved: dict, wanted: dict) -> list[str]:
    before, now = schema.flatten(saved), schema.flatten(wanted)
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    digests = [one for one in changed if one.startswith("programs.")]
    if changed and len(changed) == len(digests):
        return ["the code has changed since"]
    return [one for one in changed if one not in digests]
