"""HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732): programs that must pass tests.

In plain text both are asked as published. In a conversation the task is a message, and the answer
begins inside a code block.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.tasks import aggregate, benchmark_files, sandbox
from qwen_jax.tasks.task import Answer, Item, Style, Task, Verdict

# A function's body has ended where a line begins with any of these.
_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCE = "```"
_MBPP_TEST = range(11, 511)  # task ids; 1 to 10 are for prompts
_MBPP_SHOTS = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10)  # the paper's three first


def load_humaneval(
    path: str | Path,
    *,
    limits: sandbox.Limits,
    style: Style = "plain",
    limit: int | None = None,
    num_answers: int = 1,
    ks: Sequence[int] = (1,),
    max_tokens: int = 1024,
) -> Task:
    """The problems of HumanEval.jsonl.gz, or of a folder that holds it."""
    found = benchmark_files.find(path, names=["HumanEval.jsonl.gz", "HumanEval.jsonl"])
    keys = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    items = []
    for record in benchmark_files.read_lines(found, needed=keys)[:limit]:
        code = record["prompt"]
        if style == "plain":
            question, lead = code, ""
        else:
            block = f"{_FENCE}python\n{code.rstrip()}\n{_FENCE}"
            question = f"Complete this Python function so that it does what it says.\n{block}"
            lead = f"{_FENCE}python\n{code}"
        items.append(Item(id=record["task_id"], question=question, lead=lead, record=record))
    return Task(
        name="humaneval",
        items=tuple(items),
        judge=_judge(humaneval_program, limits, num_answers=num_answers, ks=ks),
        style=style,
        stop=_HUMANEVAL_STOP if style == "plain" else (_FENCE,),
        max_tokens=max_tokens,
        num_answers=num_answers,
        facts={"sandbox": sandbox.describe(limits)},
    )


def load_mbpp(
    path: str | Path,
    *,
    limits: sandbox.Limits,
    style: Style = "plain",
    num_shots: int = 3,
    limit: int | None = None,
    num_answers: int = 1,
    ks: Sequence[int] = (1,),
    max_tokens: int = 512,
) -> Task:
    """Problems 11 to 510 of mbpp.jsonl, with shots of 1 to 10 (2, 3 and 4 first)."""
    found = benchmark_files.find(path, names=["mbpp.jsonl"])
    keys = ("task_id", "text", "code", "test_list", "test_setup_code")
    records = {r["task_id"]: r for r in benchmark_files.read_lines(found, needed=keys)}
    examples = [records[i] for i in _MBPP_SHOTS if i in records][:num_shots]
    if len(examples) < num_shots:
        raise ValueError(
            f"num_shots={num_shots} but {found} has {len(examples)} of the tasks 1 to 10; ask for "
            f"fewer"
        )
    shots = tuple((_mbpp_question(r, style), _mbpp_answer(r, style)) for r in examples)
    lead = f"{_FENCE}python\n" if style == "chat" else ""
    items = tuple(
        Item(id=f"mbpp/{i}", question=_mbpp_question(r, style), lead=lead, shots=shots, record=r)
        for i, r in sorted(records.items())
        if i in _MBPP_TEST
    )
    return Task(
        name="mbpp",
        items=items[:limit],
        judge=_judge(mbpp_program, limits, num_answers=num_answers, ks=ks),
        style=style,
        stop=("[DONE]",) if style == "plain" else (_FENCE,),
        max_tokens=max_tokens,
        num_answers=num_answers,
        facts={"sandbox": sandbox.describe(limits)},
    )


def _mbpp_question(record: dict, style: Style) -> str:
    tests = "\n".join(record["test_list"])
    text = (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n"
    )
    return f"{text}[BEGIN]\n" if style == "plain" else text


def _mbpp_answer(record: dict, style: Style) -> str:
    code = record["code"].replace("\r\n", "\n")
    return f"{code}\n[DONE]" if style == "plain" else f"{_FENCE}python\n{code}\n{_FENCE}"


def humaneval_program(record: dict, answer: str) -> str:
    """The function as completed, its tests, and the call that runs them."""
    return f"{record['prompt']}{answer}\n{record['test']}\ncheck({record['entry_point']})\n"


def mbpp_program(record: dict, answer: str) -> str:
    """The answer, what the tests prepare with it, and the tests."""
    return "\n".join([answer, record["test_setup_code"], *record["test_list"], ""])


def _judge(program, limits: sandbox.Limits, *, num_answers: int, ks: Sequence[int]):
    for k in ks:
        aggregate.pass_at_k(num_answers, 0, k=k)  # refuses a k that cannot be
    return functools.partial(_run, program=program, limits=limits, ks=tuple(ks))


def _run(
    item: Item, answer: Answer, *, program, limits: sandbox.Limits, ks: tuple[int, ...]
) -> Verdict:
    outcomes = [sandbox.run(program(item.record, text), limits=limits) for text in answer.texts]
    passed = sum(outcome.status == "passed" for outcome in outcomes)
    metrics = {f"pass@{k}": (aggregate.pass_at_k(len(outcomes), passed, k=k),) for k in ks}
    return Verdict(metrics, tuple(f"{o.status} {o.detail}".strip() for o in outcomes))
