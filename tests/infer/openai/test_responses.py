"""Answers in the forms of OpenAI's API."""

import base64
import json

import numpy as np

from configs.sampling import SamplingParams
from infer.openai import parsing, responses
from infer.text.outputs import Answers, TextLogprobs, TokenText, Update, Usage
from infer.text.service import Embeddings

DEFAULTS = SamplingParams()
TURNS = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(**body) -> parsing.Call:
    return parsing.parse_chat({"messages": TURNS, **body}, id="c", defaults=DEFAULTS)


def completion(**body) -> parsing.Call:
    return parsing.parse_completion({"prompt": "p", **body}, id="c", defaults=DEFAULTS)


def entry(text: bytes, offset: int, logprob=-1.0, hidden=False, top=()) -> TextLogprobs:
    top = tuple(TokenText(i, data, value) for i, (data, value) in enumerate(top))
    return TextLogprobs(9, text, logprob, drawn=logprob, offset=offset, hidden=hidden, top=top)


def collected(*updates: Update) -> Answers:
    answers = Answers()
    for update in updates:
        answers.add(update)
    return answers


WHERE = {"id": "x-1", "created": 5, "model": "m"}
USAGE = Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=4)
HALF = "世".encode()[:2]


def test_a_chat_is_answered():
    entries = (entry(b"a", 0, top=[(b"a", -1.0), (b"b", -2.0)]), entry(b"end", 1, hidden=True))
    update = Update(id="c", index=0, text="a", logprobs=entries, finish_reason="stop", usage=USAGE)
    body = responses.response(chat(logprobs=True, top_logprobs=2), [collected(update)], **WHERE)
    assert body == {
        "id": "x-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "refusal": None},
                "logprobs": {
                    "content": [
                        {
                            "token": "a",
                            "logprob": -1.0,
                            "bytes": [97],
                            "top_logprobs": [
                                {"token": "a", "logprob": -1.0, "bytes": [97]},
                                {"token": "b", "logprob": -2.0, "bytes": [98]},
                            ],
                        }
                    ],
                    "refusal": None,
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_calls_of_tools_are_split_off_where_there_are_tools():
    def split(text):
        return "", [{"id": "call_0", "type": "function", "function": {"name": text}}]

    update = Update(id="c", index=0, text="weather", finish_reason="stop", usage=USAGE)
    for tools, reason in (([TOOL], "tool_calls"), (None, "stop")):
        body = responses.response(
            chat(tools=tools), [collected(update)], split_tool_calls=split, **WHERE
        )
        [choice] = body["choices"]
        assert choice["finish_reason"] == reason
        assert ("tool_calls" in choice["message"]) == (tools is not None)
        assert choice["message"]["content"] == (None if tools else "weather")


def test_completions_are_answered_by_prompt_and_choice():
    call = completion(prompt=["a", "b"], n=2, logprobs=1, echo=True, return_token_ids=True)
    first = (entry(b"p", 0, logprob=None), entry(b"q", 1))
    answers = [
        collected(
            Update(id="c", index=0, text="pq" + text, tokens=(1,), prompt_logprobs=first,
                   logprobs=(entry(HALF, 2, top=[(HALF, -1.0), (b"z", -3.0)]),),
                   finish_reason="length"),
            Update(id="c", index=1, text="u", finish_reason="stop", usage=USAGE),
        )
        for text in ("s", "t")
    ]  # fmt: skip
    body = responses.response(call, answers, **WHERE)
    assert body["object"] == "text_completion"
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == ["pqs", "u", "pqt", "u"]
    assert body["choices"][0]["token_ids"] == [1]
    half = "bytes:\\xe4\\xb8"
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["p", "q", half],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {"q": -1.0}, {half: -1.0, "z": -3.0}],
        "text_offset": [0, 1, 2],
    }
    assert "prompt_logprobs" not in body["choices"][0]
    assert body["usage"]["completion_tokens"] == 6
    json.dumps(body)


def test_prompts_logprobs_are_given_by_token_where_asked():
    first = (entry(b"p", 0, logprob=None), entry(b"q", 1, top=[(b"z", -0.5)]))
    update = Update(id="c", index=0, prompt_logprobs=first, finish_reason="length", usage=USAGE)
    body = responses.response(chat(prompt_logprobs=1, max_tokens=0), [collected(update)], **WHERE)
    assert body["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "0": {"logprob": -0.5, "decoded_token": "z"},
            "9": {"logprob": -1.0, "decoded_token": "q"},
        },
    ]


def test_streams():
    call = chat(stream=True, stream_options={"include_usage": True}, n=2)
    first = responses.first_chunk(call, 1, **WHERE)
    assert first["object"] == "chat.completion.chunk" and first["usage"] is None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    update = Update(id="c", index=1, text="a", tokens=(1,))
    body = responses.chunk(call, update, **WHERE)
    [choice] = body["choices"]
    assert (choice["index"], choice["delta"], choice["finish_reason"]) == (
        1,
        {"content": "a"},
        None,
    )
    last = responses.chunk(call, Update(id="c", index=0, finish_reason="stop"), **WHERE)
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    end = responses.usage_chunk(call, [USAGE], **WHERE)
    assert (end["choices"], end["usage"]["total_tokens"]) == ([], 10)
    call = completion(stream=True, prompt=["a", "b"])
    body = responses.chunk(call, Update(id="c/1", index=0, text="a"), number=1, **WHERE)
    assert (body["choices"][0]["index"], body["choices"][0]["text"]) == (1, "a")
    assert body["object"] == "text_completion" and "usage" not in body


def test_vectors_are_numbers_or_base64():
    vectors_ND = np.asarray([[0.5, -0.25], [1.0, 0.0]], np.float32)
    made = Embeddings(vectors_ND, 5)
    call = parsing.parse_embeddings({"input": ["a", "b"]})
    body = responses.embeddings_response(call, made, model="m")
    assert [d["embedding"] for d in body["data"]] == [[0.5, -0.25], [1.0, 0.0]]
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    call = parsing.parse_embeddings({"input": ["a", "b"], "encoding_format": "base64"})
    body = responses.embeddings_response(call, made, model="m")
    got = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in body["data"]]
    assert np.array_equal(got, vectors_ND)


def test_a_refusal_has_openais_form():
    assert responses.error("no", param="top_k") == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "top_k",
            "code": None,
        }
    }
