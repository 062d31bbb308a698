"""An engine of a few slots, and what it answers."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Event, Request
from partitioning.sharding import Layout
from qwen_jax.decode import weights

SETTINGS = EngineConfig(
    num_slots=4, page_size=16, num_pages=64, max_length=128, prefill_chunk=32, prefill_tokens=64,
    decode_steps=4, buckets="one",
)  # fmt: skip


def engine(
    cfg: ModelConfig,
    params: dict,
    *,
    form: weights.Form | None = None,
    eos_ids: Sequence[int] = (),
    layout: Layout | None = None,
    **changes,
) -> engine_lib.Engine:
    """In float32, of a copy of stacked parameters in the form given or the best."""
    copied = jax.tree.map(jnp.copy, params)
    return engine_lib.Engine(
        cfg,
        weights.prepare(cfg, copied, dtype=jnp.float32, form=form, layout=layout),
        settings=dataclasses.replace(SETTINGS, **changes),
        eos_ids=tuple(eos_ids),
        dtype=jnp.float32,
        layout=layout,
    )


def events(
    engine: engine_lib.Engine, prompts: Sequence[Sequence[int]], **sampling
) -> list[list[Event]]:
    """What came for each prompt; greedy."""
    settings = SamplingParams(temperature=0.0, **sampling)
    got: list[list[Event]] = [[] for _ in prompts]
    for event in engine.run(
        [
            Request(id=str(index), tokens=tuple(map(int, prompt)), sampling=settings)
            for index, prompt in enumerate(prompts)
        ]
    ):
        got[int(event.id)].append(event)
    return got


def greedy(
    engine: engine_lib.Engine, prompts: Sequence[Sequence[int]], **sampling
) -> list[list[int]]:
    """The answer to each prompt."""
    return [
        [token for event in each for token in event.tokens]
        for each in events(engine, prompts, **sampling)
    ]
