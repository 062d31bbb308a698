import json
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from qwen_jax.text.chat import encoding as chat
from qwen_jax.text.chat import tool_calls
from qwen_jax.text.chat.tool_calls import ToolCall

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OSLO = ToolCall("weather", {"city": "Oslo"})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
tagged = st.sampled_from(["</tool_call>", "<tool_call>", '\\"', "é\n"])
calls = st.builds(
    ToolCall,
    st.text(min_size=1, max_size=5),
    st.dictionaries(st.text(max_size=4), json_values | tagged, max_size=3),
)
# What an answer may be made of, right and wrong.
fragments = st.sampled_from(
    ["<tool_call>", "</tool_call>", "\n", " ", "<", "tool_call>", "Hello", '"', "\\", "{", "}"]
    + [WEATHER, '{"name": "f", "arguments": {}}', "é"]
)
answers = st.lists(fragments, max_size=12).map("".join)


def _pushed(text: str, cuts: list[int]) -> tuple[list, list]:
    """Pieces, neighbouring texts joined, and what was malformed, of an answer cut in places."""
    parser, pieces, start = tool_calls.Parser(), [], 0
    for end in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        pieces += parser.push(text[start:end])
        start = end
    joined: list = []
    for piece in pieces + parser.finish():
        assert piece != ""
        both = joined and isinstance(piece, str) and isinstance(joined[-1], str)
        joined = [*joined[:-1], joined[-1] + piece] if both else [*joined, piece]
    return joined, parser.malformed


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("No call.", "No call.", 0),
        (WEATHER, "", 1),
        (f"Looking.\n{WEATHER}", "Looking.", 1),
        (f"Looking.\n\n{WEATHER}\n{WEATHER}\n", "Looking.\n", 2),
        (f"{WEATHER} {WEATHER}", "", 2),
        (f"{WEATHER}\nDone.\n{WEATHER}", "\nDone.", 2),
        ('<tool_call>{"arguments":{},"name":"f"}</tool_call>', "", 1),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>', "", 1),
        (f"The tag <tool_call> begins one:\n{WEATHER}", "The tag <tool_call> begins one:", 1),
        (f'<tool_call>\n{{"name": "\n{WEATHER}', '<tool_call>\n{"name": "', 1),
    ],
)
def test_text_and_calls(text, content, calls):
    parsed = tool_calls.parse(text)
    assert (parsed.content, len(parsed.calls)) == (content, calls)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "f", "arguments": {}', "not JSON"),
        ('{"name": "f", "arguments": {"a": 1e400}}', "no finite number"),
        ('{"name": "f", "arguments": {"a": "\n"}}', "not JSON"),
        ('{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "}}", "not JSON"),
        ('{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}", "not JSON"),
        ('{"name": "f"}', "name and arguments"),
        ('{"name": "f", "arguments": {}, "id": 3}', "name and arguments"),
        ('[{"name": "f", "arguments": {}}]', "name and arguments"),
        ('{"name": 3, "arguments": {}}', "name"),
        ('{"name": "f", "arguments": "{}"}', "arguments are no object"),
        ("{'name': 'f', 'arguments': {}}", '"\'" cannot follow'),
        ("NaN", "'N' cannot follow"),
    ],
)
def test_malformed_calls_stay_text(body, reason):
    block = f"<tool_call>\n{body}\n</tool_call>"
    parsed = tool_calls.parse(f"Look.\n{block}\n{WEATHER}")
    assert (parsed.content, parsed.calls) == (f"Look.\n{block}", (OSLO,))
    (malformed,) = parsed.malformed
    assert reason in malformed.reason
    assert block.startswith(malformed.text)


def test_a_call_without_end_stays_text():
    text = WEATHER.removesuffix("</tool_call>")
    parsed = tool_calls.parse(text + "</tool_")
    assert (parsed.content, parsed.calls) == (text + "</tool_", ())
    assert "no </tool_call>" in parsed.malformed[0].reason


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(text=answers, cuts=st.lists(st.integers(0, 500), max_size=8))
def test_pieces_are_the_whole(text, cuts):
    """However an answer is cut, and character by character."""
    whole = _pushed(text, [])
    assert _pushed(text, cuts) == whole
    assert _pushed(text, list(range(len(text)))) == whole
    parsed = tool_calls.parse(text)
    assert parsed.content == "".join(piece for piece in whole[0] if isinstance(piece, str))
    if not parsed.calls:
        assert parsed.content == text


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(content=st.text(max_size=8), made=st.lists(calls, max_size=3))
def test_what_is_written_is_read(content, made):
    text = tool_calls.write(content, made)
    assert tool_calls.parse(text) == tool_calls.Parsed(content, tuple(made))
    for call in made:
        function = tool_calls.to_openai(call)["function"]
        assert ToolCall(function["name"], json.loads(function["arguments"])) == call


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    texts=st.lists(answers | st.sampled_from(["name", "f", "arguments"]), max_size=8),
    separators=st.sampled_from([(", ", ": "), (",", ":"), (",\n", ":\n")]),
)
def test_json_is_no_call_whatever_its_strings_are(texts, separators):
    pairs = dict(zip(texts, texts[1:], strict=False))
    for value in (texts, pairs, [pairs, texts]):
        text = json.dumps(value, ensure_ascii=False, separators=separators)
        assert tool_calls.split(text) == (text, [])


def test_text_comes_as_soon_as_it_is_certain():
    parser = tool_calls.Parser()
    assert parser.push("Look <tool") == ["Look "]
    assert parser.push("s> here\n") == ["<tools> here"]
    assert parser.push("<tool_ca") == []
    assert parser.push('ll>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call') == []
    assert parser.push(">\n") == [OSLO]
    assert parser.push("So") == ["\nSo"]
    assert parser.finish() == []


def test_the_chat_template_writes_the_same():
    content, made = "Looking.", [OSLO, ToolCall("f_2", {"a": [1.5, None, "é"], "b": {}})]
    message = {
        "role": "assistant",
        "content": content,
        "tool_calls": [tool_calls.to_openai(call) for call in made],
    }
    turns = [{"role": "user", "content": "Weather?"}, message]
    assert f"<|im_start|>assistant\n{tool_calls.write(content, made)}<|im_end|>" in chat.render(
        turns
    )


def test_openai_entries():
    content, entries = tool_calls.split(f"Look.\n{WEATHER}\n{WEATHER}")
    assert content == "Look."
    assert len({entry["id"] for entry in entries}) == 2
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert [entry["function"] for entry in entries] == [function, function]
    assert tool_calls.to_openai(OSLO, id="call_1")["id"] == "call_1"


@pytest.mark.parametrize(
    "text", ["<tool_call>" * 20_000, '<tool_call>"' * 20_000, '<tool_call>"\\' * 20_000]
)
def test_time_is_linear(text):
    begin = time.process_time()
    assert tool_calls.parse(text).content == text
    assert time.process_time() - begin < 10


def test_parameters_are_of_an_object():
    assert tool_calls.parameters({"name": "f"})["additionalProperties"] is False
    assert tool_calls.parameters({"name": "f", "parameters": {}}) == {"type": "object"}
    with pytest.raises(ValueError, match="parameters of f .* 'object' is needed"):
        tool_calls.parameters({"name": "f", "parameters": {"type": "string"}})
