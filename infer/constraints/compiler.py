"""Masks of the tokens that a JSON schema, a regular expression or a grammar allows next.

The masks come from llguidance: of the libraries tried it alone needs no torch (xgrammar brings
torch, transformers and triton), knows recursive schemas and grammars (outlines-core turns all into
one finite automaton, built over the whole vocabulary before the first token), and refuses schema
keywords that it does not honour instead of ignoring them.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import llguidance
import numpy as np

from infer.constraints.spec import ConstraintSpec
from infer.engine.request import Constraint
from qwen_jax.text.chat import tool_calls
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

# Between the parts of JSON: a space, or a line break and an indentation. An unbounded run of spaces
# is JSON too, and a model that has begun one may never end it.
WHITESPACE = r"\x20|\n[\x20\t]{0,40}"
_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
_MOST_REMAINDERS = 20_000  # a tenth of a second; ten times as many take a hundred times as long
_MOST_PATTERNS = 10  # a twentieth of a second; with 16 a minute
_LARGEST = 2**53
_DEEPEST_PATH = 16  # steps of it that are looked for, and said
_TEMPERATURE = re.compile(r"\[[^\]\n]*\btemperature\s*=")
_OBJECT = json.dumps({"type": "object"})

# Where a schema holds schemas: under these keys themselves, as lists, or by name.
_NESTED = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


class ConstraintError(RuntimeError):
    """A grammar that was compiled proved too much for the library's limits, or for the vocabulary.

    The answer cannot go on; neither is it complete.
    """


@dataclass(frozen=True)
class Compiled:
    """A form of answers over one vocabulary, made once and started for each answer."""

    matcher: llguidance.LLMatcher
    vocab_size: int

    def start(self) -> Constraint:
        """The constraint's state at the beginning of an answer."""
        return _State(self.matcher.deep_copy(), vocab_size=self.vocab_size)


class _State:
    """`infer.engine.request.Constraint`: where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, *, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        """Bits of the allowed tokens, uint32 [ceil(V / 32)]: eos ones only where an answer may end.

        After an eos token only eos tokens are allowed. Raises `ConstraintError`.
        """
        words_W = np.frombuffer(self._matcher.compute_bitmask(), np.dtype("<u4"))
        self._check()
        # The library counts one token more than there are: where V is a multiple of 32, a word.
        words_W = words_W[: self._num_words]
        assert words_W.shape == (self._num_words,), words_W.shape
        if not words_W.any():
            raise ConstraintError("no token of the vocabulary can continue the answer")
        return words_W

    def accept(self, token: int) -> None:
        """Raises `ConstraintError` for a token that the mask did not allow."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(_first_line(self._matcher.get_error()))


@functools.lru_cache(maxsize=256)
def compile(
    spec: ConstraintSpec, *, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]
) -> Compiled:
    """Compiles a form of answers for a model with `vocab_size` rows; kept for the next request.

    Control tokens and rows without a token are never allowed, but for eos_ids at the end and those
    control tokens that a grammar names (`<tool_call>`, as Lark knows them in llguidance). Raises
    `ValueError` that says where for what is malformed, what can never be met and what llguidance
    does not honour: schema keywords such as `not` or `uniqueItems`, look-around and back references
    in regular expressions. With jobs of many schemas each costs milliseconds, large ones more.
    """
    library = _library(tokenizer, vocab_size, eos_ids)
    specs = [spec] if spec.alternative is None else [spec, spec.alternative]
    control = tokenizer.control_ids
    try:
        grammar = _any_of([_grammar(each, library=library, control=control) for each in specs])
    except RecursionError:
        raise ValueError(f"{spec.kind}: it is nested too deeply") from None
    compiled = Compiled(llguidance.LLMatcher(library, grammar, log_level=0), vocab_size)
    if compiled.matcher.is_error():
        raise ValueError(f"{spec.kind}: {_readable(compiled.matcher.get_error())}")
    try:
        compiled.start().mask()
    except ConstraintError as error:
        raise ValueError(f"{spec.kind}: no answer can begin: {error}") from None
    return compiled


