"""Sampling against transformers' processors, and its independence of the batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.sampling import SamplingParams
from qwen_jax.decode import sampling

V = 200  # no multiple of 32 or 128
EOS = np.array([3, 4], np.int32)


def logits_of(seed: int, rows: int = 1, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32)


@jax.jit
def _processed(logits_BV, settings, generated_B, seen_BV, counts_BV, mask_BW):
    scores_BV = sampling.edited(
        logits_BV, settings, generated_B=generated_B, eos_E=EOS, seen_BV=seen_BV,
        counts_BV=counts_BV, mask_BW=mask_BW,
    )  # fmt: skip
    return sampling.narrowed(scores_BV, settings)


_draw = functools.partial(jax.jit, static_argnames=("sampler",))(sampling.draw)


def told(rows: int, *, prompts=None, answers=None, allowed_BV=None) -> dict:
    """What `draw` and `edited` are told of `rows` rows, beside their settings."""
    prompts, answers = prompts or [[]] * rows, answers or [[]] * rows
    seen_BV = np.zeros((rows, V), bool)
    counts_BV = np.zeros((rows, V), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        seen_BV[row, prompt] = True
        np.add.at(counts_BV[row], answer, 1)
    bits_BV = np.ones((rows, -(-V // 32) * 32), bool)
    if allowed_BV is not None:
        bits_BV[:, :V] = allowed_BV
    return {
        "generated_B": np.array([len(answer) for answer in answers], np.int32),
        "seen_BV": seen_BV,
        "counts_BV": counts_BV,
        "mask_BW": np.packbits(bits_BV, axis=1, bitorder="little").view(np.uint32),
    }


def processed(logits_BV, requests, **knowledge) -> np.ndarray:
    arrays = sampling.settings(requests, num_rows=len(requests))
    return np.asarray(_processed(logits_BV, arrays, **told(len(requests), **knowledge)))


def draw(logits_BV, requests, positions_B, **knowledge) -> sampling.Drawn:
    arrays = sampling.settings(requests, num_rows=len(requests))
    drawn = _draw(
        logits_BV, arrays, sampler="full", positions_B=positions_B, eos_E=EOS,
        **told(len(requests), **knowledge),
    )  # fmt: skip
    return jax.tree.map(np.asarray, drawn)


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
    request = SamplingParams(**values)
    logits_1V = logits_of(seed)
    context = np.random.default_rng(seed).integers(0, V, (1, 30))
    want = transformers_scores(request, logits_1V, context)
    known = {"prompts": [context[0, :20]] * 2, "answers": [context[0, 20:]] * 2}
    # In company that asks for everything, and alone.
    other = SamplingParams(top_p=0.3, repetition_penalty=1.5, logit_bias=((3, 5.0),), top_k=7)
    got = processed(np.concatenate([logits_of(9), logits_1V]), [other, request], **known)[1:]
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    kept = np.isfinite(want)
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-6)
    alone = processed(np.concatenate([logits_1V] * 2), [request, request], **known)
    np.testing.assert_array_equal(alone, np.concatenate([got] * 2))


def transformers_scores(request: SamplingParams, logits: np.ndarray, context) -> np.ndarray:
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


everything = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.sampled_from([0, 5, 11]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 20, 150, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.05, 2.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.6]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-50, 50, width=16), max_size=4).map(
        lambda found: tuple(found.items())
    ),
    stop_token_ids=st.sampled_from([(), (7,), (9, 11)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 5]),
    seed=st.integers(0, 2**32 - 1),
)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(everything, min_size=2, max_size=2), st.integers(0, 1000), st.booleans())
def test_combinations_are_those_of_transformers(requests, seed, constrained):
    pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    logits_BV = logits_of(seed, rows=2)
    prompts = [rng.integers(0, V, 12) for _ in requests]
    answers = [rng.integers(0, 30, rng.integers(0, 20)) for _ in requests]
    allowed_BV = rng.random((2, V)) < (0.5 if constrained else 2.0)
    got_BV = processed(logits_BV, requests, prompts=prompts, answers=answers, allowed_BV=allowed_BV)
    for row, request in enumerate(requests):
        want_V = reference(request, logits_BV[row], prompts[row], answers[row], allowed_BV[row])
        np.testing.assert_array_equal(np.isfinite(got_BV[row]), np.isfinite(want_V))
        kept_V = np.isfinite(want_V)
        np.testing.assert_allclose(got_BV[row][kept_V], want_V[kept_V], rtol=2e-5, atol=1e-5)


def reference(request, logits_V, prompt, answer, allowed_V) -> np.ndarray:
    """transformers' processors one by one; OpenAI's penalties by their formula."""
    import torch
    from transformers.generation import logits_process as processors

    context = torch.tensor(np.concatenate([prompt, answer]))[None]
    scores = torch.tensor(logits_V)[None]
    if request.logit_bias:
        bias = {(token,): value for token, value in request.logit_bias if value}
        scores = processors.SequenceBiasLogitsProcessor(bias)(context, scores) if bias else scores
    ends = [*request.stop_token_ids, *([] if request.ignore_eos else EOS.tolist())]
    if request.min_tokens and ends:
        scores = processors.MinNewTokensLengthLogitsProcessor(
            len(prompt), request.min_tokens, ends, device="cpu"
        )(context, scores)
    scores = torch.where(torch.tensor(allowed_V), scores, -torch.inf)
    penalty = processors.RepetitionPenaltyLogitsProcessor(request.repetition_penalty)
    scores = penalty(context, scores)
    counts = torch.bincount(torch.tensor(answer), minlength=V).float()
    scores = scores - request.frequency_penalty * counts - request.presence_penalty * (counts > 0)
    if request.temperature > 0:
        warpers = [processors.TemperatureLogitsWarper(request.temperature)]
        if request.top_k:
            warpers.append(processors.TopKLogitsWarper(request.top_k))
        warpers.append(processors.TopPLogitsWarper(request.top_p))
        if request.min_p:
            warpers.append(processors.MinPLogitsWarper(request.min_p))
        for warp in warpers:
            scores = warp(context, scores)
    return scores[0].numpy()


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
    request = SamplingParams(**values)
    want_V = np.asarray(jax.nn.softmax(processed(logits_V[None], [request])[0]))
    logits_BV = jnp.broadcast_to(logits_V, (2000, V))
    parts = np.split(np.arange(count), 10)
    drawn = np.concatenate([draw(logits_BV, [request] * 2000, part).tokens_B for part in parts])
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


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.lists(everything, min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_batch(rows, random):
    logits_BV = logits_of(5, rows=len(rows))
    positions_B = np.array([random.randrange(1000) for _ in rows])
    answers = [[random.randrange(V) for _ in range(random.randrange(12))] for _ in rows]
    together = draw(logits_BV, rows, positions_B, answers=answers)
    order = random.sample(range(len(rows)), len(rows))
    shuffled = draw(
        logits_BV[order], [rows[i] for i in order], positions_B[order],
        answers=[answers[i] for i in order],
    )  # fmt: skip
    for i, row in enumerate(rows):
        alone = draw(logits_BV[[i]], [row], positions_B[[i]], answers=[answers[i]])
        assert together.tokens_B[i] == shuffled.tokens_B[order.index(i)] == alone.tokens_B[0]
        if row.logprobs is not None:
            same = jax.tree.map(lambda a, b, i=i: np.array_equal(a[i], b[0]), together, alone)
            assert all(jax.tree.leaves(same))


def test_greedy_is_what_full_does_for_who_asks_nothing():
    logits_BV = jnp.asarray(logits_of(1, rows=5), jnp.bfloat16)
    requests = [SamplingParams(temperature=0.0)] * 5
    arrays = sampling.settings(requests, num_rows=5)
    common = {"positions_B": np.arange(5), "eos_E": EOS, **told(5)}
    greedy = _draw(logits_BV, arrays, sampler="greedy", **common)
    want_B = np.argmax(np.asarray(logits_BV, np.float32), axis=-1)
    assert greedy.logprobs is None and greedy.tokens_B.tolist() == want_B.tolist()
    assert draw(logits_BV, requests, np.arange(5)).tokens_B.tolist() == want_B.tolist()


def test_logprobs_are_of_the_distribution_sampled_and_of_the_model():
    request = SamplingParams(top_k=3, temperature=0.5, logprobs=2)
    logits_BV = logits_of(2, rows=2)
    greedy = SamplingParams(temperature=0.0, logprobs=0)
    drawn = draw(logits_BV, [request, greedy], np.zeros(2, np.int64))
    raw_BV = np.asarray(jax.nn.log_softmax(logits_BV))
    token, likeliest = drawn.tokens_B
    shaped_V = np.asarray(jax.nn.log_softmax(processed(logits_BV[:1], [request])[0]))
    np.testing.assert_allclose(drawn.logprobs.drawn, [shaped_V[token], 0.0], rtol=1e-5)
    np.testing.assert_allclose(drawn.logprobs.raw, raw_BV[[0, 1], [token, likeliest]], rtol=1e-5)
    assert drawn.logprobs.top_ids[0, :2].tolist() == np.argsort(-raw_BV[0])[:2].tolist()


def test_a_bias_forces_and_forbids_but_does_not_outdo_min_tokens_or_a_grammar():
    force = SamplingParams(logit_bias=((17, 100.0),), max_tokens=9)
    forbid = SamplingParams(temperature=0.0, logit_bias=((0, -100.0),))
    end = SamplingParams(logit_bias=((3, 100.0), (5, 90.0)), min_tokens=2, max_tokens=9)
    logits_BV = np.zeros((4, V), np.float32)
    allowed_BV = np.ones((4, V), bool)
    allowed_BV[3, 17] = False
    rows = [force, forbid, end, force]
    answers = [[], [], [1], []]
    drawn = draw(logits_BV, rows, np.arange(4), answers=answers, allowed_BV=allowed_BV)
    assert drawn.tokens_B[:3].tolist() == [17, 1, 5] and drawn.tokens_B[3] != 17
    answers[2] = [1, 1]
    drawn = draw(logits_BV, rows, np.arange(4), answers=answers, allowed_BV=allowed_BV)
    assert drawn.tokens_B[2] == 3


def test_a_row_that_may_draw_nothing_says_so():
    rows = [SamplingParams(logprobs=0), SamplingParams(top_p=0.9, top_k=5, logprobs=0)]
    allowed_BV = np.zeros((2, V), bool)
    allowed_BV[1, 150] = True
    drawn = draw(logits_of(0, rows=2), rows, np.arange(2), allowed_BV=allowed_BV)
    assert drawn.tokens_B.tolist() == [0, 150]
    assert drawn.logprobs.drawn.tolist() == [-np.inf, 0.0]


def test_what_ends_an_answer():
    rows = [
        SamplingParams(),
        SamplingParams(ignore_eos=True),
        SamplingParams(ignore_eos=True, stop_token_ids=(8, 3)),
    ]
    arrays = sampling.settings(rows, num_rows=3)
    ended = [sampling.ends(np.full(3, token), arrays, eos_E=EOS).tolist() for token in (3, 4, 8, 9)]
    assert ended == [[True, False, True], [True, False, False], [False, False, True], [False] * 3]


def test_seed_and_position_change_the_draw():
    request = SamplingParams(temperature=2.0)
    logits_BV = np.zeros((50, V), np.float32)
    by_position = draw(logits_BV, [request] * 50, np.arange(50)).tokens_B
    seeds = [dataclasses.replace(request, seed=i) for i in range(50)]
    by_seed = draw(logits_BV, seeds, np.zeros(50, np.int64)).tokens_B
    assert len(set(by_position)) > 30 and len(set(by_seed)) > 30
    largest = [dataclasses.replace(request, seed=2**32 - 1)]
    assert draw(logits_BV[:1], largest, np.zeros(1, np.int64)).tokens_B[0] < V


@pytest.mark.parametrize("size", [1, 7, 128, 151936 // 64, 1024])
def test_argmax_is_the_first_of_the_largest(size):
    scores = np.random.default_rng(0).integers(0, 3, (6, size)).astype(np.float32)
    scores[5] = -np.inf
    np.testing.assert_array_equal(sampling.argmax(scores), np.argmax(scores, axis=-1))


@pytest.mark.parametrize(
    ("values", "sampler"),
    [
        ({"top_p": 0.5, "seed": 3, "stop_token_ids": (5,), "ignore_eos": True}, "greedy"),
        ({"max_tokens": 0, "prompt_logprobs": 3}, "greedy"),
        ({"temperature": 1.0}, "full"),
        ({"min_tokens": 1}, "full"),
        ({"logit_bias": ((1, 1.0),)}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
        ({"presence_penalty": 0.1}, "full"),
        ({"frequency_penalty": 0.1}, "full"),
        ({"logprobs": 0}, "full"),
    ],
    ids=str,
)
def test_the_sampler_is_the_least_general_that_serves(values, sampler):
    assert sampling.sampler(SamplingParams(**{"temperature": 0.0, **values})) == sampler


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
        (
            {"logit_bias": ((7, float("inf")),)},
            r"entry \(7, inf\) entry inf must be finite",
        ),
        ({"logit_bias": ((0, 1.0),) * 301}, "logit_bias has 301 tokens; at most 300"),
    ],
    ids=str,
)
def test_settings_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)
