"""The real `openai` client is content with the server."""

import base64
import json

import numpy as np
import openai
import pytest

from tests.infer.server.conftest import TEXT, Engine, running_server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_is_answered_with_its_usage(client):
    answer = client.chat.completions.create(**CHAT, max_tokens=20)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert TEXT.startswith(choice.message.content) and len(choice.message.content) > 5
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    assert answer.model == "tiny" and answer.id.startswith("chatcmpl-")


def test_stream_is_the_same_text_in_pieces(client):
    whole = client.chat.completions.create(**CHAT, max_tokens=40)
    events = list(
        client.chat.completions.create(
            **CHAT, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert sum(map(bool, pieces)) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage == whole.usage
    assert all(event.usage is None for event in events[:-1])


def test_several_choices_come_whole_and_as_a_stream(client):
    answer = client.chat.completions.create(**CHAT, n=3, max_tokens=9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 27
    texts = ["", "", ""]
    for event in client.chat.completions.create(**CHAT, n=3, max_tokens=9, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_completions_of_several_prompts(client):
    answer = client.completions.create(model="tiny", prompt=["a", "b c"], max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    texts = ["", ""]
    for event in client.completions.create(
        model="tiny", prompt=["a", "b c"], max_tokens=5, stream=True
    ):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_stop_strings_and_logprobs(client):
    answer = client.chat.completions.create(
        **CHAT, max_tokens=60, stop=["fox"], logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.content == TEXT[: TEXT.index("fox")]
    assert choice.finish_reason == "stop"
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_embeddings_as_numbers_and_as_base64(client):
    texts = [f"text {number}" for number in range(40)]  # more than the engine gets together
    numbers = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    coded = client.embeddings.create(model="tiny", input=texts, encoding_format="base64")
    assert [row.index for row in numbers.data] == list(range(40))
    for row, code in zip(numbers.data, coded.data, strict=True):
        values = np.frombuffer(base64.b64decode(code.embedding), np.float32)
        np.testing.assert_array_equal(np.float32(row.embedding), values)
    assert numbers.usage.prompt_tokens == coded.usage.prompt_tokens > 40


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'large' is not served here; 'tiny' is"):
        client.models.retrieve("large")


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ({**CHAT, "model": "large"}, openai.NotFoundError, "not served here"),
        ({**CHAT, "temperature": -1}, openai.BadRequestError, "temperature=-1"),
        ({**CHAT, "max_tokens": 10**6}, openai.BadRequestError, "max_length"),
        ({**CHAT, "messages": []}, openai.BadRequestError, "messages"),
        ({**CHAT, "n": 129}, openai.BadRequestError, "n=129"),
        (
            {**CHAT, "extra_body": {"mirostat": 2}},
            openai.BadRequestError,
            "'mirostat' is not a known parameter",
        ),
    ],
)
def test_mistakes_are_the_clients_errors(client, body, kind, message):
    with pytest.raises(kind, match=message) as caught:
        client.chat.completions.create(**body)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_mistake_in_a_stream_has_its_status_too(client):
    with pytest.raises(openai.BadRequestError, match="max_length"):
        client.chat.completions.create(**CHAT, max_tokens=10**6, stream=True)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLING = (
    "I look it up.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call>"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def caller(words):
    """A client of a server whose model calls tools."""
    engine = Engine(words)
    tokens = [*words.encode(CALLING), words.eos_ids[0]]
    engine.answer = lambda request: tokens
    with running_server(words, engine=engine) as server:
        server.wait(lambda: server.running.state.engine.state == "ready")
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


def test_calls_of_tools(caller):
    answer = caller.chat.completions.create(**CHAT, tools=TOOLS, max_tokens=400)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    functions = [call.function for call in choice.message.tool_calls]
    assert [json.loads(f.arguments) for f in functions] == [
        {"city": "Oslo"},
        {"city": "</tool_call>"},
    ]


def test_calls_of_tools_in_a_stream(caller):
    with caller.chat.completions.stream(**CHAT, tools=TOOLS, max_tokens=400, n=2) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look it up."
        functions = [call.function for call in choice.message.tool_calls]
        assert [f.name for f in functions] == ["weather", "weather"]
        assert json.loads(functions[1].arguments) == {"city": "</tool_call>"}
        assert len({call.id for call in choice.message.tool_calls}) == 2


def test_without_tools_the_same_text_is_text(caller):
    answer = caller.chat.completions.create(**CHAT, max_tokens=400)
    assert answer.choices[0].message.content == CALLING
    assert answer.choices[0].finish_reason == "stop"
