"""MMLU (arXiv 2009.03300): four choices, of which the likeliest letter is the answer.

Prompts are those of the paper and of lm-evaluation-harness's `mmlu`: the shots are the first `dev`
questions of the subject.
"""

from pathlib import Path

from qwen_jax.tasks import benchmark_files, estimates
from qwen_jax.tasks.task import Answer, Item, Style, Task, Verdict

_LETTERS = ("A", "B", "C", "D")


class Mmlu(Task):
    """MMLU's test questions, grouped by subject."""

    reward_metric = "accuracy"

    def grade(self, item: Item, answer: Answer) -> Verdict:
        """Accuracy: 1 where the right letter is the likeliest."""
        logprobs = [score.logprob for score in answer.scores]
        gold = item.record["gold"]
        accuracy = estimates.accuracy(logprobs, gold=gold)
        return Verdict({"accuracy": (accuracy,)}, (f"is: {item.choices[gold]}",))


def load(
    path: str | Path,
    *,
    style: Style = "plain",
    num_shots: int = 5,
    limit: int | None = None,
) -> Mmlu:
    """The test questions of mmlu.zip, or of a folder with dev/*.csv and test/*.csv.

    `limit` is the number of questions of each subject. Raises `ValueError` for a row that is not a
    question, four choices and a letter, and where a subject has fewer dev questions than shots.
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
        items += [
            _item(row, subject=subject, number=i, shots=shots) for i, row in enumerate(rows[:limit])
        ]
    return Mmlu(name="mmlu", items=tuple(items), style=style, separator=" ")


def _item(row: list[str], *, subject: str, number: int, shots: tuple[tuple[str, str], ...]) -> Item:
    question = _question(row, subject)
    gold = _LETTERS.index(row[5])
    topic = subject.replace("_", " ")
    return Item(
        id=f"{subject}/{number}",
        question=question,
        shots=shots,
        header=f"The following are multiple choice questions (with answers) about {topic}.\n\n",
        choices=_LETTERS,
        group=subject,
        record={"gold": gold},
        texts=(row[0].strip(), row[1 + gold]),
    )


def _question(row: list[str], subject: str) -> str:
    if len(row) != 6 or row[5] not in _LETTERS:
        raise ValueError(
            f"{subject}: {row} must be a question, four choices and the right one's letter"
        )
    choices = [f"{letter}. {text}" for letter, text in zip(_LETTERS, row[1:5], strict=True)]
    return "\n".join([row[0].strip(), *choices, "Answer:"])
