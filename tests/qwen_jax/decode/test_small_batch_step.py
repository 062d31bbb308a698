"""When the kernels are chosen, and steps of them in the engine's program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5
from qwen_jax.decode import forward, slot_state, weights
from qwen_jax.decode import programs as decode_programs
from qwen_jax.decode import small_batch_step as small_batch
from qwen_jax.decode.small_batch import kernel_types, layer_kernel, lm_head, support
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import triton_blocks

BF16 = jnp.dtype(jnp.bfloat16)


@functools.cache
def _weights(cfg) -> weights.DecodeWeights:
    params = jax.tree.map(lambda x: x.astype(BF16), transformer.init(cfg, jax.random.key(0)))
    return weights.prepare(cfg, params, dtype=BF16, form="output_major")


def _state(cfg, *, storage: str = "plain") -> slot_state.State:
    state = slot_state.empty(
        cfg, num_slots=2, width=4, num_pages=8, page_size=16, dtype=BF16, storage=storage
    )
    slots = dataclasses.replace(
        state.slots,
        table_BM=jnp.arange(8, dtype=jnp.int32).reshape(2, 4),
        lengths_B=jnp.array([20, 3], jnp.int32),
        tokens_B=jnp.array([5, 9], jnp.int32),
        remaining_B=jnp.array([40, 2], jnp.int32),
    )
    return slot_state.State(state.pages, slots)


def test_one_row_of_a_small_bfloat16_model_on_a_gpu():
    small = qwen2_5.base("0.5b")
    alone = {"layout": None, "platform": "gpu"}
    assert support.unsupported(small, dtype=BF16, **alone) is None
    reasons = [
        support.unsupported(small, dtype=jnp.dtype(jnp.float32), **alone),
        support.unsupported(small, dtype=BF16, layout=None, platform="cpu"),
        support.unsupported(qwen2_5.base("7b"), dtype=BF16, **alone),
    ]
    assert reasons == [
        "arithmetic is float32, not bfloat16",
        "platform 'cpu' is not 'gpu'",
        "hidden_size 3584 is above 1024",
    ]
    cfg = qwen2_5.tiny()
    made, state = _weights(cfg), _state(cfg)
    unsupported = functools.partial(small_batch.unsupported, cfg, **alone)
    assert unsupported(made, state.pages, rows=8) is None
    assert unsupported(made, state.pages, rows=9) == "there are 9 rows, and they take at most 8"
    assert unsupported(made, _state(cfg, storage="int8").pages, rows=1) == "pages are int8"
    fused = weights.DecodeWeights("fused", made.params)
    assert "not output_major" in unsupported(fused, state.pages, rows=1)
    assert small_batch.choose(cfg, made, state.pages, rows=1, layout=None) == "xla"  # no GPU here


@pytest.mark.parametrize("sampler", ["greedy", pytest.param("full", marks=pytest.mark.slow)])
def test_steps_of_the_kernels_draw_what_the_models_layers_draw(sampler, monkeypatch):
    cfg = qwen2_5.tiny()
    made = _weights(cfg)
    attention = triton_blocks.Tuning(block=16, min_keys=16)
    tuning = kernel_types.Tuning(programs=3, launch="phase", attention=attention)
    monkeypatch.setattr(small_batch, "multiprocessors", lambda: 3)
    monkeypatch.setattr(small_batch, "Tuning", lambda programs: tuning)
    monkeypatch.setattr(small_batch, "_layer", functools.partial(layer_kernel.run, interpret=True))
    for name in ("logits", "likeliest"):
        monkeypatch.setattr(
            lm_head, name, functools.partial(getattr(lm_head, name), interpret=True)
        )
    mask_RW = jnp.full((2, -(-cfg.vocab_size // 32)), 2**32 - 1, jnp.uint32)
    results = {}
    for layers in ("xla", "kernels"):
        state, drawn = decode_programs.advance(
            cfg, made, _state(cfg), jnp.arange(2), mask_RW,
            sampler=sampler, eos_E=jnp.zeros(0, jnp.int32), num_steps=4, layers=layers,
        )  # fmt: skip
        results[layers] = np.asarray(drawn.tokens_B), state
    (want, plain), (got, few) = results["xla"], results["kernels"]
    np.testing.assert_array_equal(got, want)
    assert (got[2:, 1] == forward.PAD).all()  # that row had two tokens left
    for name in ("lengths_B", "tokens_B", "generated_B", "remaining_B"):
        np.testing.assert_array_equal(getattr(few.slots, name), getattr(plain.slots, name))