@functools.lru_cache(maxsize=4)
def _library(
    tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    if not eos_ids:
        raise ValueError("structured output needs an eos token, or an answer could never end")
    if tokenizer.backend.has_dummy_prefix:
        raise ValueError(
            "structured output needs a tokenizer that writes text as it is; this SentencePiece "
            "model puts a space before it"
        )
    vocabulary = _Vocabulary(tokenizer, vocab_size, eos_ids)
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(vocabulary), n_vocab=vocab_size, eos_token=list(eos_ids)
    )


class _Vocabulary:
    """A tokenizer as llguidance looks at it. Rows without text have no bytes: never allowed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        control = {token.id for token in tokenizer.control_tokens}
        self.special_token_ids = sorted(control | set(eos_ids))
        self.eos_token_id, self.bos_token_id = eos_ids[0], None
        texts = (tokenizer.token_bytes(i) for i in range(vocab_size))
        # llguidance marks control tokens by the byte 0xFF, which no UTF-8 text holds.
        self.tokens = [b"" if text.startswith(b"\xff") else text for text in texts]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _any_of(grammars: Sequence[str]) -> str:
    """The answers that one of these grammars takes, each llguidance's JSON of a single one."""
    if len(grammars) == 1:
        return grammars[0]
    parts = [json.loads(grammar)["grammars"][0] for grammar in grammars]
    named = [{**part, "name": f"part_{number}"} for number, part in enumerate(parts)]
    start = " | ".join(f"@{part['name']}" for part in named)
    return json.dumps({"grammars": [{"lark_grammar": f"start: {start}"}, *named]})


def _grammar(
    spec: ConstraintSpec, *, library: llguidance.LLTokenizer, control: dict[str, int]
) -> str:
    """A spec without its alternative, as llguidance takes it."""
    value = spec.value
    if spec.kind in ("json_schema", "json_object"):
        return _of_schema(value or _OBJECT, name=spec.kind, library=library)
    if spec.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if spec.kind == "choice":
        choices = "|".join(map(_escaped, value))
        return llguidance.LLMatcher.grammar_from_regex(f"(?:{choices})")
    if spec.kind == "grammar":
        return _of_lark(value)
    return _of_calls(spec, library=library, control=control)


def _of_lark(text: str) -> str:
    if _TEMPERATURE.search(text):
        raise ValueError("grammar: temperature in a rule is not supported; set the request's")
    return _from_lark(text)


def _from_lark(text: str) -> str:
    # `LLMatcher.grammar_from_lark` gives the text itself, which cannot be one of several grammars.
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _of_schema(text: str, *, name: str, library: llguidance.LLTokenizer) -> str:
    """The grammar of a schema's JSON. Raises `ValueError` with the path of what it refuses."""
    schema = json.loads(text)
    if schema is False:
        raise ValueError(f"{name}: no answer meets the schema false")
    schema = {} if schema is True else schema
    _check_cost(schema, name=name)
    message = _refusal(schema, library)
    if message:
        path, message = _innermost(schema, message, library)
        raise ValueError(f"{name}{path}: {_readable(message)}")
    return _schema_grammar(schema)


def _schema_grammar(schema: dict[str, Any]) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)


def _refusal(schema: Any, library: llguidance.LLTokenizer) -> str:
    """llguidance's error message for a schema; empty if it accepts the schema."""
    try:
        return llguidance.LLMatcher.validate_grammar(_schema_grammar(schema), library)
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return str(error)


