"""A draft model on an engine's device: its parameters, its pages, and its programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from partitioning.sharding import Layout
from qwen_jax.decode import draft_programs, forward, sampling
from qwen_jax.decode.slot_state import Chunks, Rows
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import kv_pages


@dataclass(frozen=True)
class Draft:
    """A smaller model of the same tokenizer, with parameters as an engine takes them.

    On a mesh it has a layout of its own: what the mesh does not divide may lie on all devices.
    """

    cfg: ModelConfig
    params: dict
    layout: Layout | None = None


class DraftDevice:
    """Guesses for one engine; see `qwen_jax/decode/draft_programs.py`."""

    def __init__(
        self,
        draft: Draft,
        *,
        settings: EngineConfig,
        vocab_size: int,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: forward.Attention | None,
    ) -> None:
        """`vocab_size` is the engine's model's; `settings` have their num_pages."""
        self._cfg, self._params = draft.cfg, draft.params
        self._common = {"attention": attention, "layout": draft.layout}
        self._drawing = {
            "eos_E": np.asarray(tuple(eos_ids), np.int32),
            "num_guesses": settings.guesses,
            "vocab_size": vocab_size,
        }
        self._pages = kv_pages.create(
            draft.cfg,
            num_pages=settings.num_pages,
            page_size=settings.page_size,
            dtype=dtype,
            storage=settings.kv_cache,
            layout=draft.layout,
        )

    def read(self, chunks: Chunks, *, prefix: str) -> None:
        """`paged_draft.read` of the chunks."""
        self._pages = draft_programs.read(
            self._cfg,
            self._params,
            self._pages,
            chunks.tokens_RT,
            table_RM=chunks.table_RM,
            starts_R=chunks.starts_R,
            lengths_R=chunks.lengths_R,
            prefix=prefix,
            **self._common,
        )

    def propose(self, slots: Rows, slots_R: np.ndarray, *, sampler: sampling.Sampler) -> jax.Array:
        """`paged_draft.propose` for these of the slots: [R, guesses], on the device."""
        self._pages, guesses_RT = draft_programs.propose(
            self._cfg, self._params, self._pages, slots, slots_R, sampler=sampler,
            **self._drawing, **self._common,
        )  # fmt: skip
        return guesses_RT


def check_asked(settings: EngineConfig, *, given: Literal["draft", "none"]) -> None:
    """Raises `ValueError` unless a draft is given just where guesses are to come from one."""
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
    """Raises `ValueError` for a draft of stacked layers, of other devices, or too short a reach."""
    if not isinstance(draft.params["layers"], tuple):
        raise ValueError("a draft's layers lie apart: prepare them as 'fused' or 'unstacked'")
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
