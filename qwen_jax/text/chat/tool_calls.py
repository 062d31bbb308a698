r"""Tool calls as Qwen2.5 writes them into its answers, and as OpenAI's API carries them.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A call follows text, or another call, after one line break, as in the chat template.
"""

import dataclasses
import json
import math
import re
import uuid
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_OUTSIDE = re.compile(r"[\s{}\[\],:0-9+\-.eEtrufalsn]*")  # of strings, in JSON
_INSIDE = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function's name, and its arguments as JSON data."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """Text that begins as a tool call and is not one; it stays part of the content."""

    text: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed answer: its text without the calls, the calls, and the malformed calls."""

    content: str
    calls: tuple[ToolCall, ...]
    malformed: tuple[Malformed, ...] = ()


class Parser:
    """An incremental parser, whose `push` takes an answer in pieces and returns text and calls.

    Text that may still be part of a call is held back, so that calls are whole. One line break
    before a call is not text, nor is white space alone after one. A tag inside a JSON string
    is not a tag. Text that begins as a call and is not one stays text, and `malformed` says why.
    """

    def __init__(self) -> None:
        self.malformed: list[Malformed] = []
        self._held = ""
        self._follows_call = False
        self._place = 0  # in what is held: everything before it is scanned
        self._in_string = False

    def push(self, text: str) -> list[str | ToolCall]:
        """Text and calls that are certain after `text`, the next piece of the answer."""
        self._held += text
        return self._take(is_last=False)

    def finish(self) -> list[str | ToolCall]:
        """Remaining text and calls of an answer that ends here."""
        return self._take(is_last=True)

    def _take(self, *, is_last: bool) -> list[str | ToolCall]:
        pieces: list[str | ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            lead = self._lead(self._held[:start])
            self._give(pieces, start - lead)
            found = self._block(lead + len(OPEN), is_last=is_last)
            if found is None:
                return pieces
            end, call = found
            if isinstance(call, ToolCall):
                pieces.append(call)
                self._held, self._follows_call = self._held[end:], True
            else:
                self.malformed.append(Malformed(self._held[lead:end], call))
                self._give(pieces, lead + len(OPEN))
            self._place, self._in_string = 0, False
        if is_last and not (self._follows_call and self._held.isspace()):
            self._give(pieces, len(self._held))
        elif not is_last:
            tail = _partial(self._held)
            before = self._held[: len(self._held) - tail]
            self._give(pieces, len(before) - self._lead(before))
        return pieces

    def _lead(self, before: str) -> int:
        """Length of the white space before a call that belongs to the call."""
        if self._follows_call and not before.strip():
            return len(before)
        return int(before.endswith("\n"))

    def _give(self, pieces: list[str | ToolCall], count: int) -> None:
        """Moves the first `count` characters held back to the text that is returned."""
        if not count:
            return
        text, self._held = self._held[:count], self._held[count:]
        self._follows_call, self._place = False, max(0, self._place - count)
        if pieces and isinstance(pieces[-1], str):
            text = pieces.pop() + text
        pieces.append(text)

    def _block(self, begin: int, *, is_last: bool) -> tuple[int, ToolCall | str] | None:
        """End of the call whose tag ends at `begin`, and the call or the text of its error.

        None where the call is not complete yet.
        """
        place = max(self._place, begin)
        while True:
            place = (_INSIDE if self._in_string else _OUTSIDE).match(self._held, place).end()
            if self._held[place : place + 1] == '"':
                place, self._in_string = place + 1, not self._in_string
            else:
                break
        self._place = place
        rest = self._held[place : place + len(CLOSE)]
        if self._in_string or CLOSE.startswith(rest) and rest != CLOSE:
            return (len(self._held), f"it has no {CLOSE}") if is_last else None
        if rest != CLOSE:
            return place + 1, f"character {rest[0]!r} cannot follow there in JSON"
        return place + len(CLOSE), _read(self._held[begin:place])


def parse(text: str) -> Parsed:
    """The text and the tool calls of a whole answer."""
    parser = Parser()
    pieces = parser.push(text) + parser.finish()
    return Parsed(
        content="".join(piece for piece in pieces if isinstance(piece, str)),
        calls=tuple(piece for piece in pieces if isinstance(piece, ToolCall)),
        malformed=tuple(parser.malformed),
    )


def split(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer without its calls, and the calls as OpenAI's `tool_calls`."""
    parsed = parse(text)
    return parsed.content, [to_openai(call) for call in parsed.calls]


def write(content: str, calls: Sequence[ToolCall]) -> str:
    """The answer that `parse` splits into `content` and `calls`."""
    blocks = [
        f"{OPEN}\n{_dump({'name': call.name, 'arguments': call.arguments})}\n{CLOSE}"
        for call in calls
    ]
    return "\n".join([content, *blocks] if content else blocks)


def to_openai(call: ToolCall, *, id: str | None = None) -> dict[str, Any]:
    """A call as an entry of OpenAI's `tool_calls`, with a new id if none is given.

    With the key "index" beside it, this is the entry of a stream's delta.
    """
    return {
        "id": id or f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": call.name, "arguments": _dump(call.arguments)},
    }


def parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a function's arguments; an object without keys where it has none.

    Raises `ValueError` for a schema that does not describe an object.
    """
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(
            f"parameters of {function['name']} are {str(schema)[:80]}; a JSON schema of type "
            "'object' is needed"
        )
    return {**schema, "type": "object"}


def grammar(
    functions: Sequence[Mapping[str, Any]],
    *,
    count: Literal["one", "any"],
    control: Container[str],
    options: Mapping[str, Any],
) -> str:
    """A Lark grammar for llguidance of answers that are calls: exactly one, or at least one.

    functions are OpenAI's, each with name and parameters. The tags are control tokens where
    `control` has them, else text. `options` are llguidance's for JSON.
    """
    opening, closing = (tag if tag in control else json.dumps(tag) for tag in (OPEN, CLOSE))
    rules = [
        'start: call ("\\n" call)*' if count == "any" else "start: call",
        f'call: {opening} "\\n" ({" | ".join(f"call_{i}" for i in range(len(functions)))}) "\\n" '
        f"{closing}",
    ]
    for i, function in enumerate(functions):
        before = f'{{"name": {_dump(function["name"])}, "arguments": '
        schema = json.dumps({**parameters(function), "x-guidance": options})
        rules += [f'call_{i}: {json.dumps(before)} arguments_{i} "}}"']
        rules += [f"arguments_{i}: %json {schema}"]
    return "\n".join(rules) + "\n"


def _partial(text: str) -> int:
    """Length of the longest prefix of an opening tag that a text ends with."""
    lengths = range(min(len(OPEN) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(OPEN[:n])), 0)


def _read(body: str) -> ToolCall | str:
    """The call between the tags, or the text of its error."""
    try:
        call = json.loads(body, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return "it is not an object of name and arguments"
    if not isinstance(call["name"], str) or not call["name"]:
        return "its name is no text"
    if not isinstance(call["arguments"], dict):
        return "its arguments are no object"
    return ToolCall(call["name"], call["arguments"])


def _finite(text: str) -> float:
    """A finite number, which JSON can hold. Raises `ValueError` for others."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
