"""Jobs over JSONL: the same answers as alone, restarts, and bad lines."""

import dataclasses
import json
import re

import pytest

from configs import schema
from infer import batch, generate

MIXED = [
    {"prompt": "short"},
    {"prompt": "a prompt that is a good deal longer than the others, in another bucket " * 2},
    {"prompt": "sampled", "temperature": 1.0, "seed": 7, "custom_id": "mine"},
    {"prompt": "sampled, and its seed made from its name", "temperature": 1.3, "max_tokens": 30},
    {"prompt": "", "custom_id": "空"},
    {"messages": [{"role": "user", "content": "hello <|im_end|>"}], "top_k": 5, "temperature": 0.7},
    {"prompt": "p", "temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="session")
def with_bos(generator):
    cfg = dataclasses.replace(generator.cfg, bos_token_id=0)
    return dataclasses.replace(generator, cfg=cfg)


def write_lines(path, records) -> None:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_id(records: list[dict]) -> dict[str, dict]:
    assert len({r["custom_id"] for r in records}) == len(records)
    return {r["custom_id"]: r for r in records}


def run(generator, folder, records, *, output="out.jsonl", **options):
    write_lines(folder / "in.jsonl", records)
    summary = batch.run(
        generator, folder / "in.jsonl", folder / output, show_progress=False, **options
    )
    return summary, read_lines(folder / output)


def test_answers_are_those_of_each_line_alone(with_bos, tmp_path):
    summary, together = run(with_bos, tmp_path, MIXED)
    assert (summary.answered, summary.failed, summary.exit_code) == (len(MIXED), 0, 0)
    together = by_id(together)
    named = [{"custom_id": f"request-{i}", **line} for i, line in enumerate(MIXED, 1)]
    assert set(together) == {line["custom_id"] for line in named}
    for i, line in enumerate(named):
        _, [alone] = run(with_bos, tmp_path, [line], output=f"alone{i}.jsonl")
        assert alone == together[line["custom_id"]]
    assert summary.generated_tokens == sum(len(r["token_ids"]) for r in together.values())


def test_answers_are_those_of_generate(generator, tmp_path):
    summary, [record] = run(generator, tmp_path, [{"prompt": "same", "seed": 3, "temperature": 1}])
    settings = dataclasses.replace(generator.defaults, seed=3, temperature=1.0)
    request = generate.prompt_request(generator, "same", settings=settings)
    written = []
    answer = generate.stream(generator, request, write=written.append)
    assert record == {
        "custom_id": "request-1",
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }
    assert "".join(written) == answer.text
    assert summary.generated_tokens == len(answer.token_ids)


def test_little_memory_gives_the_same_answers(generator, tmp_path):
    lines = [{"prompt": f"number {i}"} for i in range(5)]
    _, plenty = run(generator, tmp_path, lines, output="a.jsonl")
    _, scarce = run(generator, tmp_path, lines, output="b.jsonl", memory=1)
    assert by_id(plenty) == by_id(scarce)


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_a_restart_does_what_is_missing(generator, tmp_path, cut):
    lines = [{"prompt": f"number {i}", "temperature": 1.0} for i in range(6)]
    _, whole = run(generator, tmp_path, lines, output="whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    # Three whole answers, and a fourth that was cut: nowhere, early, in its middle, at its end.
    kept = ends[2] + (cut if cut >= 0 else ends[3] - ends[2] - 1)
    (tmp_path / "out.jsonl").write_bytes(content[:kept])
    summary, again = run(generator, tmp_path, lines)
    assert (summary.skipped, summary.answered) == (3, 3)
    assert again[:3] == whole[:3]
    assert by_id(again) == by_id(whole)
    before = (tmp_path / "out.jsonl").read_bytes()
    summary, _ = run(generator, tmp_path, lines)
    assert (summary.skipped, summary.answered) == (6, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == before


BAD = [
    ('{"prompt": "cut', "not readable as JSON"),
    ("[1]", "a JSON object is needed, not list"),
    ({"custom_id": "x"}, "give either prompt or messages"),
    ({"prompt": "a", "messages": []}, "give either prompt or messages"),
    ({"prompt": 3}, "prompt must be a text, not int"),
    ({"prompt": None}, "prompt must be a text, not NoneType"),
    ({"messages": "hi"}, "messages must be a list of objects"),
    ({"messages": []}, "messages must be a list of objects"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"prompt": "a", "temprature": 1}, r"unknown keys \['temprature'\]"),
    ({"prompt": "a", "temperature": -1}, "temperature=-1"),
    ({"prompt": "a", "top_p": "0.5"}, "top_p='0.5'"),
    ({"prompt": "a", "max_tokens": None}, "max_tokens=None"),
    ({"prompt": "a" * 300}, "prompt of 300 tokens .* max_position_embeddings=256"),
    ({"prompt": ""}, "prompt is empty"),
    ('{"prompt": "\\ud800"}', "surrogate"),
    ('{"prompt": "a", "custom_id": "\\ud800"}', "custom_id"),
    ({"prompt": "a", "custom_id": 3}, "custom_id=3"),
]


def test_bad_lines_are_named_and_the_job_goes_on(generator, tmp_path):
    lines = [{"prompt": "good"}, *[line for line, _ in BAD], {"prompt": "good too"}]
    summary, records = run(generator, tmp_path, lines)
    assert (summary.answered, summary.failed, summary.exit_code) == (2, len(BAD), 1)
    records = by_id(records)
    for number, (line, message) in enumerate(BAD, 2):
        named = isinstance(line, dict) and isinstance(line.get("custom_id"), str)
        record = records[line["custom_id"] if named else f"request-{number}"]
        assert set(record) == {"custom_id", "error"}
        text = record["error"]["message"]
        assert text.startswith(f"{tmp_path / 'in.jsonl'}:{number}: ")
        assert re.search(message, text), text
    # Mended lines are tried again, and their errors disappear.
    mended = [{"prompt": "good"} for _ in lines[1:]] + [{"prompt": "good too"}]
    mended[3]["custom_id"] = "x"
    summary, records = run(generator, tmp_path, mended)
    assert (summary.answered, summary.skipped, summary.exit_code) == (len(BAD), 2, 0)
    assert not any("error" in r for r in records) and len(by_id(records)) == len(lines)


def test_lines_are_told_apart(generator, tmp_path):
    for records in (
        [{"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"}],
        [{"prompt": "a", "custom_id": "request-2"}, {"prompt": "b"}],
    ):
        with pytest.raises(ValueError, match=r"in.jsonl:2: custom_id '.*' was used at .*:1"):
            run(generator, tmp_path, records)
        assert not (tmp_path / "out.jsonl").exists()


def test_foreign_output_is_left_alone(generator, tmp_path):
    for content in ("precious notes\n", '{"custom_id": "other", "text": ""}\n', "[]\n", "7\n"):
        (tmp_path / "out.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"out.jsonl:1.*move the file away"):
            run(generator, tmp_path, [{"prompt": "a"}])
        assert (tmp_path / "out.jsonl").read_text() == content


def test_blank_lines_and_numbers(generator, tmp_path):
    summary, records = run(generator, tmp_path, ["", {"prompt": "a"}, "", {"prompt": "b"}])
    assert summary.answered == 2
    assert set(by_id(records)) == {"request-2", "request-4"}


def test_an_empty_job_is_done(generator, tmp_path):
    summary, records = run(generator, tmp_path, [], output="new/folder/out.jsonl")
    assert (summary.answered, summary.exit_code, records) == (0, 0, [])


def test_seeds_of_lines_follow_the_job(generator, tmp_path):
    lines = [{"prompt": "same", "temperature": 2.0, "max_tokens": 30}] * 2
    _, a = run(generator, tmp_path, lines, output="a.jsonl")
    assert by_id(a)["request-1"]["token_ids"] != by_id(a)["request-2"]["token_ids"]
    other = dataclasses.replace(generator.defaults, seed=1)
    _, b = run(generator, tmp_path, lines, output="b.jsonl", settings=other)
    assert by_id(a)["request-1"]["token_ids"] != by_id(b)["request-1"]["token_ids"]


def test_no_setting_is_forgotten():
    assert set(batch._SAMPLING_KEYS) == set(schema.Sampling.__dataclass_fields__)
