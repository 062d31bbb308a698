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
_NOTHING = "[invalid]"  # equals no answer
_STOP = ("Question:", "</s>", "<|im_end|>")


def load(
    path: str | Path,
    *,
    style: Style = "plain",
    num_shots: int = 5,
    limit: int | None = None,
    max_tokens: int = 512,
) -> Task:
    """The test problems of a folder with test.jsonl and train.jsonl, or of a file.

    The shots are the first problems of train.jsonl. Raises `ValueError` for files of another kind.
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
        shots = tuple((_question(r, style), f"{r['answer']}") for r in train[:num_shots])
    items = tuple(
        Item(id=f"gsm8k/{i}", question=_question(r, style), shots=shots, record=r)
        for i, r in enumerate(records)
    )
    return Task(
        name="gsm8k", items=items, judge=judge, style=style, gap=" ", stop=_STOP,
        max_tokens=max_tokens,
    )  # fmt: skip


def _question(record: dict[str, str], style: Style) -> str:
    del style  # the same words in a conversation, so that both are comparable
    return f"Question: {record['question']}\nAnswer:"


def judge(item: Item, answer: Answer) -> Verdict:
    """Exact match of the number that strict and flexible extraction find."""
    gold = normalise(item.record["answer"])
    (text,) = answer.texts
    found = {"strict": extract_strict(text), "flexible": extract_flexible(text)}
    metrics = {name: (float(normalise(value) == gold),) for name, value in found.items()}
    return Verdict(metrics, (*(f"{name}: {value}" for name, value in found.items()), f"is: {gold}"))


def extract_strict(text: str) -> str:
    """The first number that follows `#### `."""
    match = _STRICT.search(text)
    return match[1].strip() if match else _NOTHING


def extract_flexible(text: str) -> str:
    """The last number of the text, signs of currency and separators included."""
    matches = list(_FLEXIBLE.finditer(text))
    return matches[-1][0].strip() if matches else _NOTHING


def normalise(answer: str) -> str:
    """Without separators, dollar signs, all that ends in `#### `, and a closing full stop."""
    return functools.reduce(lambda text, p: p.sub("", text), _IGNORED, answer).lower()
