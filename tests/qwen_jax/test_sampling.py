"""Sampling against transformers' processors, and its independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs import schema
from qwen_jax import sampling

V = 200


def logits_of(seed: int, rows: int = 1, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32)


def processed(logits_BV, requests, *, seen_BV=None, plan=None) -> np.ndarray:
    arrays = sampling.settings(requests, num_rows=len(requests))
    plan = plan or sampling.plan(requests)
    return np.asarray(sampling.processed(logits_BV, arrays, plan=plan, seen_BV=seen_BV))


def draw(logits_BV, requests, positions_B, *, num_rows=None) -> np.ndarray:
    arrays = sampling.settings(requests, num_rows=num_rows or len(requests))
    plan = sampling.plan(requests)
    return np.asarray(sampling.sample(logits_BV, arrays, plan=plan, positions_B=positions_B))


SETTINGS = [
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    {"temperature": 1.7, "top_p": 0.5, "repetition_penalty": 0.8},
    {"top_k": 1},
    {"top_k": 150, "min_p": 0.02},
    {"top_k": 10**6},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.05, "temperature": 2.0},
    {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "temperature": 0.4},
    {"repetition_penalty": 1.2, "temperature": 0.0},
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_those_of_transformers(values, seed):
    pytest.importorskip("torch")
    request = schema.Sampling(**values)
    logits_1V = logits_of(seed)
    context = np.random.default_rng(seed).integers(0, V, (1, 30))
    want = transformers_scores(request, logits_1V, context)
    seen_BV = sampling.mark_seen(context, np.array([30]), vocab_size=V)
    got = processed(logits_1V, [request], seen_BV=seen_BV)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    kept = np.isfinite(want)
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-6)
    # In company that needs the whole vocabulary sorted and a penalty, nothing changes.
    other = schema.Sampling(top_p=0.3, repetition_penalty=1.5)
    both = processed(
        np.concatenate([logits_of(9), logits_1V]),
        [other, request],
        seen_BV=np.concatenate([~seen_BV, seen_BV]),
    )
    np.testing.assert_array_equal(np.isfinite(both[1]), kept[0])


def transformers_scores(request: schema.Sampling, logits: np.ndarray, context) -> np.ndarray:
    """What `generate` would build from these settings, in its own order."""
    import torch
    import transformers
    from transformers.generation.utils import GenerationMixin

    class Bare(GenerationMixin):
        config = transformers.Qwen2Config()

    config = transformers.GenerationConfig(
        do_sample=request.temperature > 0,
        temperature=request.temperature or None,
        top_k=request.top_k or None,
        top_p=request.top_p,
        min_p=request.min_p or None,
        repetition_penalty=request.repetition_penalty,
    )
    processors = Bare()._get_logits_processor(
        config, input_ids_seq_length=context.shape[1], device="cpu", logits_processor=[]
    )
    return processors(torch.tensor(context), torch.tensor(logits)).numpy()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.5},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 0.8},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(values):
    count = 20_000
    logits_V = logits_of(3, scale=1.5)[0]
    request = schema.Sampling(**values)
    want_V = np.asarray(jax.nn.softmax(processed(logits_V[None], [request])[0]))
    arrays = sampling.settings([request], num_rows=1)
    plan = sampling.plan([request])
    drawn = jax.jit(
        jax.vmap(
            lambda position: sampling.sample(
                logits_V[None], arrays, plan=plan, positions_B=position[None]
            )[0]
        )
    )(jnp.arange(count))
    counts_V = np.bincount(np.asarray(drawn), minlength=V)
    assert counts_V[want_V == 0].sum() == 0
    likely = want_V * count >= 5
    expected = np.append(want_V[likely], want_V[~likely].sum()) * count
    observed = np.append(counts_V[likely], counts_V[~likely].sum())
    keep = expected > 0
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    # Wilson and Hilferty's normal approximation; 4.5 sigma.
    z = ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))
    assert z < 4.5


requests = st.builds(
    schema.Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 20, 40, 150]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_batch(rows, random):
    logits_BV = logits_of(5, rows=len(rows))
    positions_B = np.array([random.randrange(1000) for _ in rows])
    together = draw(logits_BV, rows, positions_B)
    order = random.sample(range(len(rows)), len(rows))
    shuffled = draw(logits_BV[order], [rows[i] for i in order], positions_B[order])
    alone = [draw(logits_BV[[i]], [row], positions_B[[i]])[0] for i, row in enumerate(rows)]
    assert together.tolist() == alone
    assert shuffled.tolist() == [alone[i] for i in order]


def test_seed_and_position_change_the_draw():
    request = schema.Sampling(temperature=2.0)
    logits_BV = np.zeros((50, V), np.float32)
    by_position = draw(logits_BV, [request] * 50, np.arange(50))
    seeds = [dataclasses.replace(request, seed=i) for i in range(50)]
    by_seed = draw(logits_BV, seeds, np.zeros(50, np.int64))
    assert len(set(by_position)) > 30 and len(set(by_seed)) > 30
    largest = [dataclasses.replace(request, seed=2**32 - 1)]
    assert draw(logits_BV[:1], largest, np.zeros(1, np.int64))[0] < V


@pytest.mark.parametrize("size", [1, 7, 128, 151936 // 64, 1024])
def test_argmax_is_the_first_of_the_largest(size):
    scores = np.random.default_rng(0).integers(0, 3, (6, size)).astype(np.float32)
    scores[5] = -np.inf
    np.testing.assert_array_equal(sampling.argmax(scores), np.argmax(scores, axis=-1))


def test_seen_tokens_are_those_before_the_length():
    seen_BV = sampling.mark_seen(np.array([[3, 3, 1], [0, 2, 4]]), np.array([2, 1]), vocab_size=5)
    assert [set(np.flatnonzero(row).tolist()) for row in seen_BV] == [{3}, {0}]


def test_the_plan_is_no_more_than_needed():
    make = schema.Sampling
    greedy, plain = make(temperature=0.0, top_p=0.5), make()
    assert sampling.plan([greedy]) == sampling.Plan()
    assert sampling.plan([greedy, plain]) == sampling.Plan(greedy=False)
    assert sampling.plan([plain, make(top_k=20, top_p=0.8)]).candidates == 32
    assert sampling.plan([make(top_k=20), make(top_k=33)]).candidates == 128
    assert sampling.plan([make(top_k=20), make(top_p=0.8)]).candidates == -1
    assert sampling.plan([make(top_k=5000)]).candidates == -1
    assert sampling.plan([make(temperature=0.0, repetition_penalty=1.1)]).penalty


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, r"top_p=0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
    ids=str,
)
def test_settings_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        schema.Sampling(**values)
