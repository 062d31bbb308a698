"""Masks against judges that know nothing of them: `json`, `jsonschema` and `re`."""

import json
import os
import re

import hypothesis
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import strategies as st

from configs import schema
from infer import constraints
from infer.constraints_spec import ConstraintSpec, forced_calls, or_calls
from qwen_jax import sampling, tokenizer, tokenizer_train, tool_calls

ROWS = 416  # the model's, more than the tokenizer has
# Some of its tokens end inside a character: of the emoji, the first three bytes are one.
CORPUS = [
    '{"name": "😀😁😂", "size": [1, 2.5, -3e4], "ok": true, "none": null} ',
    '{\n  "city": "Zürich",\n  "日本": "日本語",\n  "😃😄": "😅😆😇"\n} 2024-05-06 ',
    "<tool_call> a few words, to have a corpus of words and of numbers: false 10 100 ",
] * 3


WORDS = tokenizer_train.train_bpe(CORPUS, vocab_size=340)
EOS = (*WORDS.eos_ids, WORDS.control_ids["<|im_end|>"])


def _compile(spec: ConstraintSpec) -> constraints.Compiled:
    return constraints.compile(spec, tokenizer=WORDS, vocab_size=ROWS, eos_ids=EOS)


def _begin(kind: str, value="") -> constraints.Constraint:
    """An answer of a form, of which nothing is written."""
    value = json.dumps(value) if isinstance(value, dict | bool) else value
    return _compile(ConstraintSpec(kind, value)).start()


def _meets(value, wanted) -> bool:
    kind = jsonschema.Draft202012Validator
    return kind(wanted, format_checker=kind.FORMAT_CHECKER).is_valid(value)


def _allowed(constraint) -> np.ndarray:
    mask_W = constraint.mask()
    assert (mask_W.dtype, mask_W.shape) == (np.uint32, (-(-ROWS // 32),))
    return np.unpackbits(mask_W.view(np.uint8), bitorder="little").nonzero()[0]


ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "number": {"type": "integer"}},
    "required": ["street"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
# Each with a value that meets it, its keys in the schema's order, and one that does not.
SCHEMAS = [
    ({"type": "string"}, "日本 😀 \n \\ \" \x1f", 3),
    ({"type": "string", "minLength": 2, "maxLength": 3}, "é😀", "abcd"),
    ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}, "AB-12", "A-12"),
    ({"type": "string", "format": "date"}, "2024-05-06", "2024-13-06"),
    ({"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123"),
    ({"type": "integer", "minimum": -5, "exclusiveMaximum": 120}, 119, 120),
    ({"type": "integer", "multipleOf": 7}, 42, 43),
    ({"type": "number", "minimum": 0.5, "maximum": 1.5}, 1.25, 1.75),
    ({"type": "boolean"}, True, None),
    ({"type": ["null", "integer"]}, None, "x"),
    ({"enum": ["small", "größe", 3, None, {"a": [1]}]}, {"a": [1]}, "medium"),
    ({"const": "😀"}, "😀", "😁"),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]}, [None], [1]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, [1, 2], []),
    ({"prefixItems": [{"const": 1}, {"type": "string"}], "items": False, "minItems": 2,
      "type": "array"}, [1, "a"], [1, 2]),
    (ADDRESS, {"street": "Zürichstraße", "number": 3}, {"number": 3}),
    ({"type": "object", "properties": {"home": ADDRESS}, "required": ["home"]},
     {"home": {"street": ""}, "more": [{}]}, {"home": 3}),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1, "é": 2}, {"a": "1"}),
    ({"type": "object", "patternProperties": {"^x": {"type": "null"}},
      "additionalProperties": False}, {"x1": None}, {"y": None}),
    ({"allOf": [ADDRESS, {"required": ["number"]}]}, {"street": "a", "number": 1}, {"street": "a"}),
    (TREE, {"value": 1, "children": [{"value": 2, "children": []}]}, {"value": 1}),
    ({}, [1, {"a": None}], ...),
    (True, "x", ...),
]  # fmt: skip
PATTERNS = [
    (r"[a-c]{2,4}", "abca", "abcab"),
    (r"(é|😀)+x?", "é😀x", "x"),
    (r"[0-9]{4}-[0-9]{2}", "2024-05", "2024-5"),
    (r"[^a]\n.", "b\né", "a\nb"),
    (r"(?i)yes|no", "YeS", "maybe"),
    (r"^begin.{0,9}end$", "begin the end", "begin the"),
    (r"(ab|a)(bc|c)?", "abbc", "abcb"),
]


