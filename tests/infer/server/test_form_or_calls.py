"""`response_format` beside tools: a random model, bound by a grammar, takes either way."""

import dataclasses
import json
from typing import Literal

import openai
import pydantic
import pytest

from configs.engine import EngineConfig
from infer.text import loading
from tests.infer.server.conftest import running_server

pytestmark = pytest.mark.timeout(300)

ENGINE = EngineConfig(
    num_slots=2, page_size=16, prefill_chunk=256, prefill_tokens=256, decode_steps=1, num_pages=256,
    max_length=2048, buckets="one",
)  # fmt: skip


class Mood(pydantic.BaseModel):
    """An answer. Nothing in it can go on for ever."""

    model_config = pydantic.ConfigDict(extra="forbid")
    mood: Literal["good", "bad"]
    degrees: int = pydantic.Field(ge=0, le=99)


class Weather(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "?"}],
    "tools": [openai.pydantic_function_tool(Weather)],
    "response_format": Mood,
    "parallel_tool_calls": False,  # a random model goes on calling
    "temperature": 1.0,
    "max_tokens": 600,
}


@pytest.fixture(scope="module")
def client(loaded):
    cfg = dataclasses.replace(loaded.cfg, max_position_embeddings=ENGINE.max_length)
    service = loading.serve(dataclasses.replace(loaded, cfg=cfg), settings=ENGINE)
    with running_server(loaded.tokenizer, service=service) as server:
        server.wait(lambda: server.running.state.engine.state == "ready")
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


def _biased(loaded, liking: float) -> dict[str, float]:
    return {str(loaded.tokenizer.control_ids["<tool_call>"]): liking}


def _check_call(message) -> None:
    (call,) = message.tool_calls
    assert (message.content or "", call.function.name) == ("", "Weather")
    assert isinstance(call.function.parsed_arguments, Weather)


def _check_form(message) -> None:
    assert not message.tool_calls
    assert isinstance(message.parsed, Mood)
    assert json.loads(message.content) == message.parsed.model_dump()


WAYS = [(100, "tool_calls", _check_call), (-100, "stop", _check_form)]


@pytest.mark.parametrize(("liking", "reason", "check"), WAYS)
def test_either_is_given_whole(client, loaded, liking, reason, check):
    answer = client.chat.completions.parse(**ASKED, n=4, logit_bias=_biased(loaded, liking))
    for choice in answer.choices:
        assert choice.finish_reason == reason
        check(choice.message)


@pytest.mark.parametrize(("liking", "reason", "check"), WAYS)
def test_either_is_given_as_a_stream(client, loaded, liking, reason, check):
    with client.chat.completions.stream(**ASKED, logit_bias=_biased(loaded, liking)) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == reason
    check(choice.message)
    assert "".join(pieces) == (choice.message.content or "")
    assert (sum(map(bool, pieces)) > 3) == (reason == "stop")


def test_without_a_choice_no_tool_is_called(client, loaded):
    liked = _biased(loaded, 100)
    answer = client.chat.completions.parse(**ASKED, tool_choice="none", logit_bias=liked)
    _check_form(answer.choices[0].message)
