"""Benchmarks from files: what is asked, and how answers are judged."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from qwen_jax.tasks import gsm8k, mmlu, prompt_tokens
from qwen_jax.tasks.backend import Score
from qwen_jax.tasks.code import humaneval, mbpp
from qwen_jax.tasks.sandbox import sandbox
from qwen_jax.tasks.task import Answer
from qwen_jax.text import tokenizer_training
from tests.qwen_jax.tasks import samples

LIMITS = sandbox.Limits(seconds=2.0)


@pytest.fixture(scope="module")
def words():
    return tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)


def text_of(task, item, words) -> str:
    [prompt] = task.prompts([item])
    return words.decode(prompt_tokens.encode(prompt, tokenizer=words, prefix_id=0))


# lm-evaluation-harness's regular expressions on what they were made for, and on what they were not.
@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("3 + 4 = 7\n#### 7", "7", "7"),
        ("so $2,400.\n#### 2,400.", "2,400.", "2,400."),
        ("#### -3\n\n#### 5", "-3", "5"),
        ("The answer is $18.", "[invalid]", "$18."),
        ("He pays 5", "[invalid]", "5"),
        ("####7", "[invalid]", "7"),
        ("#### $7", "[invalid]", "$7"),
        ("none at all", "[invalid]", "[invalid]"),
        ("12 or 13 or 4", "[invalid]", "4"),
        ("well...", "[invalid]", "..."),
        ("", "[invalid]", "[invalid]"),
    ],
)
def test_gsm8k_extracts_numbers(text, strict, flexible):
    assert gsm8k.extract_strict(text) == strict
    assert gsm8k.extract_flexible(text) == flexible


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 2400", 1.0, 1.0),
        ("#### $2,400", 0.0, 1.0),
        ("It is $2,400.", 0.0, 1.0),
        ("#### 2400 and 7", 1.0, 0.0),
        ("#### 240", 0.0, 0.0),
    ],
)
def test_gsm8k_compares_numbers_without_their_dress(tmp_path, text, strict, flexible):
    task = gsm8k.load(samples.gsm8k(tmp_path), num_shots=0)
    item = task.items[1]
    got = task.grade(item, Answer(texts=(text,)))
    assert got.metrics == {"strict": (strict,), "flexible": (flexible,)}


def test_gsm8k_judges_solutions_with_calculator_marks(tmp_path):
    """As in the published example solutions: `<<3+4=7>>`, and the answer after `A: `."""
    task = gsm8k.load(samples.gsm8k(tmp_path), num_shots=0)
    item = task.items[0]
    for solution, right in (
        ("Ann has 3+4=<<3+4=7>>7 pens.\nA: 7", 1.0),
        ("She has <<4-3=1>>1 left\nA: 1", 0.0),
    ):
        got = task.grade(item, Answer(texts=(solution,)))
        assert got.metrics == {"strict": (0.0,), "flexible": (right,)}
        assert got.reasons[0] == "strict: [invalid]" and got.reasons[2] == "is: 7"


def test_gsm8k_prompts(tmp_path, words):
    task = gsm8k.load(samples.gsm8k(tmp_path), num_shots=2, limit=1)
    [item] = task.items
    assert text_of(task, item, words) == (
        "Question: It falls from 2 to -3. What is it now?\nAnswer: So -3.\n#### -3\n\n"
        "Question: A car costs $1,200 and a van twice that?\nAnswer: 2*1200\n#### 2,400\n\n"
        "Question: Ann has 3 pens and buys 4. How many?\nAnswer:"
    )
    talk = gsm8k.load(samples.gsm8k(tmp_path), num_shots=1, limit=1, style="chat")
    text = text_of(talk, talk.items[0], words)
    assert text.count("<|im_start|>user\n") == 2 and text.endswith("<|im_start|>assistant\n")
    assert "<|im_start|>assistant\nSo -3.\n#### -3<|im_end|>" in text
    assert task.fingerprint != talk.fingerprint
    with pytest.raises(ValueError, match=r"num_shots=4 but train.jsonl has 3"):
        gsm8k.load(tmp_path, num_shots=4)
    (tmp_path / "test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl:1 lacks answer"):
        gsm8k.load(tmp_path, num_shots=0)
    with pytest.raises(ValueError, match="holds none of test.jsonl"):
        gsm8k.load(tmp_path / "nowhere")


def test_control_tokens_in_a_benchmark_stay_text(tmp_path, words):
    samples.gsm8k(tmp_path)
    samples.write_lines(tmp_path / "test.jsonl", [{"question": "<|im_end|>?", "answer": "#### 1"}])
    task = gsm8k.load(tmp_path, num_shots=0)
    [prompt] = task.prompts()
    tokens = prompt_tokens.encode(prompt, tokenizer=words, prefix_id=0)
    assert words.control_ids["<|im_end|>"] not in tokens


def test_mmlu_from_zip_and_folder(tmp_path, words):
    task = mmlu.load(samples.mmlu_zip(tmp_path / "mmlu.zip"), num_shots=1)
    folder = mmlu.load(samples.mmlu_folder(tmp_path / "folder"), num_shots=1)
    assert task.fingerprint == folder.fingerprint
    assert [item.id for item in task.items] == [
        "high_school_physics/0", "high_school_physics/1", "law/0"
    ]  # fmt: skip
    prompt = list(task.prompts())[0]
    pairs = prompt_tokens.scoring_requests(prompt, tokenizer=words, prefix_id=0)
    assert {words.decode(pair.context) for pair in pairs} == {
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        'What falls?\nA. up\nB. a stone\nC. light, mostly\nD. the "sky"\nAnswer: B\n\n'
        "Which of\nthese two?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    }
    assert [words.decode(pair.continuation) for pair in pairs] == [" A", " B", " C", " D"]
    talk = mmlu.load(tmp_path / "mmlu.zip", num_shots=1, style="chat")
    prompt = list(talk.prompts())[2]
    pairs = prompt_tokens.scoring_requests(prompt, tokenizer=words, prefix_id=0)
    assert [words.decode(pair.continuation) for pair in pairs] == ["A", "B", "C", "D"]
    text = words.decode(pairs[0].context)
    assert text.startswith("<|im_start|>system\nThe following are multiple choice questions")
    assert text.endswith("Answer:<|im_end|>\n<|im_start|>assistant\n")


def test_mmlu_judges_by_letter(tmp_path):
    task = mmlu.load(samples.mmlu_zip(tmp_path / "mmlu.zip"), num_shots=0)
    scores = tuple(Score(value, False) for value in (-3.0, -2.0, -1.0, -4.0))
    judged = [task.grade(item, Answer(scores=scores)) for item in task.items]
    assert [j.metrics["accuracy"] for j in judged] == [(1.0,), (0.0,), (0.0,)]
    with pytest.raises(ValueError, match="law_dev.csv has 2 questions, but num_shots=3"):
        mmlu.load(_without_physics(tmp_path), num_shots=3)
    (tmp_path / "folder" / "test" / "law_test.csv").write_text("What?,a,b,c,d,E\n")
    with pytest.raises(ValueError, match="law: .*must be a question, four choices"):
        mmlu.load(tmp_path / "folder", num_shots=0)


def _without_physics(folder: Path) -> Path:
    samples.mmlu_folder(folder / "folder")
    (folder / "folder" / "test" / "high_school_physics_test.csv").unlink()
    return folder / "folder"


def test_a_word_boundary_belongs_to_the_continuation(words):
    """lm-evaluation-harness's rule: the context's closing white space is scored, not given."""
    for context, continuation in (("a few", " words"), ("a few ", "words"), ("a few \n", "x")):
        got = prompt_tokens.scoring_request(context, continuation, tokenizer=words, prefix_id=9)
        assert words.decode(got.context) == "a few"
        assert words.decode(got.continuation) == (context + continuation)[len("a few") :]
    empty = prompt_tokens.scoring_request("", "words", tokenizer=words, prefix_id=9)
    assert (empty.context, words.decode(empty.continuation)) == ((9,), "words")
    with pytest.raises(ValueError, match="has no tokens of its own"):
        prompt_tokens.scoring_request("a", "", tokenizer=words, prefix_id=9)


def judged(task, index: int, *texts: str) -> dict[str, float]:
    verdict = task.grade(task.items[index], Answer(texts=texts))
    assert len(verdict.reasons) == len(texts)
    return {name: value for name, (value,) in verdict.metrics.items()}


def test_humaneval(tmp_path, words):
    path = samples.write_lines(tmp_path / "HumanEval.jsonl.gz", samples.HUMANEVAL)
    task = humaneval.load(path, limits=LIMITS, num_answers=4, ks=(1, 2))
    assert text_of(task, task.items[0], words) == samples.HUMANEVAL[0]["prompt"]
    right, wrong = "    return x + x\n", "    return 4\n"
    assert judged(task, 0, right, wrong, wrong, wrong) == {"pass@1": 0.25, "pass@2": 0.5}
    assert judged(task, 1, *["    return math.sqrt(x)"] * 4) == {"pass@1": 1.0, "pass@2": 1.0}
    assert judged(task, 1, *["    return ("] * 4) == {"pass@1": 0.0, "pass@2": 0.0}
    talk = humaneval.load(path, limits=LIMITS, style="chat")
    text = text_of(talk, talk.items[0], words)
    assert text.endswith("<|im_start|>assistant\n```python\n" + samples.HUMANEVAL[0]["prompt"])
    with pytest.raises(ValueError, match="pass@3 needs at least 3 answers"):
        humaneval.load(path, limits=LIMITS, num_answers=2, ks=(3,))


def test_mbpp(tmp_path, words):
    path = samples.write_lines(tmp_path / "mbpp.jsonl", samples.mbpp())
    task = mbpp.load(path, limits=LIMITS, num_shots=1)
    assert [item.id for item in task.items] == ["mbpp/11", "mbpp/12", "mbpp/13", "mbpp/14"]
    tests = ["\n".join(f"assert add({x}) == {x + n}" for x in range(3)) for n in (2, 11)]
    intro = "You are an expert Python programmer, and here is your task: Write a function that"
    assert text_of(task, task.items[0], words) == (
        f"{intro} adds 2. Your code should pass these tests:\n\n{tests[0]}\n[BEGIN]\n"
        "def add(x):\n    return x + 2\n[DONE]\n\n"
        f"{intro} adds 11. Your code should pass these tests:\n\n{tests[1]}\n[BEGIN]\n"
    )
    assert judged(task, 0, "def add(x):\n    return x + 11\n") == {"pass@1": 1.0}
    assert judged(task, 0, "def add(x):\n    return x + 12\n") == {"pass@1": 0.0}
    assert judged(task, 1, "add = lambda x: x + 12") == {"pass@1": 1.0}
    talk = mbpp.load(path, limits=LIMITS, style="chat", num_shots=3)
    text = text_of(talk, talk.items[0], words)
    assert text.count("```python\ndef add") == 3 and text.endswith("assistant\n```python\n")
    samples.write_lines(path, samples.mbpp()[4:])
    with pytest.raises(ValueError, match="has 6 of the tasks 1 to 10"):
        mbpp.load(path, limits=LIMITS, num_shots=7)


def test_items_are_told_apart(tmp_path):
    task = gsm8k.load(samples.gsm8k(tmp_path), num_shots=0)
    with pytest.raises(ValueError, match="two items share an id"):
        dataclasses.replace(task, items=(task.items[0], task.items[0]))
    with pytest.raises(ValueError, match="no items"):
        gsm8k.load(tmp_path, num_shots=0, limit=0)


@pytest.fixture(scope="module")
def published() -> Path:
    """A folder with benchmarks/ (HumanEval.jsonl.gz, mbpp.jsonl) and gsm8k/ as published."""
    folder = os.environ.get("QWEN_JAX_EVAL_DATA")
    if folder is None:
        pytest.skip("QWEN_JAX_EVAL_DATA names no folder with the published benchmarks")
    return Path(folder)


@pytest.mark.slow
def test_published_solutions_pass(published):
    limits = sandbox.Limits(seconds=20.0)  # a few of MBPP's solutions take seconds
    folder = published / "benchmarks"
    functions = humaneval.load(folder, limits=limits)
    programs = mbpp.load(folder, limits=limits)
    for task, key, count in ((functions, "canonical_solution", 164), (programs, "code", 500)):
        assert len(task.items) == count
        failed = [
            i for i, x in enumerate(task.items) if not judged(task, i, x.record[key])["pass@1"]
        ]
        assert not failed, [task.items[i].id for i in failed]


@pytest.mark.slow
def test_published_example_solutions_are_judged_as_labelled(published):
    """The labels compare `A: ` answers; flexible extraction finds nearly all of them."""
    lines = (published / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines()
    task = gsm8k.load(published / "gsm8k", num_shots=0)
    items = {item.question: item for item in task.items}
    agree = total = 0
    for line in map(json.loads, lines):
        item = items[f"Question: {line['question']}\nAnswer:"]
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution = line[name]
            got = task.grade(item, Answer(texts=(solution["solution"],)))
            agree += got.metrics["flexible"] == (float(solution["is_correct"]),)
            total += 1
    assert total == 4 * 1319 and agree / total > 0.98, (agree, total)
