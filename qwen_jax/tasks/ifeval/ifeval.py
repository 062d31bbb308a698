"""IFEval (arXiv 2311.07911): prompts with instructions whose following a program can check."""

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_jax.tasks import benchmark_files
from qwen_jax.tasks.ifeval.instruction_checks import CHECKS
from qwen_jax.tasks.task import Answer, Item, Style, Task, Verdict


class IFEval(Task):
    """IFEval's prompts. The reward is the share of a prompt's instructions that are followed."""

    reward_metric = "instruction_strict"

    def grade(self, item: Item, answer: Answer) -> Verdict:
        """Strict and loose accuracy: of the whole prompt, and of each instruction."""
        (text,) = answer.texts
        strict = follows(item.record, [text])
        loose = follows(item.record, loose_variants(text))
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


def load(
    path: str | Path,
    *,
    style: Style = "chat",
    limit: int | None = None,
    max_tokens: int = 1280,
) -> IFEval:
    """The prompts of ifeval.jsonl, or of a folder that holds it.

    Raises `ValueError` for an instruction without a check, and for one whose options are not those
    that its check needs.
    """
    if importlib.util.find_spec("langdetect") is None:
        raise ValueError("IFEval needs langdetect; install qwen-jax[eval]")
    found = benchmark_files.find(path, names=["ifeval.jsonl", "input_data.jsonl"])
    keys = ("key", "prompt", "instruction_id_list", "kwargs")
    items = []
    for record in benchmark_files.read_lines(found, needed=keys)[:limit]:
        for name, options in _instructions(record):
            _check_options(name, options, source=f"{found}: key {record['key']}")
        items.append(
            Item(
                id=f"ifeval/{record['key']}",
                question=record["prompt"],
                record=record,
                texts=(record["prompt"],),
            )
        )
    return IFEval(name="ifeval", items=tuple(items), style=style, max_tokens=max_tokens)


def follows(record: Mapping, texts: list[str]) -> list[bool]:
    """For each instruction, whether any of `texts` follows it. An empty text follows none."""
    return [
        any(bool(text.strip()) and CHECKS[name](text, **options) for text in texts)
        for name, options in _instructions(record)
    ]


def loose_variants(text: str) -> list[str]:
    """The text, and its variants without first line, last line and asterisks: 8 in all."""
    lines = text.split("\n")
    whole = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*whole, *(part.replace("*", "") for part in whole)]


def _instructions(record: Mapping) -> Iterator[tuple[str, dict]]:
    """(name, options) of each instruction of a published prompt."""
    pairs = zip(record["instruction_id_list"], record["kwargs"], strict=True)
    for name, options in pairs:
        # Some copies of the data fill every instruction's options up with nulls.
        yield name, {key: value for key, value in options.items() if value is not None}


def _check_options(name: str, options: dict, *, source: str) -> None:
    if name not in CHECKS:
        raise ValueError(f"{source}: unknown instruction {name!r}; known: {', '.join(CHECKS)}")
    needed = set(inspect.signature(CHECKS[name]).parameters) - {"text"}
    if needed != set(options):
        raise ValueError(f"{source}: {name} needs {sorted(needed)}, not {sorted(options)}")
