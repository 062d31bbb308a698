"""A job over the real engine and a tiny model: the answers of one prompt at a time."""

import dataclasses
import json
import re
import zlib

import numpy as np
import pytest

from configs.engine import EngineConfig
from infer.batch import batch_job
from infer.text import loading
from infer.text.service import TextRequest
from tests.infer import whole_forward

pytestmark = pytest.mark.slow

SETTINGS = EngineConfig(
    num_slots=4,
    page_size=16,
    num_pages=64,
    max_length=128,
    prefill_chunk=32,
    prefill_tokens=64,
    decode_steps=4,
)
LINES = [
    {"prompt": "short"},
    {"prompt": "a prompt that is a good deal longer than others, in chunks", "max_tokens": 30},
    {"prompt": "sampled", "temperature": 1.0, "seed": 7},
    {"prompt": "p", "temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"messages": [{"role": "user", "content": "hello"}], "top_k": 5, "temperature": 0.7},
]


@pytest.fixture(scope="module")
def made(loaded):
    return loading.serve(loaded, settings=SETTINGS)


def run(service, folder, lines):
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "out.jsonl").unlink(missing_ok=True)
    summary = batch_job.run(service, folder / "in.jsonl", folder / "out.jsonl", order="input")
    records = [json.loads(line) for line in summary.path.read_text().splitlines()]
    assert summary.failed == 0, records
    return records


def test_answers_are_those_of_whole_forward_passes(made, loaded, tmp_path):
    for line, record in zip(LINES, run(made, tmp_path, LINES), strict=True):
        own = {k: v for k, v in line.items() if k not in ("prompt", "messages")}
        settings = dataclasses.replace(loaded.defaults, **own)
        if "seed" not in own:
            settings = dataclasses.replace(settings, seed=batch_seed(record))
        prompt = line.get("prompt", line.get("messages"))
        tokens = made.encode(TextRequest(id="", prompt=prompt, sampling=settings))
        answer = whole_forward.answer(loaded, tokens, settings=settings)
        assert record["token_ids"] == answer
        stopped = answer[-1] in loaded.eos_ids
        text = loaded.tokenizer.decode(answer[: len(answer) - stopped], skip_special=True)
        assert (record["text"], record["finish_reason"]) == (text, "stop" if stopped else "length")


def batch_seed(record) -> int:
    return zlib.crc32(f"0:{record['custom_id']}".encode())


def test_scores_are_the_logprobs_of_the_answer(made, tmp_path):
    asked = {"prompt": "a few", "max_tokens": 6, "logprobs": 0, "prompt_logprobs": 0}
    [record] = run(made, tmp_path, [asked])
    words, ids = made.tokenizer, record["token_ids"]
    [scored] = run(made, tmp_path, [{"prompt": words.encode("a few"), "continuation": ids}])
    [score] = scored["scores"]
    want = [entry["logprob"] for entry in record["logprobs"]]
    np.testing.assert_allclose(score["token_logprobs"], want, rtol=0, atol=2e-4)
    assert score["is_greedy"] and score["num_tokens"] == len(ids)


def test_a_stopped_answer_is_the_free_one_cut(made, tmp_path):
    [free] = run(made, tmp_path, [{"prompt": "hello", "max_tokens": 40}])
    stop = free["text"][len(free["text"]) // 2 :][:3]
    line = {"prompt": "hello", "max_tokens": 40, "stop": stop}
    [cut, other] = run(made, tmp_path, [line, {"prompt": "hello", "max_tokens": 40}])
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert cut["token_ids"] == free["token_ids"][: len(cut["token_ids"])]
    assert cut["finish_reason"] == "stop" and other["text"] == free["text"]


def test_answers_keep_to_their_form(made, tmp_path):
    lines = [
        {"prompt": "hello", "guided_choice": ["yes", "no"]},
        {"prompt": "hello"},
        {"prompt": "hello", "guided_regex": "[a-c]{3}x", "n": 2, "temperature": 2.0},
    ]
    chosen, free, formed = run(made, tmp_path, lines)
    assert chosen["text"] in ("yes", "no") and chosen["finish_reason"] == "stop"
    assert all(re.fullmatch("[a-c]{3}x", choice["text"]) for choice in formed["choices"])
    [alone] = run(made, tmp_path, [lines[1]])
    assert alone["token_ids"] == free["token_ids"]
