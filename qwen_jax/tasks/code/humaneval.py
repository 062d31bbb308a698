"""HumanEval (arXiv 2107.03374): the body of a Python function, from its signature and docstring.

Plain prompts are the published ones. In a conversation the function is a message, and the answer
begins inside a code block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.tasks import benchmark_files
from qwen_jax.tasks.code import program_task
from qwen_jax.tasks.code.program_task import FENCE
from qwen_jax.tasks.sandbox import sandbox
from qwen_jax.tasks.task import Item, Style

# The function's body has ended where a line begins with any of these.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class HumanEval(program_task.ProgramTask):
    """HumanEval's problems."""

    def program(self, record: Mapping[str, Any], answer: str) -> str:
        """The completed function, its tests, and the call that runs them."""
        return f"{record['prompt']}{answer}\n{record['test']}\ncheck({record['entry_point']})\n"


def load(
    path: str | Path,
    *,
    limits: sandbox.Limits,
    style: Style = "plain",
    limit: int | None = None,
    num_answers: int = 1,
    ks: Sequence[int] | None = None,
    max_tokens: int = 1024,
) -> HumanEval:
    """The problems of HumanEval.jsonl.gz, or of a folder that holds it.

    Raises `ValueError` where the file is missing or is not HumanEval's.
    """
    found = benchmark_files.find(path, names=["HumanEval.jsonl.gz", "HumanEval.jsonl"])
    keys = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    items = []
    for record in benchmark_files.read_lines(found, needed=keys)[:limit]:
        function = record["prompt"]
        if style == "plain":
            question, answer_prefix = function, ""
        else:
            block = f"{FENCE}python\n{function.rstrip()}\n{FENCE}"
            question = f"Complete this Python function so that it does what it says.\n{block}"
            answer_prefix = f"{FENCE}python\n{function}"
        items.append(
            Item(
                id=record["task_id"],
                question=question,
                answer_prefix=answer_prefix,
                record=record,
                texts=(function, record["canonical_solution"]),
            )
        )
    return HumanEval(
        name="humaneval",
        items=tuple(items),
        style=style,
        stop=_STOP if style == "plain" else (FENCE,),
        max_tokens=max_tokens,
        num_answers=num_answers,
        environment={"sandbox": sandbox.describe(limits)},
        limits=limits,
        ks=program_task.default_ks(num_answers, ks),
    )
