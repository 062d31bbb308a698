"""Decoding on 8 fake CPU devices gives one device's tokens; in a process of its own."""

import os
import subprocess
import sys

PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from configs import qwen2_5, schema
from partitioning import mesh as mesh_lib, rules, sharding
from qwen_jax import decode, generation, model

jax.config.update("jax_default_matmul_precision", "highest")
cfg = dataclasses.replace(
    qwen2_5.tiny(), vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=8, tie_word_embeddings=False,
)

def params():
    leaves, tree = jax.tree.flatten(model.shapes(cfg))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)) for x in leaves]
    return tree.unflatten(drawn)

rng = np.random.default_rng(0)
settings = [
    schema.Sampling(temperature=0.0, max_tokens=9),
    schema.Sampling(temperature=1.0, top_k=10, top_p=0.9, seed=3, max_tokens=14),
    schema.Sampling(temperature=0.8, repetition_penalty=1.2, seed=4, max_tokens=3),
]
requests = [
    generation.request(cfg, rng.integers(1, 256, n), settings=s)
    for n, s in zip((4, 19, 11), settings)
]

def tokens(params, layout):
    drawn = [[] for _ in requests]
    pieces = generation.generate(
        cfg, params, requests, eos_ids=(5,), dtype=jnp.float32, num_steps=4, layout=layout
    )
    for piece in pieces:
        drawn[piece.row] += piece.tokens
    return drawn

compiled = []

def listen(event, duration, **_):
    if event.endswith("backend_compile_duration"):
        compiled.append(event)

jax.monitoring.register_event_duration_secs_listener(listen)
one = tokens(decode.prepare(cfg, params(), dtype=jnp.float32, form="stacked"), None)
for text, form in (pair.split(":") for pair in sys.argv[1:]):
    config = mesh_lib.parse(text)
    layout = sharding.Layout(
        mesh_lib.make(config), rules.rule_set("decode", kv_heads=config.kv_heads)
    )
    placed = jax.device_put(params(), sharding.shardings(model.axes(cfg), layout))
    best = decode.best_form(layout)
    placed = decode.prepare(
        cfg, placed, dtype=jnp.float32, form=best if form == "best" else form, layout=layout
    )
    many = tokens(placed, layout)
    assert many == one, (text, many, one)
    compiled.clear()
    assert tokens(placed, layout) == one
    assert not compiled, f"{text}: a bucket was compiled again"
    if best == "fused" and form == "best":
        spec = placed["layers"][0]["attention"]["qkv"]["kernel"].sharding.spec
        assert spec == jax.sharding.PartitionSpec(None, "tensor"), spec
    print(text, best)
"""


def test_sharded_decoding_equals_one_device():
    cases = ("tensor=4,data=2:best", "fsdp=8:stacked", "tensor=8,kv_heads=replicated:best")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "tensor=4,data=2 fused",
        "fsdp=8 fused",
        "tensor=8,kv_heads=replicated unstacked",
    ]
