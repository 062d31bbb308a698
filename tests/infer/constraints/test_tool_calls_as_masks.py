"""Answers that are calls of tools, or may be."""

import json

import jsonschema
import pytest

from infer.constraints.spec import ConstraintSpec, forced_calls, or_calls
from qwen_jax.text.chat import tool_calls
from tests.infer.constraints import constrained

ADDRESS = json.dumps(constrained.ADDRESS)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "größe", "parameters": {"properties": {}}}},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "count", "most"), [(None, "any", 99), (None, "one", 1), ("weather", "any", 1)]
)
def test_forced_calls_are_valid(temperature, name, count, most):
    spec = forced_calls(TOOLS, name=name, count=count)
    compiled = constrained.compiled(spec)
    forms = [compiled.start() for _ in range(4)]
    for text in constrained.draw(forms, temperature=temperature):
        parsed = tool_calls.parse(text)
        assert (parsed.content, parsed.malformed) == ("", ())
        assert 1 <= len(parsed.calls) <= most
        for call in parsed.calls:
            assert name in (None, call.name)
            (tool,) = [t["function"] for t in TOOLS if t["function"]["name"] == call.name]
            jsonschema.validate(call.arguments, tool_calls.parameters(tool))


FORMS = [
    (ConstraintSpec("json_schema", ADDRESS), '{"street": "a"}', '{"number": 1}'),
    (ConstraintSpec("json_object"), '{"a": 1}', "[1]"),
    (ConstraintSpec("regex", "[0-9]+"), "31", "a"),
    (ConstraintSpec("choice", ("yes", "no")), "no", "maybe"),
    (ConstraintSpec("grammar", 'start: "a" rest\nrest: /b+/'), "abb", "a"),
]


@pytest.mark.parametrize("count", ["one", "any"])
@pytest.mark.parametrize(("form", "good", "bad"), FORMS, ids=lambda value: str(value)[:30])
def test_an_answer_has_a_form_or_is_calls(form, good, bad, count):
    compiled = constrained.compiled(or_calls(form, TOOLS, count=count))

    def takes(text: str) -> bool:
        return constrained.takes(compiled.start(), text, special="control")

    call = tool_calls.ToolCall("weather", {"city": "Zürich"})
    wrong = tool_calls.ToolCall("weather", {"days": 2})
    calls = tool_calls.write("", [call])
    assert takes(good) and not takes(bad)
    assert takes(calls) and not takes(tool_calls.write("", [wrong]))
    assert takes(tool_calls.write("", [call, call])) == (count == "any")
    assert not takes(tool_calls.write("", [call, wrong]))
    assert not takes(tool_calls.write(good, [call]))
    assert not takes(calls + good)


def test_calls_are_forced_as_the_template_writes_them():
    compiled = constrained.compiled(forced_calls(TOOLS))
    calls = [tool_calls.ToolCall("weather", {"city": "Zürich", "days": 2})] * 2
    constraint = compiled.start()
    for token in constrained.WORDS.encode(tool_calls.write("", calls), special="control"):
        assert token in constrained.allowed(constraint), constrained.WORDS.token_bytes(token)
        constraint.accept(token)
    assert set(constrained.EOS) <= set(constrained.allowed(constraint).tolist())


def test_tools_that_cannot_be_forced():
    with pytest.raises(ValueError, match="known tools: weather, now"):
        forced_calls(TOOLS, name="wether")
    with pytest.raises(ValueError, match="known tools: none"):
        forced_calls([])
    tool = {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}
    for spec in (forced_calls([tool]), or_calls(ConstraintSpec("json_object"), [tool])):
        with pytest.raises(ValueError, match=r"parameters of f\.properties\.a: Unimplemented"):
            constrained.compiled(spec)
