"""A small vocabulary, forms of answers over it, and a random model that is bound to them."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from configs.sampling import SamplingParams
from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec
from qwen_jax.decode import sampling
from qwen_jax.text import tokenizer_training
from qwen_jax.text.tokenizer.tokenizer import Special

ROWS = 416  # the model's, more than the tokenizer has
# Some of its tokens end inside a character: of the emoji, the first three bytes are one.
CORPUS = [
    '{"name": "😀😁😂", "size": [1, 2.5, -3e4], "ok": true, "none": null} ',
    '{\n  "city": "Zürich",\n  "日本": "日本語",\n  "😃😄": "😅😆😇"\n} 2024-05-06 ',
    "<tool_call> a few words, to have a corpus of words and of numbers: false 10 100 ",
] * 3
WORDS = tokenizer_training.train_bpe(CORPUS, vocab_size=340)
EOS = (*WORDS.eos_ids, WORDS.control_ids["<|im_end|>"])

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


def compiled(spec: ConstraintSpec) -> constraints.Compiled:
    return constraints.compile(spec, tokenizer=WORDS, vocab_size=ROWS, eos_ids=EOS)


def begin(kind: str, value="") -> constraints.Constraint:
    """An answer of a form, of which nothing is written."""
    value = json.dumps(value) if isinstance(value, dict | bool) else value
    return compiled(ConstraintSpec(kind, value)).start()


def allowed(constraint) -> np.ndarray:
    mask_W = constraint.mask()
    assert (mask_W.dtype, mask_W.shape) == (np.uint32, (-(-ROWS // 32),))
    return np.unpackbits(mask_W.view(np.uint8), bitorder="little").nonzero()[0]


def takes(constraint, text: str, *, special: Special = "text") -> bool:
    """Whether an answer may be this text, as the tokenizer spells it, and end there."""
    for token in WORDS.encode(text, special=special):
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return set(EOS) <= set(allowed(constraint).tolist())


def draw(forms, *, temperature: float, steps: int = 400) -> list[str]:
    """Answers of a model of random logits, all rows at once, as an engine draws them.

    Its taste for what closes things grows, so that answers end.
    """
    B, rng = 64, np.random.default_rng(1)  # one program for all tests; rows may be idle
    assert len(forms) <= B
    settings = sampling.settings(
        [SamplingParams(temperature=temperature, seed=i) for i in range(B)], num_rows=B
    )
    closing = [WORDS.token_id(c) for c in '"}]'] + list(EOS)
    program = jax.jit(sampling.draw, static_argnames="sampler")
    answers: list[list[int]] = [[] for _ in forms]
    open_rows = set(range(len(forms)))
    for step in range(steps):
        mask_BW = np.full((B, -(-ROWS // 32)), 2**32 - 1, np.uint32)
        for row in open_rows:
            mask_BW[row] = forms[row].mask()
        logits_BV = rng.normal(0, 3, (B, ROWS)).astype(np.float32)
        logits_BV[:, closing] += 0.2 * step
        drawn = program(
            logits_BV,
            settings,
            sampler="full",
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
