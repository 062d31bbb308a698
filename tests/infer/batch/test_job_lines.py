"""What a line of a job may hold, and the record that answers it."""

import dataclasses
import json

import pytest

from configs.sampling import SamplingParams
from infer.batch import job_lines
from infer.batch.job_files import Line
from infer.constraints.spec import ConstraintSpec
from tests.infer import fake_engine
from tests.infer.batch.jobs import CHAT, COMPLETION, MIXED, TURNS, VECTORS, by_id, openai, run


def test_plain_lines_are_answered_in_the_plain_form(tmp_path):
    service = fake_engine.service(text="an answer")
    _, records = run(tmp_path, MIXED, service=service)
    records = by_id(records)
    words = fake_engine.words()
    ids = [*words.encode("an answer"), words.eos_ids[0]]
    plain = {"text": "an answer", "token_ids": ids, "finish_reason": "stop"}
    assert records["request-1"] == {"custom_id": "request-1", **plain}
    assert records["request-2"]["text"] == "" and records["request-2"]["token_ids"] == ids[:1]
    assert records["request-6"] == {"custom_id": "request-6", "choices": [plain, plain]}
    entries = records["空"].pop("logprobs")
    assert records["空"] == {"custom_id": "空", **plain}
    assert [entry["token_id"] for entry in entries] == ids
    assert all(set(e) == {"token_id", "logprob", "drawn", "top"} for e in entries)
    assert all(len(entry["top"]) == 2 for entry in entries)
    assert [e["token_id"] for e in records["request-7"]["prompt_logprobs"]] == words.encode("p")
    assert len(records["request-10"]["embedding"]) == 8


def test_continuations_are_scored(tmp_path):
    lines = [
        {"prompt": "the answer is", "continuations": [" yes", [7, 8]]},
        {"prompt": "the answer is", "continuation": " yes"},
        {"messages": TURNS, "continuation": "yes"},
        {"prompt": "", "continuation": "yes"},
    ]
    _, records = run(tmp_path, lines, service=fake_engine.service(bos_id=3))
    words, records = fake_engine.words(), by_id(records)
    context, whole = words.encode("the answer is"), words.encode("the answer is yes")
    want = [fake_engine.logprob(whole[:i], whole[i]) for i in range(len(context), len(whole))]
    [first, second] = records["request-1"]["scores"]
    assert (first["token_ids"], first["num_tokens"]) == (whole[len(context) :], len(want))
    assert first["token_logprobs"] == want and first["logprob"] == pytest.approx(sum(want))
    assert second["token_ids"] == [7, 8]
    assert records["request-2"]["scores"] == [first]
    assert records["request-3"]["scores"][0]["token_ids"] == words.encode("yes")
    [score] = records["request-4"]["scores"]
    assert score["token_logprobs"][0] == fake_engine.logprob((3,), words.encode("yes")[0])


def test_greedy_continuations_are_told(tmp_path):
    words = fake_engine.words()
    context = words.encode("p")
    best = max(range(40), key=lambda token: fake_engine.logprob(context, token))
    lines = [{"prompt": context, "continuations": [[best], [best + 1], [best, 200]]}]
    _, [record] = run(tmp_path, lines)
    assert [score["is_greedy"] for score in record["scores"]] == [True, False, False]


def test_openai_lines_are_answered_in_openais_form(tmp_path):
    lines = [
        openai("a", CHAT, model="m", messages=TURNS, logprobs=True),
        openai("b", COMPLETION, prompt=["p", "q"], n=2, temperature=1, max_tokens=9),
        openai("c", VECTORS, model="small", input=["x", "y"]),
        {"prompt": "plain", "custom_id": "d"},
        openai("e", CHAT, model="other", messages=TURNS),
        openai("f", CHAT, messages=TURNS, temperature=-1),
        openai("g", COMPLETION, prompt=["p", "x" * 2000]),
        openai("h", CHAT, messages=TURNS, stream=True),
        openai("i", "/v1/images", prompt="p"),
    ]
    summary, records = run(tmp_path, lines, models=("m", "small"))
    assert (summary.answered, summary.failed) == (4, 5)
    records = by_id(records)
    for custom_id in "abcefghi":
        assert set(records[custom_id]) == {"id", "custom_id", "response", "error"}
        assert set(records[custom_id]["response"]) == {"status_code", "request_id", "body"}
        assert records[custom_id]["error"] is None
        good = custom_id in "abc"
        assert records[custom_id]["response"]["status_code"] == (200 if good else 400)
    bodies = {custom_id: records[custom_id]["response"]["body"] for custom_id in "abcefghi"}
    assert bodies["a"]["object"] == "chat.completion" and bodies["a"]["model"] == "m"
    assert len(bodies["a"]["choices"][0]["logprobs"]["content"]) > 0
    assert [choice["index"] for choice in bodies["b"]["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in bodies["b"]["choices"]}) == 4
    assert [len(d["embedding"]) for d in bodies["c"]["data"]] == [8, 8]
    assert set(records["d"]) == {"custom_id", "text", "token_ids", "finish_reason"}
    params = {custom_id: bodies[custom_id]["error"]["param"] for custom_id in "efghi"}
    assert params == {"e": "model", "f": "temperature", "g": None, "h": "stream", "i": "url"}
    assert "known by the names: m, small" in bodies["e"]["error"]["message"]
    assert bodies["g"]["error"]["message"].startswith(f"{tmp_path / 'in.jsonl'}:7: ")
    # Refused lines are tried again, answered ones are not.
    lines[4:] = [openai(c, CHAT, messages=TURNS) for c in "efghi"]
    summary, again = run(tmp_path, lines, models=("m", "small"))
    assert (summary.answered, summary.skipped, summary.failed) == (5, 4, 0)
    assert all(by_id(again)[c] == records[c] for c in "abcd")


def test_calls_of_tools_are_split_off(tmp_path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    lines = [openai("a", CHAT, messages=TURNS, tools=[tool])]
    _, [record] = run(
        tmp_path,
        lines,
        service=fake_engine.service(text="call"),
        split_tool_calls=lambda text: ("", [{"called": text}]),
    )
    [choice] = record["response"]["body"]["choices"]
    assert choice["message"]["tool_calls"] == [{"called": "call"}]
    assert choice["finish_reason"] == "tool_calls"


def test_a_form_beside_tools_leaves_the_calls():
    tool = {"type": "function", "function": {"name": "weather"}}
    terms = job_lines.Terms(service=fake_engine.service(), settings=SamplingParams())

    def job(**more):
        return job_lines.job(Line(1, "id", "here", {"guided_regex": "a+", **more}), terms)

    form = ConstraintSpec("regex", "a+")
    calls = ConstraintSpec("tool_calls", json.dumps([tool["function"]]))
    [request] = job(messages=TURNS, tools=[tool]).requests
    assert request.constraint == dataclasses.replace(form, alternative=calls)
    for more in ({}, {"tools": []}):
        assert job(messages=TURNS, **more).requests[0].constraint == form
    with pytest.raises(ValueError, match="tools need messages"):
        job(prompt="p", tools=[tool])
    for wrong in ({}, 3, {"function": {"name": 3}}):
        with pytest.raises(ValueError, match=r"tools\[1\] is no function"):
            job(messages=TURNS, tools=[tool, wrong])
