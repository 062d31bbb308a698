"""An engine's decoding program, lowered for devices that may exist in the compiler alone."""

import jax
import jax.numpy as jnp

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import programs, slot_state, weights


def lower(
    cfg: ModelConfig,
    settings: EngineConfig,
    layout: Layout,
    *,
    num_slots: int,
    length: int,
    dtype: jnp.dtype,
) -> dict[str, jax.stages.Lowered]:
    """The program `advance` of one engine, by name, for the devices of `layout`.

    It draws `settings.decode_steps` tokens greedily for each of `num_slots` slots, of `length`
    positions, as the replicas of one engine all do.
    Raises `ValueError` where the model does not divide over the mesh.
    """
    sharding.check_model(cfg, layout)
    width = -(-length // settings.page_size)
    state = slot_state.shapes(
        cfg,
        num_slots=num_slots,
        width=width,
        num_pages=num_slots * width,
        page_size=settings.page_size,
        dtype=dtype,
        layout=layout,
    )
    form = weights.best_form(cfg, dtype=dtype, layout=layout)

    def replicated(*shape: int, dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding((), layout))

    advance = programs.advance.lower(
        cfg,
        weights.shapes(cfg, dtype=dtype, form=form, layout=layout),
        state,
        replicated(num_slots),
        replicated(num_slots, -(-cfg.vocab_size // 32), dtype=jnp.uint32),
        sampler="greedy",
        eos_E=replicated(len(cfg.eos_token_ids)),
        num_steps=settings.decode_steps,
        layout=layout,
    )
    return {"advance": advance}
