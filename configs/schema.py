"""What every configuration of the project shares: checks with clear errors, and plain values.

Configurations are frozen, keyword-only dataclasses that check themselves when they are built.
Units are in the names or in the comments: lengths are tokens, sizes are elements, times are
seconds.
"""

import dataclasses


def check(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_positive(config: object, *names: str) -> None:
    """Raises `ValueError` naming the first of the fields `names` that is not greater than 0."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{name}={value} must be greater than 0")


def to_dict(config: object) -> dict:
    """A config as plain JSON values; `architecture.model_from_dict` reads a model back."""
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