def _innermost(
    root: dict[str, Any], message: str, library: llguidance.LLTokenizer
) -> tuple[str, str]:
    """Path and message of the innermost schema that is refused by itself; "" is the whole."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}

    def is_cause(part: Any) -> bool:
        return isinstance(part, dict) and _refusal({**shared, **part}, library) == message

    path, schema = "", root
    for _ in range(_DEEPEST_PATH):
        inner = next((found for found in _parts(schema) if is_cause(found[1])), None)
        if inner is None:
            break
        path, schema = path + inner[0], inner[1]
    return path, message


def _check_cost(schema: dict[str, Any], *, name: str) -> None:
    """Refuses schemas that llguidance would round, or would need minutes to compile.

    Its automaton of multiples has a state for each remainder of the least common multiple of all
    multipleOf that meet; whether patterns that meet leave anything takes twice as long with each.
    """
    entries = list(_entries(schema))
    numbers = [(key, v) for key, v in entries if type(v) in (int, float) and math.isfinite(v)]
    for _, number in numbers:
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise ValueError(
                f"{name}: {number} is above {_LARGEST}, up to which a double holds all integers; "
                "use smaller ones, or a string with a pattern"
            )
    together = _common_multiple([v for key, v in numbers if key == "multipleOf"])
    if together > _MOST_REMAINDERS:
        raise ValueError(
            f"{name}: all multipleOf have the least common multiple {together} (without trailing "
            f"zeros), above {_MOST_REMAINDERS}; use smaller ones"
        )
    patterns = {value for key, value in entries if key == "pattern" and isinstance(value, str)}
    meeting = any(key == "allOf" or _narrows_another(value) for key, value in entries)
    if meeting and len(patterns) > _MOST_PATTERNS:
        raise ValueError(
            f"{name}: {len(patterns)} patterns in a schema with allOf, or with keywords beside "
            f"$ref, where they may meet; at most {_MOST_PATTERNS}"
        )


def _common_multiple(values: list[int | float]) -> int:
    """Without trailing zeros, which cost no states, and with all decimal places as digits."""
    found = [Decimal(str(value)) for value in values]
    places = max((0, *(-number.as_tuple().exponent for number in found)))
    together = math.lcm(*(int(number.scaleb(places)) for number in found))
    while together and together % 10 == 0:
        together //= 10
    return together


def _narrows_another(value: Any) -> bool:
    """Whether this is a schema that says more of what it refers to."""
    more = {"pattern", "properties", "patternProperties", "items", "anyOf", "additionalProperties"}
    return isinstance(value, dict) and "$ref" in value and bool(more & value.keys())


def _entries(value: Any) -> Iterator[tuple[str | None, Any]]:
    """All values nested in JSON data, the data itself included, each with its key."""
    left: list[tuple[str | None, Any]] = [(None, value)]
    while left:
        name, part = left.pop()
        yield name, part
        if isinstance(part, dict):
            left += part.items()
        elif isinstance(part, list):
            left += ((None, item) for item in part)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly in a schema, each with its path from there."""
    for key in _NESTED:
        if key in schema:
            yield f".{key}", schema[key]
    for key in _LISTS:
        parts = schema.get(key)
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            yield f".{key}[{number}]", part
    for key in _NAMED:
        named = schema.get(key)
        for name, part in named.items() if isinstance(named, dict) else ():
            yield f".{key}.{name}", part


def _of_calls(
    spec: ConstraintSpec, *, library: llguidance.LLTokenizer, control: dict[str, int]
) -> str:
    functions = json.loads(spec.value)
    for function in functions:
        schema = tool_calls.parameters(function)
        _of_schema(json.dumps(schema), name=f"parameters of {function['name']}", library=library)
    count = "any" if spec.kind == "tool_calls" else "one"
    lark = tool_calls.grammar(functions, count=count, control=control, options=_OPTIONS)
    return _from_lark(lark)


def _escaped(text: str) -> str:
    """A regular expression that only `text` matches."""
    return "".join(f"\\x{{{ord(char):x}}}" for char in text)


def _readable(message: str) -> str:
    """The error message as one line, with its place in a regular expression if it has one."""
    found = re.search(r"\n {4}(.*)\n {4}( *)\^+\nerror: (.*)", message)
    if found:
        place, reason = len(found[2]), found[3]
        near = found[1][max(0, place - 20) : place + 20]
        return f"regular expression, character {place}, near {near!r}: {reason}"
    return _first_line(message)


def _first_line(message: str) -> str:
    line = message.strip().partition("\n")[0]
    return line if len(line) <= 300 else f"{line[:297]}..."
