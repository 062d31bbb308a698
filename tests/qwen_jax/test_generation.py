"""Batches of requests: each row as if alone, in few programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import qwen2_5, schema
from qwen_jax import decode, generation, kv_cache, model

CFG = dataclasses.replace(
    qwen2_5.tiny(),
    vocab_size=256,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    head_dim=8,
    max_position_embeddings=200,
)


@pytest.fixture(scope="module")
def params():
    leaves, tree = jax.tree.flatten(model.shapes(CFG))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)) for x in leaves]
    return decode.prepare(CFG, tree.unflatten(drawn), dtype=jnp.float32, form="stacked")


def requests_of(*specs: tuple[int, dict]) -> list[generation.Request]:
    rng = np.random.default_rng(1)
    return [
        generation.request(
            CFG, rng.integers(1, CFG.vocab_size, n), settings=schema.Sampling(**values)
        )
        for n, values in specs
    ]


def complete(params, requests, *, eos_ids=(), num_steps=16) -> list[tuple[list[int], str]]:
    tokens, reasons = [[] for _ in requests], [None for _ in requests]
    pieces = generation.generate(
        CFG, params, requests, eos_ids=eos_ids, dtype=jnp.float32, num_steps=num_steps
    )
    for piece in pieces:
        assert reasons[piece.row] is None, "nothing comes after the end"
        tokens[piece.row] += piece.tokens
        reasons[piece.row] = piece.finish_reason
    return list(zip(tokens, reasons, strict=True))


MIXED = (
    (3, {"temperature": 0.0, "max_tokens": 40}),
    (17, {"temperature": 0.9, "seed": 5, "max_tokens": 25}),
    (40, {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "seed": 6, "max_tokens": 33}),
    (9, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 1}),
    (30, {"temperature": 0.0, "repetition_penalty": 1.3, "max_tokens": 30}),
)


def test_a_batch_is_each_request_alone(params):
    requests = requests_of(*MIXED)
    together = complete(params, requests, eos_ids=(7, 11))
    alone = [complete(params, [request], eos_ids=(7, 11))[0] for request in requests]
    assert together == alone
    assert complete(params, requests, eos_ids=(7, 11), num_steps=5) == together


def test_every_eos_stops_and_max_tokens_ends(params):
    (request,) = requests_of((5, {"temperature": 1.5, "seed": 3, "max_tokens": 50}))
    free, reason = complete(params, [request])[0]
    assert (len(free), reason) == (50, "length")
    for eos in (free[0], free[20], free[49]):
        first = free.index(eos)
        for eos_ids in ((eos,), (eos, 250)):
            if 250 in free[:first]:
                continue
            got = complete(params, [request], eos_ids=eos_ids)[0]
            assert got == (free[: first + 1], "stop")


def test_a_bucket_compiles_once(params):
    first = requests_of((5, {"max_tokens": 40}), (20, {"max_tokens": 9, "seed": 4}))
    second = requests_of((31, {"max_tokens": 30, "seed": 9}), (1, {"max_tokens": 2, "seed": 8}))
    complete(params, first)
    before = decode.compilations.copy()
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        complete(params, second)
        assert decode.compilations == before
        assert not compiled
        complete(params, requests_of((70, {"max_tokens": 30})))
        assert compiled and decode.compilations != before
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_requests_are_refused_with_the_limit():
    settings = schema.Sampling(max_tokens=100)
    with pytest.raises(ValueError, match="prompt of 101 tokens with max_tokens=100.*=200 of tiny"):
        generation.request(CFG, [1] * 101, settings=settings)
    assert len(generation.request(CFG, [1] * 100, settings=settings).tokens) == 100
    with pytest.raises(ValueError, match="token 256 is outside the vocabulary of 256"):
        generation.request(CFG, [1, 256], settings=settings)
    with pytest.raises(ValueError, match="prompt is empty and tiny has no bos_token_id"):
        generation.request(CFG, [], settings=settings)
    with_bos = dataclasses.replace(CFG, bos_token_id=4)
    assert generation.request(with_bos, [], settings=settings).tokens == (4,)


def test_the_longest_request_runs_to_the_model_limit(params):
    (request,) = requests_of((190, {"temperature": 0.0, "max_tokens": 10}))
    assert generation.shape(CFG, [request])[1] == 200
    tokens, reason = complete(params, [request])[0]
    assert (len(tokens), reason) == (10, "length")


@given(st.integers(1, 100_000))
def test_buckets_hold_and_waste_little(n):
    cfg = dataclasses.replace(CFG, max_position_embeddings=131_072)
    assert n <= generation.prompt_bucket(cfg, n) < max(2 * n, 17)
    assert n <= generation.cache_bucket(n) <= max(1.5 * n, 64)
    assert n <= generation.batch_bucket(n) < 2 * n + 1


def test_memory_estimate_covers_the_cache():
    cache = kv_cache.num_bytes(CFG, num_slots=4, length=96, dtype=jnp.float32)
    got = generation.num_bytes(CFG, rows=4, prompt=64, cache=96, dtype=jnp.float32)
    logits = 4 * CFG.vocab_size * 4
    assert cache + logits < got < 40 * (cache + logits)
