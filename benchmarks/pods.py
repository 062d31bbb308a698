"""Compiles one training step of every published model for slices of three chips: docs/pods.md.

    python benchmarks/pods.py --results docs/pods.jsonl             # hours on two cores; goes on
    python benchmarks/pods.py --results docs/pods.jsonl --markdown  # the table of what is there
    python benchmarks/pods.py --results docs/pods.jsonl --estimate  # today's estimates, in place

Needs libtpu and no TPU. Each row is what `qwen-jax plan ... --compile` of its command compiles as
`step`: float32 weights and moments, bfloat16 arithmetic, rows packed with segment ids.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from configs.data import DataConfig
from configs.hardware import topologies, xla_flags
from configs.models import presets, qwen2_moe
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig

SLICES = {
    "qwen2.5-0.5b": ("v5e-16", "v5p-8", "v6e-8"),
    "qwen2.5-1.5b": ("v5e-16", "v5p-8", "v6e-8"),
    "qwen2.5-3b": ("v5e-16", "v5p-16", "v6e-16"),
    "qwen2.5-7b": ("v5e-64", "v5p-32", "v6e-64"),
    "qwen2.5-14b": ("v5e-128", "v5p-64", "v6e-64"),
    "qwen2.5-32b": ("v5e-256", "v5p-128", "v6e-256"),
    "qwen2.5-72b": ("v5e-256", "v5p-128", "v6e-256"),
    "qwen1.5-moe-a2.7b": ("v5e-64", "v5p-64", "v6e-64"),
    "qwen2-57b-a14b": ("v5e-256", "v5p-128", "v6e-256"),
}
LENGTHS = (4096, 32768)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step to compile; the plan finds the mesh where none is given. `peer`: MaxText's case."""

    model: str
    where: str
    length: int = 4096
    mesh: str = ""
    remat: str = "full"
    context_parallel: str = "auto"
    peer: str = ""


LONG = (
    Case(model="qwen2.5-7b", where="v5p-128", length=131072, mesh="fsdp=4,context=16"),
    Case(model="qwen2.5-7b", where="v5p-128", length=1048576, mesh="context=64"),
)
# Compiled without flags, as MaxText's were.
PEERS = (
    Case(peer="a1", model="qwen2.5-7b", where="v5p-128", mesh="fsdp=64"),
    Case(peer="a2", model="qwen2.5-7b", where="v5p-128", mesh="fsdp=64", remat="minimal"),
    Case(peer="a8", model="qwen2.5-7b", where="v5p-128", mesh="data=4,fsdp=16"),
    Case(peer="b1", model="qwen2.5-7b", where="v6e-256", mesh="fsdp=256"),
    Case(peer="c1", model="qwen2.5-72b", where="v5p-256", mesh="fsdp=128"),
    Case(peer="d2", model="30b-a3b", where="v5p-128", mesh="fsdp=64"),
    Case(peer="d3", model="30b-a3b", where="v5p-128", mesh="fsdp=16,expert=4"),
    *(
        Case(
            peer=name,
            model="qwen2.5-7b",
            where="v5p-128",
            length=131072,
            mesh="fsdp=4,context=16",
            context_parallel=variant,
        )
        for name, variant in (("e2", "all_gather"), ("e4", "ring"))
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, required=True, help="JSON lines")
    parser.add_argument("--at-once", type=int, default=2, help="compilations at one time")
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--markdown", action="store_true", help="print the table, compile nothing")
    parser.add_argument("--estimate", action="store_true", help="write the plan's estimates anew")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(compile_case(Case(**json.loads(arguments.case)))))
        return
    done = read(arguments.results)
    if arguments.markdown:
        print(markdown(done))
        return
    if arguments.estimate:
        lines = [line_of(case, result | estimate(case, result)) for case, result in done.items()]
        arguments.results.write_text("".join(lines), encoding="utf-8")
        return
    waiting = [case for case in cases() if case not in done and arguments.only in repr(case)]
    with concurrent.futures.ThreadPoolExecutor(arguments.at_once) as pool:
        for future in concurrent.futures.as_completed(
            pool.submit(keep, c, arguments.results) for c in waiting
        ):
            print(future.result(), flush=True)


def cases() -> list[Case]:
    """The table of all models, long context, and the peer's cases."""
    table = [
        Case(model=name, where=where, length=length)
        for length in LENGTHS
        for name, slices in SLICES.items()
        for where in slices
    ]
    return [*table, *LONG, *PEERS]


def keep(case: Case, results: pathlib.Path) -> str:
    """Compiles in a process of its own, which gives its memory back; adds a line to `results`."""
    result = in_process(case)
    with results.open("a", encoding="utf-8") as file:
        file.write(line_of(case, result))
    return f"{case}: {result.get('failed') or round(result['peak'] / 2**30, 2)}"


def line_of(case: Case, result: dict) -> str:
    return json.dumps({"case": dataclasses.asdict(case), **result}) + "\n"


def read(results: pathlib.Path) -> dict[Case, dict]:
    if not results.exists():
        return {}
    lines = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {Case(**line.pop("case")): line for line in lines}


