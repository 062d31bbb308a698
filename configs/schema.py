"""Shared parts of every configuration: the check of its fields, and its plain JSON values.

A configuration is a dataclass made by `config`: frozen, keyword-only, and checked whenever one is
built, field by field from the type hints. A hint says all that can be said of one field alone:

    num_steps: schema.Positive[int] = 1000
    schedule: Literal["cosine", "wsd"] = "cosine"
    top_p: Annotated[float, schema.Range(above=0, max=1)] = 1.0

What a hint cannot say, such as two fields that exclude each other, stands in `__post_init__`. Units
are in the names or in the comments: lengths are tokens, sizes are elements, times are seconds.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, Union


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that a field takes: `min` and `max` belong to the range, `above` and `below` do not.

    `remedy` says what to use in place of a number outside the range.
    """

    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None
    remedy: str = ""

    def problem(self, value: float) -> str | None:
        """Description of the error in `value`, or None for a number inside the range."""
        if (
            (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and (self.max is None or value <= self.max)
            and (self.below is None or value < self.below)
        ):
            return None
        return f"must {self._text()}" + (f"; {self.remedy}" if self.remedy else "")

    def _text(self) -> str:
        low = self.above if self.min is None else self.min
        high = self.below if self.max is None else self.max
        if low is not None and high is not None:
            left, right = "(" if self.min is None else "[", ")" if self.max is None else "]"
            return f"be in {left}{low}, {high}{right}"
        if low is None:
            return f"be at most {high}" if self.below is None else f"be less than {high}"
        if self.min is None:
            return f"be greater than {low}"
        return "not be negative" if low == 0 else f"be at least {low}"


Number = TypeVar("Number")
Positive = Annotated[Number, Range(above=0)]
NonNegative = Annotated[Number, Range(min=0)]


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(*, prefix: str = ""):
    """Makes a class a configuration: a frozen, keyword-only dataclass whose fields are checked.

    `prefix` stands before the names of the fields in errors, such as "data." for `--data.paths`.
    Building one raises `ValueError` that names the first field whose value its hint does not allow.
    """

    def decorate(cls: type) -> type:
        between_fields = cls.__dict__.get("__post_init__")

        def __post_init__(self) -> None:
            _check_fields(self, prefix)
            if between_fields is not None:
                between_fields(self)

        cls.__post_init__ = __post_init__
        cls.__checks_fields__ = True
        return dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    return decorate


def check(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def plain_type(cls: type, name: str) -> Any:
    """The hint of the field `name` of a configuration, without ranges: `int`, `float | None`."""
    return typing.get_type_hints(cls)[name]


def to_dict(config: object) -> dict:
    """A configuration as plain JSON values; `architecture.model_from_dict` reads a model back."""
    return dataclasses.asdict(config)


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """A config's nested dict with dotted names: `{"mesh": {"fsdp": 2}}` -> `{"mesh.fsdp": 2}`."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_fields(config: object, prefix: str) -> None:
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if problem := _problem(value, hint):
            shown = "" if problem.startswith("entry ") else f"={value!r}"  # a tuple can be long
            raise ValueError(f"{prefix}{name}{shown} {problem}")


def _problem(value: object, hint: Any) -> str | None:
    """Description of the error in `value` under a type hint, or None.

    Raises `TypeError` for a kind of hint that is not known here, so that no field goes unchecked.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if isinstance(hint, type) and origin is None:
        return None if isinstance(value, hint) else f"must be of type {hint.__name__}"
    if origin is Annotated:
        inner, *ranges = arguments
        return _problem(value, inner) or _outside(value, ranges)
    if origin is Literal:
        same = any(value == one and type(value) is type(one) for one in arguments)
        return None if same else f"is unknown; known: {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return _problem_of_union(value, arguments)
    if origin is tuple:
        return _problem_of_tuple(value, arguments)
    raise TypeError(f"a configuration's field cannot have the type hint {hint}")


def _outside(value: object, ranges: list) -> str | None:
    numbers_ = value if isinstance(value, tuple) else (value,)
    found = [
        one.problem(number)
        for one in ranges
        for number in numbers_
        if isinstance(one, Range) and number is not None
    ]
    return next(filter(None, found), None)


def _problem_of_union(value: object, arguments: tuple) -> str | None:
    problems = [_problem(value, one) for one in arguments if one is not types.NoneType]
    optional = types.NoneType in arguments
    if None in problems or (optional and value is None):
        return None
    return " or ".join(problems) + (", or None" if optional else "")


def _problem_of_tuple(value: object, arguments: tuple) -> str | None:
    if not isinstance(value, tuple):
        return "must be a tuple"
    if arguments[-1:] == (Ellipsis,):
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        return f"must have {len(arguments)} entries"
    for entry, hint in zip(value, arguments, strict=True):
        if problem := _problem(entry, hint):
            return f"entry {entry!r} {problem}"
    return None


def _whole_number(value: object) -> str | None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return None if whole else "must be a whole number"


def _number(value: object) -> str | None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return "must be a number"
    return None if math.isfinite(value) else "must be finite"


def _text(value: object) -> str | None:
    return None if isinstance(value, str) else "must be a text"


def _true_or_false(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


_PLAIN = {int: _whole_number, float: _number, str: _text, bool: _true_or_false}
