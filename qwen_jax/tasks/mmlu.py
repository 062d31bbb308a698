"""MMLU (arXiv 2009.03300): four choices, of which the likeliest letter is the answer.

Prompts as the paper's and lm-evaluation-harness's `mmlu`: the first `dev` questions of the subject
are the shots.
"""

from pathlib import Path

from qwen_jax.tasks import aggregate, benchmark_files
from qwen_jax.tasks.task import Answer, Item, Style, Task, Verdict

_LETTERS = ("A", "B", "C", "D")


def load(
    path: str | Path,
    *,
    style: Style = "plain",
    num_shots: int = 5,
    limit: int | None = None,
) -> Task:
    """The test questions of mmlu.zip, or of a folder with dev/*.csv and test/*.csv.

    `limit` is of each subject. Raises `ValueError` for rows that are not a question, four choices
    and a letter, and where a subject has fewer dev questions than shots.
    """
    dev = benchmark_files.read_tables(path, folder="dev") if num_shots else {}
    items = []
    for table, rows in benchmark_files.read_tables(path, folder="test").items():
        subject = table.removesuffix("_test")
        examples = dev.get(f"{subject}_dev", [])[:num_shots]
        if len(examples) < num_shots:
            raise ValueError(
                f"{path}: dev/{subject}_dev.csv has {len(examples)} questions, but "
                f"num_shots={num_shots}; ask for fewer"
            )
        shots = tuple((_question(row, subject), row[5]) for row in examples)
        header = _header(subject)
        items += [
            Item(
                id=f"{subject}/{i}",
                question=_question(row, subject),
                shots=shots,
                header=header,
                choices=_LETTERS,
                group=subject,
                record={"gold": _LETTERS.index(row[5])},
            )
            for i, row in enumerate(rows[:limit])
        ]
    return Task(name="mmlu", items=tuple(items), judge=judge, style=style, gap=" ")


def _header(subject: str) -> str:
    words = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


def _question(row: list[str], subject: str) -> str:
    if len(row) != 6 or row[5] not in _LETTERS:
        raise ValueError(
            f"{subject}: {row} must be a question, four choices and the right one's letter"
        )
    choices = [f"{letter}. {text}" for letter, text in zip(_LETTERS, row[1:5], strict=True)]
    return "\n".join([row[0].strip(), *choices, "Answer:"])


def judge(item: Item, answer: Answer) -> Verdict:
    """Whether the right letter is the likeliest."""
    logprobs = [score.logprob for score in answer.scores]
    gold = item.record["gold"]
    return Verdict(
        {"accuracy": (aggregate.accuracy(logprobs, gold=gold),)}, (f"is: {item.choices[gold]}",)
    )
