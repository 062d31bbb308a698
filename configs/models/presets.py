"""Every preset by name, dense and MoE."""

from collections.abc import Callable

from configs.models import qwen2_5, qwen2_moe
from configs.models.architecture import ModelConfig

PRESETS: dict[str, Callable[[], ModelConfig]] = {**qwen2_5.PRESETS, **qwen2_moe.PRESETS}


def preset(name: str) -> ModelConfig:
    """The preset called `name`. Raises `ValueError` with the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
