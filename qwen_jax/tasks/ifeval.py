"""IFEval (arXiv 2311.07911): instructions whose following can be checked by a program."""

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_jax.tasks import benchmark_files
from qwen_jax.tasks.ifeval_checks import CHECKS
from qwen_jax.tasks.task import Answer, Item, Style, Task, Verdict


def load(
    path: str | Path,
    *,
    style: Style = "chat",
    limit: int | None = None,
    max_tokens: int = 1280,
) -> Task:
    """The prompts of ifeval.jsonl, or of a folder that holds it.

    Raises `ValueError` for an instruction that has no check, or lacks what its check needs.
    """
    if importlib.util.find_spec("langdetect") is None:
        raise ValueError("IFEval needs langdetect; install qwen-jax[eval]")
    found = benchmark_files.find(path, names=["ifeval.jsonl", "input_data.jsonl"])
    keys = ("key", "prompt", "instruction_id_list", "kwargs")
    items = []
    for record in benchmark_files.read_lines(found, needed=keys)[:limit]:
        for name, options in _instructions(record):
            _check_options(name, options, where=f"{found}: key {record['key']}")
        items.append(Item(id=f"ifeval/{record['key']}", question=record["prompt"], record=record))
    return Task(name="ifeval", items=tuple(items), judge=judge, style=style, max_tokens=max_tokens)


def judge(item: Item, answer: Answer) -> Verdict:
    """Strict and loose following: of all of a prompt's instructions, and of each."""
    (text,) = answer.texts
    strict = follow(item.record, [text])
    loose = follow(item.record, loosened(text))
    metrics = {
        "prompt_strict": (float(all(strict)),),
        "instruction_strict": tuple(map(float, strict)),
        "prompt_loose": (float(all(loose)),),
        "instruction_loose": tuple(map(float, loose)),
    }
    names = item.record["instruction_id_list"]
    broken = [
        f"not followed: {name}" for name, holds in zip(names, strict, strict=True) if not holds
    ]
    return Verdict(metrics, tuple(broken))


def follow(record: Mapping, texts: list[str]) -> list[bool]:
    """For each instruction, whether one of `texts` follows it. An empty text follows none."""
    return [
        any(bool(text.strip()) and CHECKS[name](text, **options) for text in texts)
        for name, options in _instructions(record)
    ]


def loosened(text: str) -> list[str]:
    """The text as it is, and without first line, last line, asterisks, in all combinations."""
    lines = text.split("\n")
    whole = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*whole, *(part.replace("*", "") for part in whole)]


def _instructions(record: Mapping) -> Iterator[tuple[str, dict]]:
    pairs = zip(record["instruction_id_list"], record["kwargs"], strict=True)
    for name, options in pairs:
        # Some copies of the data fill every instruction's options up with nulls.
        yield name, {key: value for key, value in options.items() if value is not None}


def _check_options(name: str, options: dict, *, where: str) -> None:
    if name not in CHECKS:
        raise ValueError(f"{where}: unknown instruction {name!r}; known: {', '.join(CHECKS)}")
    needed = set(inspect.signature(CHECKS[name]).parameters) - {"text"}
    if needed != set(options):
        raise ValueError(f"{where}: {name} needs {sorted(needed)}, not {sorted(options)}")
