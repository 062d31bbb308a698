"""What no grammar can be made of is refused in one line that says where."""

import pytest

from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec
from tests.infer.constraints import constrained


@pytest.mark.parametrize(
    ("kind", "value", "where"),
    [
        ("regex", "ab(c", "character 2, near 'ab.c': unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"a\bb", "lookarounds"),
        ("grammar", "start: a", "unknown name"),
        ("grammar", 'start: "a"\nb: (', "2"),
        ("grammar", "start: <nope>", "unknown special token"),
        ("grammar", "start[temperature=0.3]: /a/", "temperature"),
        ("grammar", "start: a\na: start", "no answer can begin"),
        ("json_schema", False, "no answer meets"),
        ("json_schema", {"type": "strin"}, "Invalid type: strin"),
        ("json_schema", {"properties": {"a": {"items": {"not": {}}}}},
         "json_schema.properties.a.items: Unimplemented"),
        ("json_schema", {"anyOf": [{}, {"type": "array", "uniqueItems": True}]}, r"anyOf\[1\]"),
        ("json_schema", {"$defs": {"x": {"pattern": "a(b"}}, "items": {"$ref": "#/$defs/x"}},
         "json_schema.items: regular expression, character 1"),
        ("json_schema", {"$ref": "#/$defs/x"}, "does not exist"),
        ("json_schema", {"$ref": "https://example.com/x"}, "fetch"),
        ("json_schema", {"type": "string", "format": "colour"}, "Unknown format"),
        ("json_schema", {"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented"),
        ("json_schema", {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9941}]}, "multipleOf"),
        ("json_schema", {"allOf": [{"pattern": f"a{i}"} for i in range(30)]}, "30 patterns"),
        ("json_schema", {"enum": [2**53 + 1]}, "9007199254740993 is above"),
        ("json_schema", {"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ("json_schema", '{"items":' * 400 + "{}" + "}" * 400, "recursion limit"),
        ("json_schema", '{"items":' * 950 + "{}" + "}" * 950, "recursion limit|too deeply"),
        ("json_schema", {"$defs": 3, "anyOf": 3, "properties": 3, "allOf": "x"}, "must be an"),
        ("json_schema", {"const": "\ud800"}, "hex escape"),
        ("json_schema", '{"items":' * 9999 + "{}" + "}" * 9999, "too deeply"),
        ("json_schema", '{"type": ', "not JSON: Expecting value: line 1 column 10"),
        ("json_schema", "[]", "an object or a boolean|a JSON object or a boolean"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(kind, value, where):
    with pytest.raises(ValueError, match=where) as caught:
        constrained.begin(kind, value)
    assert str(caught.value).startswith(kind)
    assert "\n" not in str(caught.value)


def test_an_answer_that_could_never_end_is_refused():
    with pytest.raises(ValueError, match="needs an eos token"):
        constraints.compile(
            ConstraintSpec("json_object"),
            tokenizer=constrained.WORDS,
            vocab_size=constrained.ROWS,
            eos_ids=(),
        )
