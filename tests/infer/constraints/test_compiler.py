"""Answers bound to JSON, patterns and choices, before judges that know nothing of masks."""

import json
import os
import re

import hypothesis
import jsonschema
import numpy as np
import pytest
from hypothesis import strategies as st

from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec
from qwen_jax.text.tokenizer import tokenizer
from tests.infer.constraints import constrained


def _meets(value, wanted) -> bool:
    kind = jsonschema.Draft202012Validator
    return kind(wanted, format_checker=kind.FORMAT_CHECKER).is_valid(value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_logits_give_valid_answers(temperature):
    forms = [
        constrained.begin("json_schema", s) for s, _, _ in constrained.SCHEMAS for _ in range(2)
    ]
    forms += [
        constrained.begin("regex", pattern)
        for pattern, _, _ in constrained.PATTERNS
        for _ in range(2)
    ]
    forms += [constrained.begin("json_object") for _ in range(2)]
    texts = iter(constrained.draw(forms, temperature=temperature))
    for wanted, _, _ in constrained.SCHEMAS:
        for _ in range(2):
            text = next(texts)
            assert _meets(json.loads(text), wanted), (wanted, text)
    for pattern, _, _ in constrained.PATTERNS:
        for _ in range(2):
            text = next(texts)
            assert re.fullmatch(pattern, text), (pattern, text)
    assert all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(("wanted", "good", "bad"), constrained.SCHEMAS, ids=str)
def test_schemas_take_what_meets_them_only(wanted, good, bad):
    assert _meets(good, wanted)
    for shape in ({}, {"separators": (",", ":")}, {"indent": 2}):
        text = json.dumps(good, ensure_ascii=False, **shape)
        assert constrained.takes(constrained.begin("json_schema", wanted), text), text
    if bad is not ...:
        assert not _meets(bad, wanted)
        assert not constrained.takes(constrained.begin("json_schema", wanted), json.dumps(bad))


@pytest.mark.parametrize(("pattern", "good", "bad"), constrained.PATTERNS)
def test_patterns_take_what_matches_only(pattern, good, bad):
    assert re.fullmatch(pattern, good)
    assert not re.fullmatch(pattern, bad)
    assert constrained.takes(constrained.begin("regex", pattern), good)
    assert not constrained.takes(constrained.begin("regex", pattern), bad)


@pytest.mark.parametrize(("pattern", "good", "bad"), constrained.PATTERNS)
def test_an_answer_may_end_where_it_matches(pattern, good, bad):
    """Along a random walk, after each token."""
    constraint, rng, data = constrained.begin("regex", pattern), np.random.default_rng(0), b""
    for _ in range(60):
        allowed = constrained.allowed(constraint)
        try:
            ends = bool(re.fullmatch(pattern, data.decode()))
        except UnicodeDecodeError:  # inside a character
            ends = False
        assert {*constrained.EOS} & {*allowed.tolist()} == ({*constrained.EOS} if ends else set())
        going_on = [token for token in allowed if token not in constrained.EOS]
        if not going_on:
            break
        token = int(rng.choice(going_on))
        constraint.accept(token)
        data += constrained.WORDS.token_bytes(token)


def test_choices_are_taken_as_they_are():
    choices = ("a.b", "(x|y) [z]\\d", "<tool_call>", "日本\n", "")
    for text in choices:
        assert constrained.takes(constrained.begin("choice", choices), text)
    for text in ("aXb", "x", "日本"):
        assert not constrained.takes(constrained.begin("choice", choices), text)


def test_json_has_no_endless_white_space():
    constraint = constrained.begin("json_object")
    constraint.accept(constrained.WORDS.token_id("{"))
    count = 0
    while space := [
        t for t in constrained.allowed(constraint) if not constrained.WORDS.token_bytes(t).strip()
    ]:
        constraint.accept(int(space[-1]))
        count += 1
    assert 1 <= count <= 41


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
        constraint = constrained.begin("json_schema", wanted)
    except ValueError as error:
        assert "Unsatisfiable" in str(error), wanted
        return
    rng, data, closing = (
        np.random.default_rng(seed),
        b"",
        [constrained.WORDS.token_id(c) for c in '"}]'],
    )
    for step in range(600):
        allowed = constrained.allowed(constraint).tolist()
        ends = [token for token in allowed if token in constrained.EOS]
        if ends and (step > 60 or rng.random() < 0.5):
            break
        liked = [token for token in allowed if token in closing]
        token = int(rng.choice(liked if liked and step > 60 else allowed))
        if token in constrained.EOS:
            break
        constraint.accept(token)
        data += constrained.WORDS.token_bytes(token)
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
    specs = [ConstraintSpec("json_schema", json.dumps(s)) for s, _, _ in constrained.SCHEMAS]
    specs += [ConstraintSpec("regex", pattern) for pattern, _, _ in constrained.PATTERNS]
    for spec, (wanted, _, _) in zip(specs, constrained.SCHEMAS + constrained.PATTERNS, strict=True):
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
