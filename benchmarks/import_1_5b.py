"""Import and export of a real-shape Qwen2.5-1.5B with random weights, beside the disk's own speed.

    python benchmarks/import_1_5b.py FOLDER [--rounds 3] [--model qwen2.5-1.5b]

Writes a fake Hugging Face folder (3.1 GB) into FOLDER, and in each round measures a plain
sequential write with fsync of as many bytes, then an import and an export, each in a process of its
own whose peak resident memory is read. Prints a table with ratios to the disk of the same round.
CPU seconds tell a busy machine (far below the seconds times the cores it could use) from a slow
program: measure on an idle one, for the plain write needs almost no processor.
FOLDER needs three times the size of the model; what is written is deleted at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.models import huggingface, qwen2_5  # noqa: E402
from qwen_jax.checkpoint import tensor_table  # noqa: E402

BLOCK = 16 << 20
CHILD = """
import resource, sys, time
from qwen_jax.checkpoint.huggingface import {module}
start = time.perf_counter()
planned = {module}.{function}(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(seconds, usage.ru_utime + usage.ru_stime, peak, planned.peak_bytes)
"""


def make_checkpoint(folder: Path, name: str) -> int:
    """A folder like the published one; returns the bytes of its tensors."""
    model = qwen2_5.preset(name)
    folder.mkdir(parents=True)
    config = huggingface.write_model(model, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for tensor, row in tensor_table.hf_names(model).items():
        shape = tensor_table.hf_shape(row, model)
        end = offset + 2 * int(np.prod(shape))
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, BLOCK):
            count = min(BLOCK, offset - start) // 2
            # Without the exponent's highest bit every pattern is finite.
            file.write(random.integers(0, 1 << 16, count, dtype=np.uint16) & 0xBFFF)
        os.fsync(file.fileno())
    return offset


def write_sequentially(path: Path, size: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, for a plain write of `size` bytes that are on disk at the end."""
    block = os.urandom(BLOCK)
    start, cpu = time.perf_counter(), time.process_time()
    with path.open("wb", buffering=0) as file:
        for position in range(0, size, BLOCK):
            file.write(block[: size - position])
        os.fsync(file.fileno())
    result = time.perf_counter() - start, time.process_time() - cpu
    path.unlink()
    return result


def convert(
    module: str, function: str, source: Path, target: Path
) -> tuple[float, float, int, int]:
    """Seconds, CPU seconds, peak resident bytes, and the peak that was planned."""
    code = CHILD.format(module=module, function=function)
    result = subprocess.run(
        [sys.executable, "-c", code, str(source), str(target)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, cpu, peak, planned = result.stdout.split()
    return float(seconds), float(cpu), int(peak), int(planned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--model", default="qwen2.5-1.5b", help="preset whose shapes are used")
    options = parser.parse_args()
    console = Console()
    work = options.folder / "import_1_5b"
    work.mkdir(parents=True)
    results: dict[str, list[tuple[float, ...]]] = {}
    try:
        with console.status("making the checkpoint"):
            size = make_checkpoint(work / "hf", options.model)
        for number in range(options.rounds):
            with console.status(f"round {number + 1} of {options.rounds}"):
                disk, cpu = write_sequentially(work / "plain", size)
                results.setdefault("sequential write", []).append((disk, 1.0, cpu, 0, 0))
                steps = (
                    ("import", "importer", "import_checkpoint", "hf", "native"),
                    ("export", "exporter", "export_checkpoint", "native", "back"),
                )
                for label, module, function, source, target in steps:
                    seconds, *rest = convert(module, function, work / source, work / target)
                    results.setdefault(label, []).append((seconds, disk / seconds, *rest))
                for target in ("native", "back"):
                    shutil.rmtree(work / target)
    finally:
        shutil.rmtree(work)
    out = Table(title=f"{options.model}, {size / 1e9:.2f} GB, median of {options.rounds} rounds")
    for column in ("", "s", "GB/s", "of the disk", "CPU s", "peak MiB", "planned MiB"):
        out.add_column(column, justify="left" if not column else "right")
    for label, rounds in results.items():
        seconds, ratio, cpu, peak, planned = (
            statistics.median(values) for values in zip(*rounds, strict=True)
        )
        memory = [f"{n / 2**20:.0f}" if n else "" for n in (peak, planned)]
        speed = f"{size / seconds / 1e9:.2f}"
        out.add_row(label, f"{seconds:.2f}", speed, f"{ratio:.0%}", f"{cpu:.1f}", *memory)
        console.print(f"{label}: " + ", ".join(f"{r[0]:.2f} s ({r[1]:.0%})" for r in rounds))
    console.print(out)


if __name__ == "__main__":
    main()
