"""The quickstart: every job of the project once, on text that any machine with Python has.

Each stage is a `qwen-jax` command that is printed before it runs, so that a reader can repeat it
with text of his own.
"""

import ast
import json
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CORPUS_BYTES = 12_000_000
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),  # tables, not prose or programs
}
_PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n\n",
    '    """Return the ',
    "class Error(Exception):\n",
    "    if not isinstance(",
    "for name in ",
    "    raise ValueError(",
    "# This module ",
)


@dataclass(frozen=True)
class Stage:
    """A stage that was run: its title, its command, and its time in seconds."""

    title: str
    command: str
    seconds: float


def run(output: Path, *, num_steps: int) -> Path:
    """Runs all stages under `output` and returns the report's path.

    Raises `ValueError` if `output` holds anything, or if a stage fails, naming its command.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; remove it, or name another folder by --output")
    corpus, tokenizer = output / "corpus", output / "tokenizer"
    trained, exported, imported = output / "run", output / "huggingface", output / "imported"
    prompts, answers = output / "prompts.jsonl", output / "answers.jsonl"
    stages = []

    print("Real text: the sources and docstrings of this machine's Python standard library.")
    num_files, num_bytes = write_corpus(corpus)
    print(f"  {num_files} files, {num_bytes / 1e6:.1f} MB in {corpus}\n")

    def stage(title: str, *arguments: object) -> None:
        stages.append(_stage(title, [str(argument) for argument in arguments]))

    stage(
        "Train a byte-level BPE tokenizer",
        *("tokenizer", "train", corpus, "--kind", "bpe"),
        *("--vocab-size", 2048, "--output", tokenizer),
    )
    train = [
        *("train", "quickstart", "--data.paths", corpus, "--data.tokenizer", tokenizer),
        *("--num-steps", num_steps, "--output", trained),
    ]
    train = [str(argument) for argument in train]
    stages.append(_interrupted_stage("Train, and be stopped half-way", train, trained, num_steps))
    stage("Resume: the same command goes on where it was", *train)
    stage("Export to Hugging Face format", "convert", "export", trained, exported)
    stage("Import it back", "convert", "import", exported, imported)
    with prompts.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(_PROMPTS):
            file.write(json.dumps({"custom_id": f"prompt-{number}", "prompt": prompt}) + "\n")
    stage(
        "Complete a batch of prompts",
        *("batch", prompts, answers, "--model", imported),
        *("--temperature", 0, "--max-tokens", 48, "--dtype", "float32"),
    )
    return _report(output, stages)


def write_corpus(folder: Path) -> tuple[int, int]:
    """Writes the standard library's sources and docstrings; the numbers of files and bytes."""
    folder.mkdir(parents=True)
    num_files = num_bytes = 0
    with (
        (folder / "sources.jsonl").open("w", encoding="utf-8") as sources,
        (folder / "docstrings.jsonl").open("w", encoding="utf-8") as docstrings,
    ):
        for name, text, docs in _standard_library():
            sources.write(json.dumps({"name": name, "text": text}) + "\n")
            if docs:
                docstrings.write(json.dumps({"name": name, "text": "\n\n".join(docs)}) + "\n")
            num_files += 1
            num_bytes += len(text.encode()) + sum(len(doc.encode()) for doc in docs)
            if num_bytes >= _CORPUS_BYTES:
                break
    return num_files, num_bytes


def _standard_library() -> Iterator[tuple[str, str, list[str]]]:
    """Name, source and docstrings of each module, in an order that is the same everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(name.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # templates and old encodings: not text to learn from
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        docs = [doc for node in nodes if (doc := ast.get_docstring(node))]
        if text.strip():
            yield name.as_posix(), text, docs


def _stage(title: str, arguments: list[str]) -> Stage:
    """Runs one command to its end."""
    shown = _announce(title, arguments)
    begin = time.perf_counter()
    code = subprocess.run(_command(arguments)).returncode
    if code:
        raise ValueError(f"`{shown}` ended with exit code {code}")
    return _done(title, shown, begin)


def _interrupted_stage(title: str, arguments: list[str], output: Path, num_steps: int) -> Stage:
    """Starts training and sends SIGTERM half-way, as a cloud does before it takes a machine."""
    shown = _announce(title, arguments)
    begin = time.perf_counter()
    process = subprocess.Popen(_command(arguments))
    try:
        while process.poll() is None and _last_step(output) < num_steps // 2:
            time.sleep(0.2)
        print("  (sending SIGTERM)", flush=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    from_signal = 75  # train.core.loop's exit code: interrupted, everything saved
    if code != from_signal:
        raise ValueError(f"`{shown}` ended with exit code {code} instead of {from_signal}")
    return _done(title, shown, begin)


def _announce(title: str, arguments: list[str]) -> str:
    shown = shlex.join(["qwen-jax", *arguments])
    print(f"== {title}\n$ {shown}", flush=True)
    return shown


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "qwen_jax.cli", *arguments]


def _done(title: str, shown: str, begin: float) -> Stage:
    seconds = time.perf_counter() - begin
    print(f"  {seconds:.1f} s\n", flush=True)
    return Stage(title, shown, seconds)


def _metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _last_step(output: Path) -> int:
    return max((row["step"] for row in _metrics(output)), default=0)


def _report(output: Path, stages: list[Stage]) -> Path:
    """Writes `report.md` with the loss curve, the answers and the commands."""
    rows = _metrics(output / "run")
    train = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "eval"]
    _draw(output / "loss.png", train, held_out)
    first, last = held_out[0], held_out[-1]
    if not last["cross_entropy"] < first["cross_entropy"]:
        raise ValueError(
            f"the held-out loss did not fall: {first['cross_entropy']:.4f} at step "
            f"{first['step']}, {last['cross_entropy']:.4f} at step {last['step']}"
        )
    lines = [
        "# Quickstart report",
        "",
        f"Held-out loss {first['cross_entropy']:.3f} at step {first['step']}, "
        f"{last['cross_entropy']:.3f} at step {last['step']}; "
        f"{train[-1]['step']} steps of {train[-1]['tokens']:.0f} tokens.",
        "",
        "![loss curve](loss.png)",
        "",
        "## What was run",
        "",
        "| stage | seconds | command |",
        "| --- | --- | --- |",
        *(f"| {stage.title} | {stage.seconds:.1f} | `{stage.command}` |" for stage in stages),
        "",
        "## Prompts completed by the trained model, greedily",
        "",
    ]
    answers = (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    by_id = {row["custom_id"]: row for row in map(json.loads, answers)}
    for number, prompt in enumerate(_PROMPTS):
        answer = by_id[f"prompt-{number}"]
        lines += ["```", f"{prompt}⟶{answer['text']}", "```", ""]
    report = output / "report.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    print(f"Held-out loss {first['cross_entropy']:.3f} -> {last['cross_entropy']:.3f}.")
    print(f"Report: {report}\nLoss curve: {output / 'loss.png'}")
    return report


def _draw(path: Path, train: list[dict], held_out: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for rows, style, label in ((train, "-", "training"), (held_out, "o-", "held out")):
        steps = [row["step"] for row in rows]
        axes.plot(steps, [row["cross_entropy"] for row in rows], style, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", title="Quickstart")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
