"""MBPP (arXiv 2108.07732): a Python function, from one sentence and three tests.

Plain prompts are the published ones. In a conversation the problem is a message, and the answer
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

_TEST_IDS = range(11, 511)  # problems 1 to 10 are for prompts
_SHOT_IDS = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10)  # the paper's three first


class Mbpp(program_task.ProgramTask):
    """MBPP's test problems."""

    def program(self, record: Mapping[str, Any], answer: str) -> str:
        """The answer, the statements that prepare the tests with it, and the tests."""
        return "\n".join([answer, record["test_setup_code"], *record["test_list"], ""])


def load(
    path: str | Path,
    *,
    limits: sandbox.Limits,
    style: Style = "plain",
    num_shots: int = 3,
    limit: int | None = None,
    num_answers: int = 1,
    ks: Sequence[int] | None = None,
    max_tokens: int = 512,
) -> Mbpp:
    """Problems 11 to 510 of mbpp.jsonl, with shots from problems 1 to 10 (2, 3 and 4 first).

    Raises `ValueError` where the file is missing, is not MBPP's, or has fewer problems for shots.
    """
    found = benchmark_files.find(path, names=["mbpp.jsonl"])
    keys = ("task_id", "text", "code", "test_list", "test_setup_code")
    records = {r["task_id"]: r for r in benchmark_files.read_lines(found, needed=keys)}
    examples = [records[i] for i in _SHOT_IDS if i in records][:num_shots]
    if len(examples) < num_shots:
        raise ValueError(
            f"num_shots={num_shots} but {found} has {len(examples)} of the tasks 1 to 10; ask for "
            f"fewer"
        )
    shots = tuple((_question(r, style), _answer(r, style)) for r in examples)
    items = tuple(
        Item(
            id=f"mbpp/{i}",
            question=_question(r, style),
            answer_prefix=f"{FENCE}python\n" if style == "chat" else "",
            shots=shots,
            record=r,
            texts=(r["text"], "\n".join(r["test_list"]), r["code"]),
        )
        for i, r in sorted(records.items())
        if i in _TEST_IDS
    )
    return Mbpp(
        name="mbpp",
        items=items[:limit],
        style=style,
        stop=("[DONE]",) if style == "plain" else (FENCE,),
        max_tokens=max_tokens,
        num_answers=num_answers,
        environment={"sandbox": sandbox.describe(limits)},
        limits=limits,
        ks=program_task.default_ks(num_answers, ks),
    )


def _question(record: Mapping[str, Any], style: Style) -> str:
    tests = "\n".join(record["test_list"])
    text = (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n"
    )
    return f"{text}[BEGIN]\n" if style == "plain" else text


def _answer(record: Mapping[str, Any], style: Style) -> str:
    program = record["code"].replace("\r\n", "\n")
    return f"{program}\n[DONE]" if style == "plain" else f"{FENCE}python\n{program}\n{FENCE}"
