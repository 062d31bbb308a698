"""Every registered task: its prompts, grades, rewards and texts, on small stand-in files."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_jax.tasks import registry
from qwen_jax.tasks.backend import Score
from qwen_jax.tasks.sandbox.sandbox import Limits
from qwen_jax.tasks.task import Answer, Task
from tests.qwen_jax.tasks import samples

LIMITS = Limits(seconds=5.0)


def scores(best: int) -> Answer:
    return Answer(scores=tuple(Score(-1.0 - (i != best), i == best) for i in range(4)))


def texts(*answers: str) -> Answer:
    return Answer(texts=answers)


@dataclass(frozen=True)
class Sample:
    """A right and a wrong answer to a task's first item, and the texts of that item."""

    file: str
    right: Answer
    wrong: Answer
    texts: tuple[str, ...]


SAMPLES = {
    "gsm8k": Sample(
        file="",
        right=texts("3 + 4 = 7\n#### 7"),
        wrong=texts("3 * 4 = 12\n#### 12"),
        texts=("Ann has 3 pens and buys 4. How many?", "3+4=<<3+4=7>>7\n#### 7"),
    ),
    "mmlu": Sample(
        file="mmlu.zip", right=scores(2), wrong=scores(0), texts=("Which of\nthese two?", "three")
    ),
    "humaneval": Sample(
        file="HumanEval.jsonl",
        right=texts("    return x + x\n"),
        wrong=texts("    return x\n"),
        texts=(samples.HUMANEVAL[0]["prompt"], samples.HUMANEVAL[0]["canonical_solution"]),
    ),
    "mbpp": Sample(
        file="mbpp.jsonl",
        right=texts("def add(x):\n    return x + 11\n"),
        wrong=texts("def add(x):\n    return x\n"),
        texts=(
            "Write a function that adds 11.",
            "assert add(0) == 11\nassert add(1) == 12\nassert add(2) == 13",
            "def add(x):\r\n    return x + 11",
        ),
    ),
    "ifeval": Sample(
        file="ifeval.jsonl",
        right=texts("a tree and a tree"),
        wrong=texts("one tree, no other"),
        texts=("Write without commas. Twice the word tree.",),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks")
    samples.gsm8k(path)
    samples.mmlu_zip(path / "mmlu.zip")
    samples.write_lines(path / "HumanEval.jsonl", samples.HUMANEVAL)
    samples.write_lines(path / "mbpp.jsonl", samples.mbpp())
    samples.write_lines(path / "ifeval.jsonl", samples.IFEVAL)
    return path


def load(name: str, folder: Path, **options) -> Task:
    if name == "ifeval":
        pytest.importorskip("langdetect")
    elif name != "humaneval":
        options.setdefault("num_shots", 1)
    path = folder / SAMPLES[name].file
    return registry.load(f"{name}={path}", options=registry.Options(**options))


def test_every_task_has_a_sample():
    assert set(SAMPLES) == set(registry.NAMES)


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_task_has_prompts_in_both_styles(name, folder):
    plain, chat = (load(name, folder, style=style) for style in ("plain", "chat"))
    assert plain.name == chat.name == name
    assert len(list(plain.prompts())) == len(list(chat.prompts())) == len(plain.items)
    for item, prompt in zip(plain.items, plain.prompts(), strict=True):
        assert prompt.text.endswith(item.question) and not prompt.messages
        assert len(prompt.continuations) == len(item.choices)
    for item, prompt in zip(chat.items, chat.prompts(), strict=True):
        assert prompt.messages[-1] == {"role": "user", "content": item.question}
        roles = [m["role"] for m in prompt.messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * len(item.shots) + ["user"] and not prompt.text
    assert list(plain.prompts(plain.items[:1])) == list(plain.prompts())[:1]


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_task_grades_and_rewards_answers(name, folder):
    task, sample = load(name, folder, limits=LIMITS), SAMPLES[name]
    first = task.items[0]
    for answer, reward in ((sample.right, 1.0), (sample.wrong, 0.0)):
        assert task.reward(first, answer) == reward
        metrics = task.grade(first, answer).metrics
        assert metrics and all(0 <= v <= 1 for values in metrics.values() for v in values)
        assert {v for values in metrics.values() for v in values} <= {0.0, 1.0}
        assert any(values == (reward,) * len(values) for values in metrics.values())
    assert [text for id, text in task.texts() if id == first.id] == [*sample.texts]
    assert {id for id, _ in task.texts()} == {item.id for item in task.items}


def test_a_reward_between_right_and_wrong_is_a_share(folder):
    instructions = load("ifeval", folder)
    assert instructions.reward(instructions.items[0], texts("a tree")) == 0.5
    programs = load("humaneval", folder, limits=LIMITS, num_answers=4)
    right, wrong = "    return 2 * x\n", "    return 4\n"
    assert programs.reward(programs.items[0], texts(right, wrong, wrong, wrong)) == 0.25


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_program_is_graded_in_the_sandbox(name, folder):
    """A right program that also opens a socket passes without the sandbox's filter alone."""
    reach = "import socket; socket.socket().close()\n"
    right = SAMPLES[name].right.texts[0]
    answer = texts(f"    {reach}{right}" if name == "humaneval" else f"{reach}{right}")
    jailed = load(name, folder, limits=LIMITS)
    item = jailed.items[0]
    assert jailed.reward(item, answer) == 0.0
    [reason] = jailed.grade(item, answer).reasons
    assert reason.startswith("failed PermissionError")
    assert jailed.environment["sandbox"]["network"] == "no"
    free = load(name, folder, limits=Limits(seconds=5.0, isolation="limits"))
    assert free.reward(item, answer) == 1.0
