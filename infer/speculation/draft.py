"""A draft model for an engine, and what makes one unfit."""

from dataclasses import dataclass
from typing import Literal

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from partitioning.sharding import Layout
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer


@dataclass(frozen=True)
class Draft:
    """A smaller model of the same tokenizer, with parameters as an engine takes them.

    On a mesh it has a layout of its own: arrays that the mesh does not divide may be replicated.
    """

    cfg: ModelConfig
    params: DecodeWeights
    layout: Layout | None = None


def check_asked(settings: EngineConfig, *, given: Literal["draft", "none"]) -> None:
    """Raises `ValueError` unless a draft model is given exactly where the settings ask for one."""
    wanted = settings.speculation == "draft"
    if wanted and given == "none":
        raise ValueError(
            "speculation='draft' needs a draft model: give one (--draft), or use "
            "speculation='prompt_lookup', which needs none"
        )
    if given == "draft" and not wanted:
        raise ValueError(
            f"a draft model is given, and speculation={settings.speculation!r} makes no use of it: "
            f"set speculation='draft' (--engine.speculation draft), or leave the draft out"
        )


def check(draft: Draft, *, max_length: int, layout: Layout | None) -> None:
    """Raises `ValueError` for stacked layers, other devices, and too few positions."""
    if not isinstance(draft.params, DecodeWeights):
        raise ValueError("a draft's layers lie apart: make DecodeWeights by weights.prepare")
    here, there = (None if one is None else one.mesh for one in (draft.layout, layout))
    if here != there:
        raise ValueError(f"the draft lies on mesh {here}, and the model on {there}; load it there")
    reach = transformer.max_length(draft.cfg)
    if max_length > reach:
        raise ValueError(
            f"max_length={max_length} exceeds the {reach} tokens of the draft model "
            f"{draft.cfg.name}; set max_length={reach} or less (--engine.max-length), or take a "
            f"draft that reads more"
        )
