"""Values of a parsed config.json or generation_config.json, checked by type and name."""

from typing import Any


def typed(key: str, value: Any, kind: type, *, file: str = "config.json") -> Any:
    """`value` if it is of type `kind`; an int passes as a float, a bool never as a number."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{file}: {key}={value!r} must be of type {kind.__name__}")
    return value


def means(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether `value` is one of `allowed`, where False is not 0 and True is not 1."""
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def refuse_unknown(values: dict, known: set[str], *, what: str) -> None:
    """Raises `ValueError` naming the keys that are not known."""
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{what}: unknown keys {', '.join(unknown)}; they may change what the model computes, "
            f"so they are not ignored. Remove them if you know they do not"
        )


def token_ids(key: str, value: Any, *, file: str = "config.json") -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(typed(key, i, int, file=file) for i in ids)


def token_id(key: str, value: Any, *, file: str = "config.json") -> int | None:
    return None if value is None else typed(key, value, int, file=file)
