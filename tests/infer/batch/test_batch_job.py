"""Jobs over JSONL: the same answers as alone, restarts, shares, orders, and bad lines."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest

from configs.sampling import SamplingParams
from infer.batch import batch_job, job_files
from infer.batch.job_files import Share
from tests.infer import fake_engine
from tests.infer.batch.jobs import (
    CHAT,
    COMPLETION,
    MIXED,
    TURNS,
    by_id,
    openai,
    read_lines,
    run,
    write_lines,
)


def test_answers_are_those_of_each_line_alone(tmp_path):
    summary, together = run(tmp_path, MIXED)
    assert (summary.answered, summary.failed, summary.exit_code) == (len(MIXED), 0, 0)
    together = by_id(together)
    named = [{"custom_id": f"request-{i}", **line} for i, line in enumerate(MIXED, 1)]
    assert set(together) == {line["custom_id"] for line in named}
    for i, line in enumerate(named):
        _, [alone] = run(tmp_path, [line], output=f"alone{i}.jsonl")
        assert alone == together[line["custom_id"]]
    texts = [r for r in together.values() if "token_ids" in r]
    chosen = [c for r in together.values() for c in r.get("choices", ())]
    discarded = 2 * len(together["request-7"]["token_ids"])
    counted = sum(len(r["token_ids"]) for r in texts + chosen) + discarded
    assert summary.generated_tokens == counted


def test_an_answer_that_cannot_go_on_is_an_error(tmp_path):
    class Failing:
        def mask(self):
            return np.full(9, 2**32 - 1, np.uint32)

        def accept(self, token):
            raise RuntimeError("the grammar is too much")

    service = fake_engine.service(compile_constraint=lambda spec: Failing())
    lines = [{"prompt": "a", "guided_regex": "a"}, {"prompt": "a"}]
    summary, records = run(tmp_path, lines, service=service)
    assert (summary.answered, summary.failed) == (1, 1)
    message = by_id(records)["request-1"]["error"]["message"]
    assert message == f"{tmp_path / 'in.jsonl'}:1: the grammar is too much"


def test_the_queue_is_bounded_and_full(tmp_path):
    lines = [{"prompt": f"number {i}"} for i in range(300)]
    service = fake_engine.service(num_slots=4)
    _, few = run(tmp_path, lines, service=service, max_open=9)
    assert service.engine.most_held == 9
    _, many = run(tmp_path, lines, output="b.jsonl", max_open=10**6)
    assert by_id(few) == by_id(many)


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_a_restart_does_what_is_missing(tmp_path, cut):
    lines = [{"prompt": f"number {i}", "temperature": 1.0} for i in range(6)]
    _, whole = run(tmp_path, lines, output="whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    # Three whole answers, and a fourth that was cut: nowhere, early, in its middle, at its end.
    kept = ends[2] + (cut if cut >= 0 else ends[3] - ends[2] - 1)
    (tmp_path / "out.jsonl").write_bytes(content[:kept])
    summary, again = run(tmp_path, lines)
    assert (summary.skipped, summary.answered) == (3, 3)
    assert again[:3] == whole[:3]
    assert by_id(again) == by_id(whole)
    before = (tmp_path / "out.jsonl").read_bytes()
    summary, _ = run(tmp_path, lines)
    assert (summary.skipped, summary.answered) == (6, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_answers_are_in_the_inputs_order_on_request(tmp_path):
    lines = [{"prompt": f"{i}", "max_tokens": 30 - i % 29} for i in range(40)]
    _, arrived = run(tmp_path, lines, output="a.jsonl")
    _, ordered = run(tmp_path, lines, order="input")
    names = [f"request-{i}" for i in range(1, 41)]
    assert [r["custom_id"] for r in ordered] == names
    assert sorted(names) == sorted(r["custom_id"] for r in arrived)
    assert [r["custom_id"] for r in arrived] != names
    assert by_id(arrived) == by_id(ordered)
    # What was answered before it was asked in order is sorted too.
    (tmp_path / "a.jsonl").write_text(
        "".join(f"{json.dumps(r)}\n" for r in arrived[:25]), encoding="utf-8"
    )
    summary, again = run(tmp_path, lines, output="a.jsonl", order="input")
    assert summary.skipped == 25 and again == ordered


def test_shares_are_answered_apart_and_merged(tmp_path):
    lines = ["", *[{"prompt": f"{i}", "temperature": 1.0} for i in range(20)], "no JSON"]
    _, alone = run(tmp_path, lines, output="alone.jsonl", order="input")
    paths = []
    for index in range(3):
        if index == 2:
            with pytest.raises(ValueError, match=r"out-00002-of-00003.jsonl is not there"):
                batch_job.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
        summary, _ = run(tmp_path, lines, share=Share(index, 3), order="input")
        paths.append(summary.path)
        assert summary.answered + summary.failed in (7, 8)
    assert [path.name for path in paths] == [f"out-0000{i}-of-00003.jsonl" for i in range(3)]
    merged = batch_job.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
    assert read_lines(merged) == alone
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match="of another share"):
        run(tmp_path, lines, share=Share(0, 3))
    with pytest.raises(ValueError, match="a second time"):
        batch_job.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
    paths[0].unlink()
    run(tmp_path, lines, share=Share(0, 3))
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    with pytest.raises(ValueError, match="1 lines have no answer yet, first .*in.jsonl:20"):
        batch_job.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
    assert Share.parse("3/8") == Share(3, 8)
    for bad in ("1/1", "0/0", "-1/2", "1", "a/b"):
        with pytest.raises(ValueError, match="share "):
            Share.parse(bad)


BAD = [
    ('{"prompt": "cut', "not readable as JSON"),
    ("[1]", "a JSON object is needed, not list"),
    ("[" * 100_000, "not readable as JSON"),
    ({"custom_id": "x"}, "give either prompt or messages"),
    ({"prompt": "a", "messages": []}, "give either prompt or messages"),
    ({"prompt": 3}, "prompt=3 must be a text or a list"),
    ({"prompt": None}, "give either prompt or messages"),
    ({"prompt": ["a"]}, "prompt holds 'a', which is not a token id"),
    ({"prompt": [10**6]}, "outside the vocabulary"),
    ({"messages": "hi"}, "messages='hi' must be a list"),
    ({"messages": []}, "messages must be a list of objects"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"prompt": "a", "temprature": 1}, "'temprature' is not a known parameter"),
    ({"prompt": "a", "temperature": -1}, "temperature=-1"),
    ({"prompt": "a", "top_p": "0.5"}, "top_p='0.5'"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens=0"),
    ({"prompt": "a", "n": 0}, "n=0"),
    ({"prompt": "a" * 2000}, "prompt of 2000 tokens .* max_length=1024"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "no structured output"),
    ({"prompt": "a", "continuations": []}, "continuations is empty"),
    ({"prompt": "a", "continuations": ["x", ""]}, "a continuation is empty"),
    ({"prompt": "a", "continuation": "x", "seed": 1}, "'seed' is not a known parameter"),
    ({"prompt": "a", "continuations": ["x", "x" * 2000]}, "max_length=1024"),
    ({"input": "a" * 2000}, "exceeds 1024"),
    ({"input": ""}, "prompt is empty"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": "a", "custom_id": "\\ud800"}', "custom_id"),
    ({"prompt": "a", "custom_id": 3}, "custom_id=3"),
]


def test_bad_lines_are_named_and_the_job_goes_on(tmp_path):
    good = [{"prompt": "good"}, {"input": "good"}, {"prompt": "good too"}]
    lines = [good[0], *[line for line, _ in BAD], *good[1:]]
    summary, records = run(tmp_path, lines)
    assert (summary.answered, summary.failed, summary.exit_code) == (3, len(BAD), 1)
    records = by_id(records)
    for number, (line, message) in enumerate(BAD, 2):
        named = isinstance(line, dict) and isinstance(line.get("custom_id"), str)
        record = records[line["custom_id"] if named else f"request-{number}"]
        assert set(record) == {"custom_id", "error"}
        text = record["error"]["message"]
        assert text.startswith(f"{tmp_path / 'in.jsonl'}:{number}: ")
        assert re.search(message, text), text
    # Mended lines are tried again, and their errors disappear.
    mended = [{"prompt": "good"} for _ in lines]
    mended[4]["custom_id"] = "x"
    summary, records = run(tmp_path, mended)
    assert (summary.answered, summary.skipped, summary.exit_code) == (len(BAD), 3, 0)
    assert not any("error" in r for r in records) and len(by_id(records)) == len(lines)


def test_whatever_a_line_holds_the_job_goes_on(tmp_path):
    rng = random.Random(0)
    known = [*MIXED, openai("a", CHAT, messages=TURNS), openai("b", COMPLETION, prompt="p")]
    scraps = [None, True, -1, 10**30, 1e400, "x", "", [], [[]], [1], ["x"], {}, {"type": "x"}]
    scraps += [[{"role": "user"}], [{"role": "user", "content": [3]}], {"1": 2}]
    keys = sorted({key for line in known for key in [*line, *line.get("body", ())]})
    keys += ["tools", "response_format", "structured_outputs", "stop_token_ids", "logit_bias"]
    lines = []
    for number in range(600):
        line = json.loads(json.dumps(rng.choice(known)))
        line["custom_id"] = f"id {number}"
        target = line["body"] if "body" in line and rng.random() < 0.7 else line
        for key in rng.sample(keys, rng.randint(1, 3)):
            if key != "custom_id":
                target[key] = rng.choice(scraps)
        lines.append(line)
    summary, records = run(tmp_path, lines)
    assert len(by_id(records)) == len(lines) == summary.answered + summary.failed
    assert summary.answered > 20 and summary.failed > 20


def test_lines_are_told_apart(tmp_path):
    for records in (
        [{"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"}],
        [{"prompt": "a", "custom_id": "request-2"}, {"prompt": "b"}],
    ):
        with pytest.raises(ValueError, match=r"in.jsonl:2: custom_id '.*' was used at .*:1"):
            run(tmp_path, records)
        assert not (tmp_path / "out.jsonl").exists()


def test_foreign_output_is_left_alone(tmp_path):
    record = '{"custom_id": "request-1", "text": ""}\n'
    for content in ("precious notes\n", "precious notes", "[]\n", "7\n", record.replace("1", "9")):
        (tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"out.jsonl:1.*move the file away"):
            run(tmp_path, [{"prompt": "a"}])
        assert (tmp_path / "out.jsonl").read_text() == content
    (tmp_path / "out.jsonl").write_text(record * 2)
    with pytest.raises(ValueError, match="answers 'request-1' twice"):
        run(tmp_path, [{"prompt": "a"}])


def test_the_input_is_no_output(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "prompt": "p"}')
    with pytest.raises(ValueError, match="in.jsonl is the input"):
        batch_job.run(fake_engine.service(), tmp_path / "in.jsonl", tmp_path / "in.jsonl")
    assert (tmp_path / "in.jsonl").read_text() == '{"custom_id": "a", "prompt": "p"}'


def test_one_process_at_a_time_has_the_output(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    index = job_files.Index(tmp_path / "in.jsonl")
    path = tmp_path / "out.jsonl"
    first = job_files.Output(path, index=index, share=Share(), is_error=lambda r: False)
    with pytest.raises(ValueError, match="is being written by another process"):
        run(tmp_path, [{"prompt": "a"}])
    first.close()
    summary, _ = run(tmp_path, [{"prompt": "a"}])
    assert summary.answered == 1


def test_an_input_that_changes_is_noticed(tmp_path):
    path = tmp_path / "in.jsonl"
    for changed in ([{"prompt": "a"}], [{"custom_id": "other", "prompt": "a"}] * 2):
        write_lines(path, [{"prompt": "a"}, {"prompt": "b"}])
        missing = batch_job._wanted(job_files.Index(path), np.ones(2, bool))
        write_lines(path, changed)
        with pytest.raises(ValueError, match="in.jsonl changed while the job ran"):
            list(missing)


def test_blank_lines_and_numbers(tmp_path):
    summary, records = run(tmp_path, ["", {"prompt": "a"}, "", {"prompt": "b"}])
    assert summary.answered == 2
    assert set(by_id(records)) == {"request-2", "request-4"}


@pytest.mark.parametrize("order", ["arrival", "input"])
def test_an_empty_job_is_done(tmp_path, order):
    summary, records = run(tmp_path, [], output="new/folder/out.jsonl", order=order)
    assert (summary.answered, summary.exit_code, records) == (0, 0, [])


def test_seeds_of_lines_follow_the_job(tmp_path):
    line = {"temperature": 2.0, "max_tokens": 30}
    lines = [{"prompt": "same", **line}] * 2
    _, a = run(tmp_path, lines, output="a.jsonl")
    assert by_id(a)["request-1"]["token_ids"] != by_id(a)["request-2"]["token_ids"]
    other = dataclasses.replace(fake_engine.SETTINGS, seed=1)
    _, b = run(tmp_path, lines, output="b.jsonl", settings=other)
    assert by_id(a)["request-1"]["token_ids"] != by_id(b)["request-1"]["token_ids"]
    lines = [openai("request-1", COMPLETION, prompt="same", return_token_ids=True, **line)]
    _, [c] = run(tmp_path, lines, output="c.jsonl")
    [choice] = c["response"]["body"]["choices"]
    assert choice["token_ids"] == by_id(a)["request-1"]["token_ids"]


def test_every_setting_can_be_said_in_a_line(tmp_path):
    values = dataclasses.asdict(SamplingParams(logprobs=0, prompt_logprobs=0))
    values |= {"logit_bias": {"3": 1}, "stop_token_ids": [1], "prompt": "p"}
    summary, records = run(tmp_path, [values])
    assert summary.answered == 1, records
