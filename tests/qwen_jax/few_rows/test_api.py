"""When the kernels are chosen, and steps of them in the engine's program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qwen2_5
from qwen_jax import decode_params, fused, model, paged_decode, paged_pass, paged_state
from qwen_jax.attention import paged_blocks
from qwen_jax.few_rows import api, head, layer, parts

BF16 = jnp.dtype(jnp.bfloat16)


@functools.cache
def _params(cfg) -> dict:
    params = jax.tree.map(lambda x: x.astype(BF16), model.init(cfg, jax.random.key(0)))
    params = decode_params.prepare(cfg, params, dtype=BF16)
    return {**params, "layers": tuple(fused.output_major(one) for one in params["layers"])}


def _state(cfg, *, storage: str = "plain") -> paged_state.State:
    state = paged_state.empty(
        cfg, num_slots=2, width=4, num_pages=8, page_size=16, dtype=BF16, storage=storage
    )
    slots = dataclasses.replace(
        state.slots,
        table_BM=jnp.arange(8, dtype=jnp.int32).reshape(2, 4),
        lengths_B=jnp.array([20, 3], jnp.int32),
        tokens_B=jnp.array([5, 9], jnp.int32),
        remaining_B=jnp.array([40, 2], jnp.int32),
    )
    return paged_state.State(state.pages, slots)


def test_one_row_of_a_small_bfloat16_model_on_a_gpu():
    small = qwen2_5.base("0.5b")
    alone = {"layout": None, "platform": "gpu"}
    assert api.why_not_model(small, dtype=BF16, **alone) is None
    reasons = [
        api.why_not_model(small, dtype=jnp.dtype(jnp.float32), **alone),
        api.why_not_model(small, dtype=BF16, layout=None, platform="cpu"),
        api.why_not_model(qwen2_5.base("7b"), dtype=BF16, **alone),
    ]
    assert reasons == [
        "arithmetic is float32, not bfloat16",
        "platform 'cpu' is not 'gpu'",
        "hidden_size 3584 is above 1024",
    ]
    cfg = qwen2_5.tiny()
    params, state = _params(cfg), _state(cfg)
    why_not = functools.partial(api.why_not, cfg, **alone)
    assert why_not(params, state.pages, rows=8) is None
    assert why_not(params, state.pages, rows=9) == "there are 9 rows, and they take at most 8"
    assert why_not(params, _state(cfg, storage="int8").pages, rows=1) == "pages are int8"
    plain = {**params, "layers": tuple({"attention": {"o": {}}} for _ in params["layers"])}
    assert "not output-major" in why_not(plain, state.pages, rows=1)
    assert api.choose(cfg, params, state.pages, rows=1, layout=None) == "xla"  # no GPU here


@pytest.mark.parametrize("how", ["greedy", pytest.param("full", marks=pytest.mark.slow)])
def test_steps_of_the_kernels_draw_what_the_models_layers_draw(how, monkeypatch):
    cfg = qwen2_5.tiny()
    params = _params(cfg)
    attention = paged_blocks.Tuning(block=16, min_keys=16)
    tuning = parts.Tuning(programs=3, launch="phase", attention=attention)
    monkeypatch.setattr(api, "multiprocessors", lambda: 3)
    monkeypatch.setattr(api, "Tuning", lambda programs: tuning)
    monkeypatch.setattr(api, "_layer", functools.partial(layer.run, interpret=True))
    for name in ("logits", "likeliest"):
        monkeypatch.setattr(head, name, functools.partial(getattr(head, name), interpret=True))
    mask_RW = jnp.full((2, -(-cfg.vocab_size // 32)), 2**32 - 1, jnp.uint32)
    results = {}
    for layers in ("xla", "kernels"):
        state, drawn = paged_decode.advance(
            cfg, params, _state(cfg), jnp.arange(2), mask_RW,
            how=how, eos_E=jnp.zeros(0, jnp.int32), num_steps=4, layers=layers,
        )  # fmt: skip
        results[layers] = np.asarray(drawn.tokens_B), state
    (want, plain), (got, few) = results["xla"], results["kernels"]
    np.testing.assert_array_equal(got, want)
    assert (got[2:, 1] == paged_pass.PAD).all()  # that row had two tokens left
    for name in ("lengths_B", "tokens_B", "generated_B", "remaining_B"):
        np.testing.assert_array_equal(getattr(few.slots, name), getattr(plain.slots, name))
