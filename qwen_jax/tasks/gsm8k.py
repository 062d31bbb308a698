r"""GSM8K (arXiv 2110.14168): grade-school problems, the number after `####` is the answer.

Prompts, both extractions and the comparison are lm-evaluation-harness's `gsm8k`, version 3.
"""

import functools
import re
from pathlib import Path

from qwen_jax.tasks import benchmark_files
from qwen_jax.tasks.task import Answer, Item, Style, Task, Verdict

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = [re.compile(p) for p in (r",", r"\$", r"(?s).*#### ", r"\.$")]
_NOT_FOUND = "[invalid]"  # equals no reference
_STOP = ("Question:", "</s>", "<|im_end|>")


class Gsm8k(Task):
    """GSM8K's test problems. A reward accepts the last number of an answer in any format."""

    reward_metric = "flexible"

    def grade(self, item: Item, answer: Answer) -> Verdict:
        """Exact match of the number found by strict and by flexible extraction."""
        reference = normalise(item.record["answer"])
        (text,) = answer.texts
        found = {"strict": extract_strict(text), "flexible": extract_flexible(text)}
        return Verdict(
            {name: (float(normalise(value) == reference),) for name, value in found.items()},
            (*(f"{name}: {value}" for name, value in found.items()), f"is: {reference}"),
        )


def load(
    path: str | Path,
    *,
    style: Style = "plain",
    num_shots: int = 5,
    limit: int | None = None,
    max_tokens: int = 512,
) -> Gsm8k:
    """The test problems of a folder with test.jsonl and train.jsonl, or of a file.

    The shots are the first problems of train.jsonl. The question reads the same in both styles, so
    that their results compare. Raises `ValueError` where a file is missing or is not GSM8K's.
    """
    path = Path(path)
    keys = ("question", "answer")
    records = benchmark_files.read_lines(
        benchmark_files.find(path, names=["test.jsonl"]), needed=keys
    )[:limit]
    shots = ()
    if num_shots:
        folder = path if path.is_dir() else path.parent
        train = benchmark_files.read_lines(folder / "train.jsonl", needed=keys)
        if len(train) < num_shots:
            raise ValueError(f"num_shots={num_shots} but train.jsonl has {len(train)} problems")
        shots = tuple((_question(r), f"{r['answer']}") for r in train[:num_shots])
    items = tuple(
        Item(
            id=f"gsm8k/{i}",
            question=_question(r),
            shots=shots,
            record=r,
            texts=(r["question"], r["answer"]),
        )
        for i, r in enumerate(records)
    )
    return Gsm8k(
        name="gsm8k", items=items, style=style, separator=" ", stop=_STOP, max_tokens=max_tokens
    )


def _question(record: dict[str, str]) -> str:
    return f"Question: {record['question']}\nAnswer:"


def extract_strict(text: str) -> str:
    """The first number that follows `#### `, or `[invalid]`."""
    match = _STRICT.search(text)
    return match[1].strip() if match else _NOT_FOUND


def extract_flexible(text: str) -> str:
    """The last number of the text with its currency signs and separators, or `[invalid]`."""
    matches = list(_FLEXIBLE.finditer(text))
    return matches[-1][0].strip() if matches else _NOT_FOUND


def normalise(answer: str) -> str:
    """The answer without separators, dollar signs, text up to `#### `, and a final full stop."""
    return functools.reduce(lambda text, p: p.sub("", text), _IGNORED, answer).lower()
