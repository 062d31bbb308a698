"""What an answer must look like, as a request says it; `infer.constraints` compiles it."""

import json
from dataclasses import dataclass
from typing import Literal

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class ConstraintSpec:
    """A form that every answer has to keep. Hashable, so that compiled ones can be kept.

    `value` is, by kind: a JSON schema as JSON text; "" (any JSON object); a regular expression that
    the whole answer matches; a grammar as text; the answers to choose from.
    """

    kind: Kind
    value: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        check = {
            "json_schema": _check_schema,
            "json_object": _check_object,
            "regex": _check_text,
            "grammar": _check_text,
            "choice": _check_choice,
        }
        if self.kind not in check:
            raise ValueError(f"constraint kind {self.kind!r} is unknown; known: {', '.join(check)}")
        check[self.kind](self.kind, self.value)


def _check_schema(kind: str, value: object) -> None:
    _check_text(kind, value)
    if not isinstance(json.loads(value), dict | bool):
        raise ValueError(f"{kind}: a schema is a JSON object or a boolean, not {value}")


def _check_object(kind: str, value: object) -> None:
    if value != "":
        raise ValueError(f"{kind} takes no value, got {value!r}")


def _check_text(kind: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{kind} is {value!r}; a text that is not empty is needed")


def _check_choice(kind: str, value: object) -> None:
    if not (isinstance(value, tuple) and value and all(isinstance(v, str) for v in value)):
        raise ValueError(f"{kind} is {value!r}; at least one text is needed")