def in_process(case: Case) -> dict:
    command = [sys.executable, __file__, "--results", "-"]
    command += ["--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=xla_flags.WITHOUT_TPU | os.environ
    )
    answer = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if answer:
        return json.loads(answer[-1])
    errors = [line for line in done.stderr.splitlines() if "Error" in line or "exceed" in line]
    return {"failed": (errors or ["no answer"])[-1][:300]}


def model_of(name: str, length: int) -> ModelConfig:
    """The preset, its positions raised to the length where they end before it; or 30b-a3b."""
    if name == "30b-a3b":
        return qwen2_moe.shapes_of_30b_a3b()
    cfg = presets.preset(name)
    return dataclasses.replace(
        cfg, max_position_embeddings=max(cfg.max_position_embeddings, length)
    )


def config_of(case: Case) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(sequence_length=case.length), context_parallel=case.context_parallel
    )


def planned(case: Case, mesh: str):
    """The job of a case on a mesh, one row a device."""
    from partitioning import mesh as mesh_lib
    from qwen_jax.analysis.plan import job

    return job.make(
        model_of(case.model, case.length),
        dataclasses.replace(config_of(case), remat=case.remat, mesh=mesh_lib.parse(mesh)),
        topologies.parse(case.where),
        rows=1,
    )


def estimate(case: Case, result: dict) -> dict:
    """The plan's estimate as it is today, on the mesh that was compiled."""
    from qwen_jax.analysis.plan import memory

    if "failed" in result:
        return {}
    return {"estimate": memory.estimate(planned(case, result["mesh"])).total}


def compile_case(case: Case) -> dict:
    """One row a device, compiled: bytes, counts, seconds, and the plan's estimate."""
    from partitioning import mesh as mesh_lib
    from qwen_jax.analysis import ahead_of_time
    from qwen_jax.analysis.plan import search
    from train.core import step

    where = topologies.parse(case.where)
    found, refused = search.candidates(
        model_of(case.model, case.length),
        config_of(case),
        where,
        rows=1,
        policy=case.remat,
        mesh=mesh_lib.parse(case.mesh) if case.mesh else None,
    )
    best = search.recommend(found, refused)
    layout = ahead_of_time.layout(where, best.job.config.mesh, kind="train")
    program = step.make(best.job.cfg, best.job.config, layout)
    one = ahead_of_time.compile_program(
        program.step.lower(*program.inputs),
        flags={} if case.peer else ahead_of_time.flags(where),
    )
    fields = ("seconds", "arguments", "temporary", "peak", "code", "flops", "accessed_bytes")
    return {
        "mesh": best.job.mesh_text,
        "batch": best.job.config.batch_size,
        "estimate": best.memory.total,
        "hbm": where.chip.device_hbm_bytes,
        **{field: getattr(one, field) for field in fields},
        "cycles": one.hlo.cycles,
        "moved": {kind: dataclasses.astuple(moved) for kind, moved in one.hlo.moved.items()},
    }


def markdown(results: dict[Case, dict]) -> str:
    """One table of the models, one of the peer's cases."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    heading = (
        "model", "tokens", "slice", "mesh", "batch", "GiB state", "GiB peak", "of HBM", "estimate",
        "s to compile", "AG / RS / AR / A2A / CP", "beside work", "GB moved", "fusion cycles",
        "XLA's FLOP, bytes (loops once)",
    )  # fmt: skip
    peers = ("case", *heading[:4], "remat", "GB state", "GB temp", "GB peak", *heading[9:14])
    tables = {False: [heading], True: [peers]}
    for case in cases():
        if case not in results:
            continue
        one = results[case]
        named = (case.model, f"{case.length:,}", case.where, one.get("mesh", case.mesh))
        if "failed" in one:
            tables[bool(case.peer)].append(
                (*((case.peer,) if case.peer else ()), *named, one["failed"])
            )
            continue
        moved = one["moved"]
        sent = (
            f"{one['seconds']:.0f}",
            " / ".join(str(moved.get(kind, (0,))[0]) for kind in kinds),
            str(sum(overlapped for _, _, overlapped in moved.values())),
            f"{sum(size for _, size, _ in moved.values()) / 1e9:.1f}",
            f"{one['cycles']:.3g}",
        )
        if case.peer:
            held = (f"{one[name] / 1e9:.2f}" for name in ("arguments", "temporary", "peak"))
            remat = case.remat if case.context_parallel == "auto" else case.context_parallel
            tables[True].append((case.peer, *named, remat, *held, *sent))
            continue
        tables[False].append(
            (
                *named,
                str(one["batch"]),
                f"{one['arguments'] / 2**30:.2f}",
                f"{one['peak'] / 2**30:.2f}",
                f"{one['peak'] / one['hbm']:.0%}",
                f"{one['estimate'] / one['peak'] - 1:+.0%}",
                *sent,
                f"{one['flops']:.3g}, {one['accessed_bytes']:.3g}",
            )
        )
    return "\n\n".join("\n".join(_table(rows)) for rows in tables.values())


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]


if __name__ == "__main__":
    main()
