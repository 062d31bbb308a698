"""An engine over a mesh gives one device's answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.engine import EngineConfig
from configs.models import qwen2_moe
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from infer.speculation import draft
from partitioning import mesh, rules, sharding
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from tests.multidevice import cases

DENSE = dataclasses.replace(cases.MODEL, num_hidden_layers=2, vocab_size=256)
SPARSE = dataclasses.replace(qwen2_moe.tiny(), num_hidden_layers=2)
SETTINGS = EngineConfig(
    num_slots=3,
    page_size=16,
    num_pages=24,
    max_length=96,
    prefill_chunk=32,
    prefill_tokens=32,
    decode_steps=3,
    buckets="one",
)


def requests(cfg: ModelConfig) -> list[Request]:
    rng = np.random.default_rng(1)
    settings = [
        SamplingParams(temperature=0.0, max_tokens=12),
        SamplingParams(temperature=1.0, top_p=0.9, seed=2, max_tokens=9, repetition_penalty=1.2),
        SamplingParams(temperature=0.0, max_tokens=20, logprobs=1),
        SamplingParams(temperature=0.7, top_k=9, seed=3, max_tokens=7),
    ]
    return [
        Request(
            id=str(index),
            tokens=tuple(rng.integers(0, cfg.vocab_size, length).tolist()),
            sampling=one,
        )
        for index, (length, one) in enumerate(zip((5, 40, 33, 17), settings, strict=True))
    ]


def small(layout: sharding.Layout | None) -> draft.Draft:
    """A model whose three heads no mesh divides, on every device."""
    cfg = dataclasses.replace(
        DENSE, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1
    )
    params = jax.tree.map(lambda x: 4 * x, transformer.init(cfg, jax.random.key(1)))
    params = weights.prepare(cfg, params, dtype=jnp.float32)
    if layout is None:
        return draft.Draft(cfg, params)
    own = sharding.Layout(layout.mesh, rules.REPLICATED)
    return draft.Draft(cfg, jax.device_put(params, jax.NamedSharding(own.mesh, jax.P())), own)


def answers(cfg: ModelConfig, text: str, **changes) -> dict[str, list[int]]:
    layout = None
    params = jax.tree.map(lambda x: 4 * x, transformer.init(cfg, jax.random.key(0)))
    if text:
        config = mesh.parse(text)
        devices = jax.devices()[: config.tensor * config.expert * abs(config.fsdp) * config.data]
        layout = sharding.Layout(
            mesh.make(config, devices=devices), rules.rule_set("engine", kv_heads=config.kv_heads)
        )
        params = jax.device_put(params, sharding.shardings(transformer.axes(cfg), layout))
    params = weights.prepare(cfg, params, dtype=jnp.float32, layout=layout)
    settings = dataclasses.replace(SETTINGS, **changes)
    guesser = small(layout) if settings.speculation == "draft" else None
    engine = engine_lib.Engine(
        cfg,
        params,
        settings=settings,
        eos_ids=(5,),
        dtype=jnp.float32,
        layout=layout,
        draft=guesser,
    )
    got: dict[str, list[int]] = {}
    for event in engine.run(requests(cfg)):
        got.setdefault(event.id, []).extend(event.tokens)
    before = engine.stats()["compilations"]
    for event in engine.run(requests(cfg)):
        assert event.finish_reason != "cancelled"
    assert engine.stats()["compilations"] == before, "a second round compiled a program again"
    return got


@functools.cache
def one_device(cfg: ModelConfig) -> dict[str, list[int]]:
    """Tokens of each answer without a mesh."""
    return answers(cfg, "")


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (DENSE, "fsdp=1,tensor=4"),
        (DENSE, "fsdp=1,tensor=8,kv_heads=replicated"),
        (SPARSE, "fsdp=1,expert=2,tensor=2"),
    ],
    ids=["tensor", "replicated", "experts"],
)
def test_a_mesh_changes_no_answer(cfg, text):
    assert answers(cfg, text) == one_device(cfg)


def test_a_draft_guesses_on_a_mesh():
    guessing = answers(DENSE, "fsdp=1,tensor=4", speculation="draft", guesses=3)
    assert guessing == one_device(DENSE)


def test_a_mesh_of_replicas_is_refused():
    with pytest.raises(ValueError, match="shares out its model over tensor and expert"):
        answers(DENSE, "data=2,fsdp=1,tensor=2")
