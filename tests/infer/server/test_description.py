"""What /openapi.json says is what is done."""

import dataclasses
import random

import pytest

from configs.sampling import SamplingParams
from infer.openai import parameters, parsing
from infer.server import description
from tests.infer.server import fuzzer

DEFAULTS = SamplingParams(max_tokens=40)
# What a parameter needs beside it.
ALSO = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": []},
    "best_of": {"n": 1},
}
CASES = [
    (path, name) for path, body in description.bodies("tiny").items() for name in body["properties"]
]


@pytest.mark.parametrize(("path", "name"), CASES, ids=lambda value: value)
def test_what_is_described_is_taken(path, name):
    body_schema = description.bodies("tiny")[path]
    rng = random.Random(name)
    for _ in range(10):
        required = body_schema["required"]
        body = {key: fuzzer.valid(body_schema["properties"][key], rng) for key in required}
        body |= {name: fuzzer.valid(body_schema["properties"][name], rng), **ALSO.get(name, {})}
        try:
            if path == "embeddings":
                parsing.parse_embeddings(body)
            elif path == "completions":
                parsing.parse_completion(body, id="x", defaults=DEFAULTS)
            else:
                parsing.parse_chat(body, id="x", defaults=DEFAULTS)
        except parameters.ParameterError as error:
            assert "known parameter" not in str(error), error
            assert "not supported" not in str(error), error


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_sampling_is_described(path):
    described = description.bodies("tiny")[path]["properties"]
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= set(described)


def test_description_is_openapi():
    whole = description.openapi("tiny")
    assert whole["openapi"].startswith("3.1")
    for path in description.bodies("tiny"):
        post = whole["paths"][f"/v1/{path}"]["post"]
        assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(post["responses"])
