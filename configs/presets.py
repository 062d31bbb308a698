"""Every preset by name, dense and MoE."""

from collections.abc import Callable

from configs import qwen2_5, qwen2_moe, schema

PRESETS: dict[str, Callable[[], schema.Model]] = {**qwen2_5.PRESETS, **qwen2_moe.PRESETS}


def preset(name: str) -> schema.Model:
    """The preset called `name`. Raises `ValueError` with the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
