"""Reads requests' parameters out of JSON objects: each is honoured, or refused by its name."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from configs import schema
from configs.sampling import SamplingParams
from infer.constraints.spec import ConstraintSpec

# Fields of SamplingParams that JSON spells alike, with their types.
SAMPLING = {
    field.name: kind if kind in (bool, float) else int
    for field in dataclasses.fields(SamplingParams)
    for kind in [schema.plain_type(SamplingParams, field.name)]
    if field.name not in ("max_tokens", "logit_bias", "stop_token_ids", "logprobs", "seed")
}
_CONSTRAINTS = {  # key of `structured_outputs` -> kind
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}

_MOST = 2**31  # whole numbers go to the device as int32


class ParameterError(ValueError):
    """A parameter that is unknown, malformed or not supported; `name` says which."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(problem)
        self.name = name


class Reader:
    """The parameters of one JSON object; null is the same as not given.

    `finish` raises for what nobody has taken.
    """

    def __init__(self, values: object, *, name: str = "the body") -> None:
        if not isinstance(values, Mapping):
            raise ParameterError(name, f"{name} is {_shown(values)}; a JSON object is needed")
        self._left = {key: value for key, value in values.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A parameter's value, which must be of one of these JSON types."""
        if name not in self._left:
            return default
        value = self._left.pop(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        fits = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, fits) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_KINDS[k] for k in kinds)
            raise ParameterError(name, f"{name}={_shown(value)} must be {wanted}")
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and abs(value) >= _MOST and name != "seed":
            raise ParameterError(name, f"{name}={_shown(value)} must be in (-2**31, 2**31)")
        return value

    def drop(self, *names: str) -> None:
        """Ignores parameters that are only labels and have no effect on an answer."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *values: Any) -> None:
        """Refuses all values of a parameter but those that ask for what is done anyway."""
        if name not in self._left:
            return
        value = self._left.pop(name)
        if not any(type(value) is type(known) and value == known for known in values):
            allowed = " or ".join(json.dumps(v) for v in values)
            raise ParameterError(
                name, f"{name}={_shown(value)} is not supported; leave it out, or give {allowed}"
            )

    def refuse(self, name: str, remedy: str) -> None:
        """Refuses a parameter that is known and not supported."""
        if name in self._left:
            raise ParameterError(name, f"{name} is not supported; {remedy}")

    def finish(self) -> None:
        """Raises for parameters that nobody took."""
        for name in self._left:
            raise ParameterError(name, f"{name!a} is not a known parameter; remove it")


def sampling(reader: Reader, *, defaults: SamplingParams, **own: int | None) -> SamplingParams:
    """Sampling parameters: `defaults`, the object's values, and `own`, read by the caller."""
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    for name, kind in SAMPLING.items():
        if name in reader:
            given[name] = reader.take(name, kind)
    if "logit_bias" in reader:
        given["logit_bias"] = _logit_bias(reader.take("logit_bias", dict))
    if "stop_token_ids" in reader:
        ids = reader.take("stop_token_ids", list)
        given["stop_token_ids"] = token_ids("stop_token_ids", ids)
    try:
        return dataclasses.replace(defaults, **given)
    except ValueError as error:
        name = str(error).split("=")[0].split(" ")[0]
        raise ParameterError(name, str(error)) from None


def stop(reader: Reader) -> tuple[str, ...]:
    """The stop strings, given as one string or as a list."""
    value = reader.take("stop", (str, list), [])
    stops = [value] if isinstance(value, str) else value
    if not all(isinstance(text, str) and text for text in stops):
        raise ParameterError("stop", f"stop={_shown(stops)} must hold texts that are not empty")
    return tuple(stops)


def constraint(reader: Reader) -> ConstraintSpec | None:
    """The constraint that `response_format`, `structured_outputs` or a `guided_` key sets."""
    found: list[tuple[str, str, Any]] = []  # parameter, kind, value
    if "response_format" in reader:
        found += _response_format(reader.take("response_format", dict))
    if "structured_outputs" in reader:
        name = "structured_outputs"
        inner = Reader(reader.take(name, dict), name=name)
        for key, kind in _CONSTRAINTS.items():
            if key in inner:
                found.append((name, kind, inner.take(key, tuple(_KINDS))))
        inner.finish()
    for key, kind in _CONSTRAINTS.items():
        if f"guided_{key}" in reader:
            value = reader.take(f"guided_{key}", tuple(_KINDS))
            found.append((f"guided_{key}", kind, value))
    if len(found) > 1:
        names = " and ".join(name for name, _, _ in found)
        raise ParameterError(found[1][0], f"{names} constrain the answer at once; give one of them")
    return _spec(*found[0]) if found else None


def token_ids(name: str, values: list[Any]) -> tuple[int, ...]:
    """A list of token ids. Raises for anything else in it."""
    for value in values:
        if type(value) is not int or not 0 <= value < _MOST:
            raise ParameterError(name, f"{name} holds {_shown(value)}, which is not a token id")
    return tuple(values)


def _logit_bias(values: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_token = key.isascii() and key.isdigit() and len(key) < len(str(_MOST))
        if not is_token or not is_number or not -100 <= value <= 100:
            raise ParameterError(
                "logit_bias",
                f"logit_bias has {_shown(key)}: {_shown(value)}; it takes token ids, and numbers "
                "in [-100, 100]",
            )
    return tuple(sorted((int(key), float(value)) for key, value in values.items()))


def _response_format(value: dict[str, Any]) -> list[tuple[str, str, Any]]:
    name = "response_format"
    reader = Reader(value, name=name)
    kind = reader.take("type", str)
    found = []
    if kind == "json_object":
        found = [(name, "json_object", True)]
    elif kind == "json_schema":
        inner = Reader(reader.take("json_schema", dict, {}), name=f"{name}.json_schema")
        # The schema is always kept to, strict or not.
        inner.drop("name", "description", "strict")
        found = [(name, "json_schema", inner.take("schema", (dict, bool), {}))]
        inner.finish()
    elif kind != "text":
        raise ParameterError(
            name, f"{name}.type={_shown(kind)} is unknown; known: text, json_object, json_schema"
        )
    reader.finish()
    return found


def _spec(name: str, kind: str, value: Any) -> ConstraintSpec | None:
    if kind == "json_object":
        if value is not True:
            raise ParameterError(name, f"{name}: json_object={_shown(value)} must be true")
        value = ""
    elif kind == "json_schema" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    elif kind == "choice" and isinstance(value, list):
        value = tuple(value)
    try:
        return ConstraintSpec(kind, value)
    except ValueError as error:
        raise ParameterError(name, f"{name}: {error}") from None


def _shown(value: Any) -> str:
    try:
        text = ascii(value)
    except ValueError:  # Python does not spell numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
