"""Compiles one training step of every published model for slices of three chips: docs/pods.md.

    python benchmarks/pods.py --results pods.jsonl             # hours on two cores; goes on
    python benchmarks/pods.py --results pods.jsonl --markdown  # the table of what is there

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

from configs import presets, schema, topologies, xla_flags

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
# Beyond the table: long context, with the mesh named.
LONG = (
    ("qwen2.5-7b", "v5p-128", 131072, "fsdp=4,context=16"),
    ("qwen2.5-7b", "v5p-128", 1048576, "context=64"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, required=True, help="JSON lines")
    parser.add_argument("--at-once", type=int, default=2, help="compilations at one time")
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--markdown", action="store_true", help="print the table, compile nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(compile_row(*json.loads(arguments.row))))
        return
    done = read(arguments.results)
    if arguments.markdown:
        print(markdown(done.values()))
        return
    waiting = [row for row in rows() if row not in done and arguments.only in json.dumps(row)]
    with concurrent.futures.ThreadPoolExecutor(arguments.at_once) as pool:
        for row, result in zip(waiting, pool.map(in_process, waiting), strict=True):
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": row, **result}) + "\n")
            print(row, result.get("failed") or f"{result['peak'] / 2**30:.2f} GiB", flush=True)


def rows() -> list[tuple[str, str, int, str]]:
    """(model, slice, tokens a row, mesh or empty for the plan's own)."""
    table = [
        (name, where, length, "")
        for length in LENGTHS
        for name, slices in SLICES.items()
        for where in slices
    ]
    return [*table, *LONG]


def read(results: pathlib.Path) -> dict[tuple, dict]:
    if not results.exists():
        return {}
    lines = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {tuple(line["row"]): line for line in lines}


def in_process(row: tuple) -> dict:
    """A row compiled in a process of its own, which gives its memory back."""
    command = [sys.executable, __file__, "--results", "-", "--row", json.dumps(row)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=xla_flags.WITHOUT_TPU | os.environ
    )
    answer = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if answer:
        return json.loads(answer[-1])
    errors = [line for line in done.stderr.splitlines() if "Error" in line or "exceed" in line]
    return {"failed": (errors or ["no answer"])[-1][:300]}


def model_of(name: str, length: int) -> schema.Model:
    """The preset, its positions raised to the length where they end before it."""
    cfg = presets.preset(name)
    return dataclasses.replace(
        cfg, max_position_embeddings=max(cfg.max_position_embeddings, length)
    )


def compile_row(name: str, where: str, length: int, mesh: str) -> dict:
    """The plan's mesh for one row a device and full remat, compiled; bytes, counts, seconds."""
    from partitioning import mesh as mesh_lib
    from qwen_jax import ahead_of_time
    from qwen_jax.plan import search
    from train import ahead_of_time as of_train
    from train import step

    slice_ = topologies.parse(where)
    config = schema.Train(data=schema.Data(sequence_length=length))
    found, refused = search.candidates(
        model_of(name, length),
        config,
        slice_,
        rows=1,
        policy="full",
        mesh=mesh_lib.parse(mesh) if mesh else None,
    )
    best = search.recommend(found, refused)
    program = step.make(best.job.cfg, best.job.config, of_train.placed(best.job))
    one = ahead_of_time.compile_program(program.step.lower(*program.inputs), slice_)
    return {
        "mesh": best.job.mesh_text,
        "batch": best.job.config.batch_size,
        "estimate": best.memory.total,
        "chips": slice_.num_chips,
        "hbm": slice_.chip.device_hbm_bytes,
        **{
            field: getattr(one, field)
            for field in (
                "seconds",
                "arguments",
                "temporary",
                "peak",
                "code",
                "flops",
                "accessed_bytes",
            )  # fmt: skip
        },
        "cycles": one.hlo.cycles,
        "moved": {kind: dataclasses.astuple(moved) for kind, moved in one.hlo.moved.items()},
    }


def markdown(results) -> str:
    """A table, and below it the command of each row."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    lines = [
        "| model | tokens | slice | mesh | batch | state | peak | of HBM | estimate | compile "
        "| AG / RS / AR / A2A / permute (beside other work) | GB moved | fusion cycles |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = {row: number for number, row in enumerate(rows())}
    for one in sorted(results, key=lambda one: order[tuple(one["row"])]):
        name, where, length, _ = one["row"]
        if "failed" in one:
            lines.append(f"| {name} | {length:,} | {where} | {one['failed']} |" + " |" * 9)
            continue
        moved = one["moved"]
        counts = " / ".join(str(moved.get(kind, (0,))[0]) for kind in kinds)
        beside = sum(overlapped for _, _, overlapped in moved.values())
        lines.append(
            f"| {name} | {length:,} | {where} | {one['mesh']} | {one['batch']} "
            f"| {one['arguments'] / 2**30:.2f} | {one['peak'] / 2**30:.2f} "
            f"| {one['peak'] / one['hbm']:.0%} | {one['estimate'] / one['peak'] - 1:+.0%} "
            f"| {one['seconds']:.0f} s | {counts} ({beside}) "
            f"| {sum(size for _, size, _ in moved.values()) / 1e9:.1f} | {one['cycles']:.3g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