def _draw(forms, *, temperature: float, steps: int = 400) -> list[str]:
    """Answers of a model of random logits, all rows at once, as an engine draws them.

    Its taste for what closes things grows, so that answers end.
    """
    B, rng = 64, np.random.default_rng(1)  # one program for all tests; rows may be idle
    assert len(forms) <= B
    settings = sampling.settings(
        [schema.Sampling(temperature=temperature, seed=i) for i in range(B)], num_rows=B
    )
    closing = [WORDS.token_id(c) for c in '"}]'] + list(EOS)
    draw = jax.jit(sampling.draw, static_argnames="how")
    answers: list[list[int]] = [[] for _ in forms]
    open_rows = set(range(len(forms)))
    for step in range(steps):
        mask_BW = np.full((B, -(-ROWS // 32)), 2**32 - 1, np.uint32)
        for row in open_rows:
            mask_BW[row] = forms[row].mask()
        logits_BV = rng.normal(0, 3, (B, ROWS)).astype(np.float32)
        logits_BV[:, closing] += 0.2 * step
        drawn = draw(
            logits_BV,
            settings,
            how="full",
            positions_B=jnp.full(B, step),
            generated_B=jnp.full(B, step),
            eos_E=jnp.asarray(EOS),
            seen_BV=jnp.zeros((B, ROWS), bool),
            counts_BV=jnp.zeros((B, ROWS), jnp.int32),
            mask_BW=mask_BW,
        )
        for row, token in enumerate(np.asarray(drawn.tokens_B).tolist()):
            if row in open_rows:
                forms[row].accept(token)
                answers[row].append(token)
                open_rows -= {row} if token in EOS else set()
        if not open_rows:
            break
    assert not open_rows
    assert all(token < WORDS.vocab_size for answer in answers for token in answer)
    return [b"".join(map(WORDS.token_bytes, answer[:-1])).decode() for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_logits_give_valid_answers(temperature):
    forms = [_begin("json_schema", s) for s, _, _ in SCHEMAS for _ in range(2)]
    forms += [_begin("regex", pattern) for pattern, _, _ in PATTERNS for _ in range(2)]
    forms += [_begin("json_object") for _ in range(2)]
    texts = iter(_draw(forms, temperature=temperature))
    for wanted, _, _ in SCHEMAS:
        for _ in range(2):
            text = next(texts)
            assert _meets(json.loads(text), wanted), (wanted, text)
    for pattern, _, _ in PATTERNS:
        for _ in range(2):
            text = next(texts)
            assert re.fullmatch(pattern, text), (pattern, text)
    assert all(isinstance(json.loads(text), dict) for text in texts)


def _takes(constraint, text: str, *, special: tokenizer.Special = "text") -> bool:
    """Whether an answer may be this text, as the tokenizer spells it, and end there."""
    for token in WORDS.encode(text, special=special):
        if token not in _allowed(constraint):
            return False
        constraint.accept(token)
    return set(EOS) <= set(_allowed(constraint).tolist())


@pytest.mark.parametrize(("wanted", "good", "bad"), SCHEMAS, ids=str)
def test_schemas_take_what_meets_them_only(wanted, good, bad):
    assert _meets(good, wanted)
    for shape in ({}, {"separators": (",", ":")}, {"indent": 2}):
        text = json.dumps(good, ensure_ascii=False, **shape)
        assert _takes(_begin("json_schema", wanted), text), text
    if bad is not ...:
        assert not _meets(bad, wanted)
        assert not _takes(_begin("json_schema", wanted), json.dumps(bad))


@pytest.mark.parametrize(("pattern", "good", "bad"), PATTERNS)
def test_patterns_take_what_matches_only(pattern, good, bad):
    assert re.fullmatch(pattern, good)
    assert not re.fullmatch(pattern, bad)
    assert _takes(_begin("regex", pattern), good)
    assert not _takes(_begin("regex", pattern), bad)


@pytest.mark.parametrize(("pattern", "good", "bad"), PATTERNS)
def test_an_answer_may_end_where_it_matches(pattern, good, bad):
    """Along a random walk, after each token."""
    constraint, rng, data = _begin("regex", pattern), np.random.default_rng(0), b""
    for _ in range(60):
        allowed = _allowed(constraint)
        try:
            ends = bool(re.fullmatch(pattern, data.decode()))
        except UnicodeDecodeError:  # inside a character
            ends = False
        assert {*EOS} & {*allowed.tolist()} == ({*EOS} if ends else set())
        going_on = [token for token in allowed if token not in EOS]
        if not going_on:
            break
        token = int(rng.choice(going_on))
        constraint.accept(token)
        data += WORDS.token_bytes(token)


def test_control_tokens_and_rows_without_token_are_never_allowed():
    anything = _begin("regex", "(?s).*")
    allowed = set(_allowed(anything).tolist())
    control = set(WORDS.control_ids.values()) - set(EOS)
    assert not control & allowed
    assert max(allowed) < WORDS.vocab_size < ROWS
    assert set(EOS) <= allowed


@pytest.mark.parametrize("rows", [340, 352, 353, 500])
def test_masks_are_as_wide_as_the_model(rows):
    compiled = constraints.compile(
        ConstraintSpec("regex", "(?s).*"), tokenizer=WORDS, vocab_size=rows, eos_ids=EOS
    )
    mask_W = compiled.start().mask()
    assert (mask_W.dtype, mask_W.shape) == (np.uint32, (-(-rows // 32),))
    allowed = np.unpackbits(mask_W.view(np.uint8), bitorder="little").nonzero()[0]
    assert set(EOS) <= set(allowed.tolist()) <= set(range(WORDS.vocab_size))


def test_after_its_end_an_answer_can_only_end():
    """As for requests that ignore eos."""
    constraint = _begin("choice", ("", "a"))
    for _ in range(3):
        constraint.accept(EOS[1])
        assert set(_allowed(constraint).tolist()) == set(EOS)


def test_a_token_that_is_not_allowed_is_an_error():
    constraint = _begin("choice", ("yes", "no"))
    with pytest.raises(constraints.ConstraintError):
        constraint.accept(WORDS.token_id("x"))


def test_choices_are_taken_as_they_are():
    choices = ("a.b", "(x|y) [z]\\d", "<tool_call>", "日本\n", "")
    for text in choices:
        assert _takes(_begin("choice", choices), text)
    for text in ("aXb", "x", "日本"):
        assert not _takes(_begin("choice", choices), text)


def test_answers_of_one_form_do_not_touch_each_other():
    one, two = _begin("regex", "ab|cd"), _begin("regex", "ab|cd")
    one.accept(WORDS.token_id("a"))
    assert WORDS.token_id("c") in _allowed(two)
    assert WORDS.token_id("c") not in _allowed(one)


def test_forms_are_compiled_once():
    made = [_compile(ConstraintSpec("regex", "a+")) for _ in range(2)]
    assert made[0] is made[1]


def test_json_has_no_endless_white_space():
    constraint = _begin("json_object")
    constraint.accept(WORDS.token_id("{"))
    count = 0
    while space := [t for t in _allowed(constraint) if not WORDS.token_bytes(t).strip()]:
        constraint.accept(int(space[-1]))
        count += 1
    assert 1 <= count <= 41


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
        _begin(kind, value)
    assert str(caught.value).startswith(kind)
    assert "\n" not in str(caught.value)


def test_an_answer_that_could_never_end_is_refused():
    with pytest.raises(ValueError, match="needs an eos token"):
        constraints.compile(
            ConstraintSpec("json_object"), tokenizer=WORDS, vocab_size=ROWS, eos_ids=()
        )


# -- tool calls

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
    compiled = _compile(spec)
    forms = [compiled.start() for _ in range(4)]
    for text in _draw(forms, temperature=temperature):
        parsed = tool_calls.parse(text)
        assert (parsed.content, parsed.malformed) == ("", ())
        assert 1 <= len(parsed.calls) <= most
        for call in parsed.calls:
            assert name in (None, call.name)
            (tool,) = [t["function"] for t in TOOLS if t["function"]["name"] == call.name]
            jsonschema.validate(call.arguments, tool_calls.parameters(tool))


FORMS = [
    (ConstraintSpec("json_schema", json.dumps(ADDRESS)), '{"street": "a"}', '{"number": 1}'),
    (ConstraintSpec("json_object"), '{"a": 1}', "[1]"),
    (ConstraintSpec("regex", "[0-9]+"), "31", "a"),
    (ConstraintSpec("choice", ("yes", "no")), "no", "maybe"),
    (ConstraintSpec("grammar", 'start: "a" rest\nrest: /b+/'), "abb", "a"),
]


@pytest.mark.parametrize("count", ["one", "any"])
@pytest.mark.parametrize(("form", "good", "bad"), FORMS, ids=lambda value: str(value)[:30])
def test_an_answer_has_a_form_or_is_calls(form, good, bad, count):
    compiled = _compile(or_calls(form, TOOLS, count=count))

    def takes(text: str) -> bool:
        return _takes(compiled.start(), text, special="control")

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
    compiled = _compile(forced_calls(TOOLS))
    calls = [tool_calls.ToolCall("weather", {"city": "Zürich", "days": 2})] * 2
    constraint = compiled.start()
    for token in WORDS.encode(tool_calls.write("", calls), special="control"):
        assert token in _allowed(constraint), WORDS.token_bytes(token)
        constraint.accept(token)
    assert set(EOS) <= set(_allowed(constraint).tolist())


def test_tools_that_cannot_be_forced():
    with pytest.raises(ValueError, match="known tools: weather, now"):
        forced_calls(TOOLS, name="wether")
    with pytest.raises(ValueError, match="known tools: none"):
        forced_calls([])
    tool = {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}
    for spec in (forced_calls([tool]), or_calls(ConstraintSpec("json_object"), [tool])):
        with pytest.raises(ValueError, match=r"parameters of f\.properties\.a: Unimplemented"):
            _compile(spec)


# -- schemas that nobody thought of

_strings = st.fixed_dictionaries(
    {"type": st.just("string")},
    optional={"minLength": st.integers(0, 3), "maxLength": st.integers(0, 6)},
)
_integers = st.fixed_dictionaries(
    {"type": st.just("integer")},
    optional={"minimum": st.integers(-200, 50), "maximum": st.integers(0, 3000)},
)
_leaves = st.one_of(
    _strings,
    _integers,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^é+$"}]),
    st.lists(st.integers(-(10**9), 10**15) | st.text(max_size=3), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)


def _larger(inner):
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={"minItems": st.integers(0, 2), "maxItems": st.integers(0, 3)},
    )
    properties = st.dictionaries(st.text(max_size=3), inner, max_size=3)
    objects = properties.flatmap(
        lambda given: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(given),
                "required": st.lists(st.sampled_from([*given]), unique=True)
                if given
                else st.just([]),
                "additionalProperties": st.just(False) | inner,
            }
        )
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
    return st.one_of(arrays, objects, either)


_schemas = st.recursive(_leaves, _larger, max_leaves=6)


@hypothesis.settings(max_examples=120, deadline=None)
@hypothesis.given(wanted=_schemas, seed=st.integers(0, 2**16))
def test_answers_meet_any_schema(wanted, seed):
    try:
        constraint = _begin("json_schema", wanted)
    except ValueError as error:
        assert "Unsatisfiable" in str(error), wanted
        return
    rng, data, closing = np.random.default_rng(seed), b"", [WORDS.token_id(c) for c in '"}]']
    for step in range(600):
        allowed = _allowed(constraint).tolist()
        ends = [token for token in allowed if token in EOS]
        if ends and (step > 60 or rng.random() < 0.5):
            break
        liked = [token for token in allowed if token in closing]
        token = int(rng.choice(liked if liked and step > 60 else allowed))
        if token in EOS:
            break
        constraint.accept(token)
        data += WORDS.token_bytes(token)
    assert ends
    jsonschema.validate(json.loads(data.decode()), wanted)


@pytest.mark.slow
def test_the_real_vocabulary():
    """Set QWEN_JAX_TOKENIZER to the folder of Qwen2.5's tokenizer."""
    folder = os.environ.get("QWEN_JAX_TOKENIZER")
    if not folder:
        pytest.skip("QWEN_JAX_TOKENIZER names no folder of Qwen2.5's tokenizer")
    real = tokenizer.load(folder)
    rows, rng = -(-real.vocab_size // 256) * 256, np.random.default_rng(0)
    specs = [ConstraintSpec("json_schema", json.dumps(s)) for s, _, _ in SCHEMAS]
    specs += [ConstraintSpec("regex", pattern) for pattern, _, _ in PATTERNS]
    for spec, (wanted, _, _) in zip(specs, SCHEMAS + PATTERNS, strict=True):
        constraint = constraints.compile(
            spec, tokenizer=real, vocab_size=rows, eos_ids=real.eos_ids
        ).start()
        scores_V, ids = rng.normal(size=rows), []
        for step in range(300):
            bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[:rows]
            # Short tokens are liked more and more, those that close most.
            token = int(np.argmax(np.where(bits, np.roll(scores_V, 977 * step), -np.inf)))
            closing = [t for t in (*real.eos_ids, *(real.encode(c)[0] for c in '"}]'))
                       if step > 20 and bits[t]]  # fmt: skip
            token = closing[0] if closing else token
            constraint.accept(token)
            if token in real.eos_ids:
                break
            ids.append(token)
        text = b"".join(map(real.token_bytes, ids)).decode()
        if spec.kind == "regex":
            assert re.fullmatch(wanted, text)
        else:
            jsonschema.validate(json.loads(text), wanted)
