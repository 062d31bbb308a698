"""Runs over a small model: what they find, keep, and do again after an interruption."""

import dataclasses
import json

import pytest

from configs.sampling import SamplingParams
from infer.eval import run
from qwen_jax.tasks import gsm8k, mmlu, prompt_tokens
from qwen_jax.tasks.backend import GenerationRequest
from qwen_jax.tasks.code import humaneval
from qwen_jax.tasks.sandbox import sandbox
from tests.infer.eval import standin
from tests.qwen_jax.tasks import samples

GREEDY = SamplingParams(temperature=0.0)
SUBJECT = {"model": "tiny", "dtype": "float32"}


def evaluate(backend, task, folder, *, sampling=GREEDY, subject=SUBJECT):
    return run.run(backend, task, folder, sampling=sampling, subject=subject, show_progress=False)


def records(folder, name: str) -> list[dict]:
    return [
        json.loads(line) for line in (folder / f"{name}.samples.jsonl").read_text().splitlines()
    ]


def test_choices_are_compared(loaded, tmp_path):
    backend = standin.backend(loaded, num_open=2)
    task = mmlu.load(samples.mmlu_zip(tmp_path / "mmlu.zip"), num_shots=0)
    result = evaluate(backend, task, tmp_path)
    head, *kept = records(tmp_path, "mmlu")
    assert head["subject"] == SUBJECT and head["asked"] == task.fingerprint
    assert sorted(r["id"] for r in kept) == sorted(item.id for item in task.items)
    right = 0
    for record in kept:
        [item] = [item for item in task.items if item.id == record["id"]]
        [prompt] = task.prompts([item])
        pairs = prompt_tokens.scoring_requests(
            prompt, tokenizer=loaded.tokenizer, prefix_id=backend.prefix_id
        )
        alone = [score.logprob for _, score in sorted(backend.loglikelihood(pairs))]
        assert [a[0] for a in record["answers"]] == pytest.approx(alone, abs=1e-5)
        want = float(alone.index(max(alone)) == item.record["gold"])
        assert record["metrics"] == {"accuracy": [want]} and record["group"] == item.group
        right += want
    assert result.metrics["accuracy"].value == right / 3 and result.count == 3
    assert {name: g["accuracy"].count for name, g in result.groups.items()} == {
        "high_school_physics": 2,
        "law": 1,
    }
    summary = json.loads((tmp_path / "mmlu.json").read_text())
    assert summary["metrics"]["accuracy"]["value"] == right / 3
    assert summary["subject"] == SUBJECT


def test_answers_are_written_and_judged(loaded, tmp_path):
    backend = standin.backend(loaded)
    task = gsm8k.load(samples.gsm8k(tmp_path), num_shots=0, max_tokens=16)
    result = evaluate(backend, task, tmp_path)
    _, *kept = records(tmp_path, "gsm8k")
    drawn = dataclasses.replace(GREEDY, max_tokens=16)
    want = dict(
        backend.generate(
            GenerationRequest(
                prompt_tokens.encode(prompt, tokenizer=loaded.tokenizer, prefix_id=0),
                drawn,
                task.stop,
            )
            for prompt in task.prompts()
        )
    )
    assert {r["id"]: r["answers"] for r in kept} == {
        f"gsm8k/{i}": [text] for i, text in want.items()
    }
    assert all(record["prompt"].startswith("Question: ") for record in kept)
    assert set(result.metrics) == {"strict", "flexible"} and result.truncated == 0


def test_a_restart_asks_what_is_missing(loaded, tmp_path):
    task = gsm8k.load(samples.gsm8k(tmp_path), num_shots=0, max_tokens=8)
    whole = evaluate(standin.Fake(loaded.tokenizer), task, tmp_path / "whole")
    lines = (tmp_path / "whole" / "gsm8k.samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "gsm8k.samples.jsonl"
    for kept in (b"".join(lines[:2]) + lines[2][:40], b"", lines[0][:9], b"".join(lines)):
        path.write_bytes(kept)
        backend = standin.Fake(loaded.tokenizer)
        assert evaluate(backend, task, tmp_path / "cut") == whole
        assert backend.num_asked == 3 - max(0, kept.count(b"\n") - 1)
        assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subject": {"model": "other"}}, "its subject differ"),
        ({"sampling": SamplingParams(temperature=0.5)}, "its sampling differ"),
        ({"task": {"max_tokens": 9}}, "its asked differ"),
        ({"task": {"style": "chat"}}, "its asked, style differ"),
    ],
)
def test_answers_of_other_runs_are_not_mixed_in(loaded, tmp_path, changed, message):
    backend = standin.Fake(loaded.tokenizer)
    options = {"num_shots": 0, "limit": 1, "max_tokens": 4}
    evaluate(backend, gsm8k.load(samples.gsm8k(tmp_path), **options), tmp_path)
    options |= changed.pop("task", {})
    with pytest.raises(ValueError, match=f"gsm8k.samples.jsonl holds answers of .*{message}"):
        evaluate(backend, gsm8k.load(tmp_path, **options), tmp_path, **changed)


def test_several_answers_have_seeds_of_their_own(loaded, tmp_path):
    path = samples.write_lines(tmp_path / "HumanEval.jsonl", samples.HUMANEVAL)
    limits = sandbox.Limits(seconds=2.0)
    task = humaneval.load(path, limits=limits, num_answers=3, ks=(1, 3), max_tokens=8)
    sampling = SamplingParams(temperature=1.0)
    result = evaluate(standin.Fake(loaded.tokenizer), task, tmp_path / "a", sampling=sampling)
    again = evaluate(standin.Fake(loaded.tokenizer), task, tmp_path / "b", sampling=sampling)
    _, *kept = sorted(records(tmp_path / "a", "humaneval"), key=lambda r: r.get("id", ""))
    assert all(len(record["answers"]) == len(record["reasons"]) == 3 for record in kept)
    assert len({text for record in kept for text in record["answers"]}) > 2
    assert set(result.metrics) == {"pass@1", "pass@3"} and result == again
    key = lambda r: r.get("id", "")  # noqa: E731
    assert kept == sorted(records(tmp_path / "b", "humaneval"), key=key)[1:]
    assert json.loads((tmp_path / "a" / "humaneval.json").read_text())["sandbox"]["network"] == "no"


def test_what_does_not_fit_loses_its_beginning_and_is_counted(loaded, tmp_path):
    backend = standin.Fake(loaded.tokenizer)
    samples.write_lines(
        tmp_path / "test.jsonl",
        [{"question": "a" * n, "answer": "#### 1"} for n in (10, 400)],
    )
    task = gsm8k.load(tmp_path, num_shots=0, max_tokens=4)
    result = evaluate(backend, task, tmp_path)
    assert result.truncated == 1
    [record] = [r for r in records(tmp_path, "gsm8k")[1:] if r["cut"]]
    assert record["prompt"].endswith("aaa\nAnswer:") and record["cut"] > 100
    with pytest.raises(ValueError, match="max_tokens=256 leaves no room"):
        evaluate(backend, dataclasses.replace(task, max_tokens=256), tmp_path / "b")
