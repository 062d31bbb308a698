"""The form of an answer that a request asks for; `infer.constraints.compiler` compiles it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

Kind = Literal[
    "json_schema", "json_object", "regex", "grammar", "choice", "tool_call", "tool_calls"
]


Count = Literal["one", "any"]  # of calls


@dataclass(frozen=True)
class ConstraintSpec:
    """A form that every answer has to keep. Hashable, so that compiled ones can be kept.

    `value` is, by kind: a JSON schema as JSON text; "" (any JSON object); a regular expression that
    the whole answer matches; a grammar in Lark's notation; the answers to choose from; for one call
    of a tool and for one or more, a JSON list of OpenAI's functions, each with name and parameters.
    An answer may have the form of `alternative` instead.
    """

    kind: Kind
    value: str | tuple[str, ...] = ""
    alternative: Self | None = None

    def __post_init__(self) -> None:
        check = {
            "json_schema": _check_schema,
            "json_object": _check_object,
            "regex": _check_text,
            "grammar": _check_text,
            "choice": _check_choice,
            "tool_call": _check_functions,
            "tool_calls": _check_functions,
        }
        if self.kind not in check:
            raise ValueError(f"constraint kind {self.kind!r} is unknown; known: {', '.join(check)}")
        check[self.kind](self.kind, self.value)


def _check_schema(kind: str, value: object) -> None:
    _check_text(kind, value)
    if not isinstance(_json(kind, value), dict | bool):
        raise ValueError(f"{kind}: a schema is a JSON object or a boolean, not {value}")


def _check_functions(kind: str, value: object) -> None:
    _check_text(kind, value)
    functions = _json(kind, value)
    named = isinstance(functions, list) and all(
        isinstance(f, dict) and isinstance(f.get("name"), str) and f["name"] for f in functions
    )
    if not named or not functions:
        raise ValueError(f"{kind}: a JSON list of functions with names is needed, not {value}")


def _json(kind: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{kind}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{kind} is not JSON: {error}") from None


def _check_object(kind: str, value: object) -> None:
    if value != "":
        raise ValueError(f"{kind} takes no value, got {value!r}")


def _check_text(kind: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{kind} is {value!r}; a text that is not empty is needed")


def _check_choice(kind: str, value: object) -> None:
    if not (isinstance(value, tuple) and value and all(isinstance(v, str) for v in value)):
        raise ValueError(f"{kind} is {value!r}; at least one text is needed")


def forced_calls(
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str | None = None,
    count: Count = "any",
) -> ConstraintSpec:
    """An answer that is calls of OpenAI's `tools` (tool_choice "required"), or of the one named.

    Raises `ValueError` where there is no tool, or none of that name.
    """
    functions = [_function(number, tool) for number, tool in enumerate(tools)]
    chosen = [f for f in functions if name in (None, f["name"])]
    if not chosen:
        known = ", ".join(f["name"] for f in functions) or "none"
        raise ValueError(f"tool_choice asks for a call of {name or 'a tool'}; known tools: {known}")
    # Of the named tool one call is wanted, says the API.
    kind = "tool_calls" if count == "any" and name is None else "tool_call"
    said = [{key: f[key] for key in ("name", "parameters") if key in f} for f in chosen]
    return ConstraintSpec(kind, json.dumps(said, ensure_ascii=False))


def _function(number: int, tool: object) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"tools[{number}] is no function with a name")
    return function


def or_calls(
    form: ConstraintSpec, tools: Sequence[Mapping[str, Any]], *, count: Count = "any"
) -> ConstraintSpec:
    """An answer that has the form, or is calls of the tools (tool_choice "auto" beside a form)."""
    return dataclasses.replace(form, alternative=forced_calls(tools, count=count))
