"""Jobs over JSONL: the same answers as alone, restarts, shares, orders, and bad lines."""

import dataclasses
import json
import re

import numpy as np
import pytest

from configs import schema
from infer import batch, batch_files
from infer.batch_files import Share
from tests.infer import fake_engine

TURNS = [{"role": "user", "content": "hello <|im_end|>"}]
MIXED = [
    {"prompt": "short"},
    {"prompt": "a prompt that is a good deal longer than the others " * 2, "stop": ["a", "e"]},
    {"prompt": "sampled", "temperature": 1.0, "seed": 7, "custom_id": "mine"},
    {"prompt": "sampled, and its seed made from its name", "temperature": 1.3, "max_tokens": 30},
    {"prompt": [5, 6, 7], "custom_id": "空", "logprobs": 2},
    {"messages": TURNS, "top_k": 5, "temperature": 0.7, "n": 2},
    {"prompt": "p", "temperature": 0.8, "best_of": 3, "prompt_logprobs": 1},
    {"prompt": "the answer is ", "continuations": ["yes", "no, never"]},
    {"messages": TURNS, "continuation": "yes"},
    {"input": "words"},
]


def write_lines(path, records) -> None:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_id(records: list[dict]) -> dict[str, dict]:
    assert len({r["custom_id"] for r in records}) == len(records)
    return {r["custom_id"]: r for r in records}


def run(folder, records, *, output="out.jsonl", service=None, **options):
    write_lines(folder / "in.jsonl", records)
    service = service or fake_engine.service()
    summary = batch.run(service, folder / "in.jsonl", folder / output, **options)
    assert service.idle and service.num_open == 0
    return summary, read_lines(summary.path)


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


def openai(custom_id: str, url: str, **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


CHAT, COMPLETION, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


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
                batch.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
        summary, _ = run(tmp_path, lines, share=Share(index, 3), order="input")
        paths.append(summary.path)
        assert summary.answered + summary.failed in (7, 8)
    assert [path.name for path in paths] == [f"out-0000{i}-of-00003.jsonl" for i in range(3)]
    merged = batch.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
    assert read_lines(merged) == alone
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match="of another share"):
        run(tmp_path, lines, share=Share(0, 3))
    with pytest.raises(ValueError, match="a second time"):
        batch.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
    paths[0].unlink()
    run(tmp_path, lines, share=Share(0, 3))
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    with pytest.raises(ValueError, match="1 lines have no answer yet, first .*in.jsonl:20"):
        batch.merge(tmp_path / "in.jsonl", tmp_path / "out.jsonl", count=3)
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


def test_one_process_at_a_time_has_the_output(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    index = batch_files.Index(tmp_path / "in.jsonl")
    path = tmp_path / "out.jsonl"
    first = batch_files.Output(path, index=index, share=Share(), is_error=lambda r: False)
    with pytest.raises(ValueError, match="is being written by another process"):
        run(tmp_path, [{"prompt": "a"}])
    first.close()
    summary, _ = run(tmp_path, [{"prompt": "a"}])
    assert summary.answered == 1


def test_an_input_that_changes_is_noticed(tmp_path):
    path = tmp_path / "in.jsonl"
    for changed in ([{"prompt": "a"}], [{"custom_id": "other", "prompt": "a"}] * 2):
        write_lines(path, [{"prompt": "a"}, {"prompt": "b"}])
        missing = batch._wanted(batch_files.Index(path), np.ones(2, bool))
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
    values = dataclasses.asdict(schema.Sampling(logprobs=0, prompt_logprobs=0))
    values |= {"logit_bias": {"3": 1}, "stop_token_ids": [1], "prompt": "p"}
    summary, records = run(tmp_path, [values])
    assert summary.answered == 1, records
