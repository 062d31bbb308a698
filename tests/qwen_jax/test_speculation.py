"""Speculation changes no token (`verify`) and no distribution (`accept`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import schema
from qwen_jax import sampling, speculation

V, K = 12, 3
EOS = np.array([11], np.int32)
# A model of two tokens' memory: logits by the last token.
TABLE_VV = 1.5 * np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)
DRAFT_VV = TABLE_VV + np.random.default_rng(1).standard_normal((V, V)).astype(np.float32)

REQUESTS = [
    schema.Sampling(temperature=0.0, max_tokens=40),
    schema.Sampling(seed=5, max_tokens=40),
    schema.Sampling(top_k=4, top_p=0.9, temperature=0.7, logprobs=3, max_tokens=40),
    schema.Sampling(frequency_penalty=0.7, presence_penalty=0.5, max_tokens=40, ignore_eos=True),
    schema.Sampling(repetition_penalty=1.3, min_tokens=20, seed=9, max_tokens=40),
]
B = len(REQUESTS)
ARRAYS = sampling.settings(REQUESTS, num_rows=B)
SEEN_BV = np.arange(V)[None] == np.array([[2]] * B)
_draw = functools.partial(jax.jit, static_argnames=("how",))(sampling.draw)


@jax.jit
def verify(logits_BTV, drafts_BK, lengths_B, positions_B, generated_B, counts_BV):
    draw = functools.partial(sampling.draw, how="full", seen_BV=SEEN_BV)
    return speculation.verify(
        logits_BTV, drafts_BK, draw=draw, settings=ARRAYS, lengths_B=lengths_B,
        positions_B=positions_B, generated_B=generated_B, eos_E=EOS, counts_BV=counts_BV,
    )  # fmt: skip


def alone(num_tokens: int) -> list[list[int]]:
    """Answers to the prompt [2] without speculation, one token at a time."""
    tokens_B, counts_BV = np.full(B, 2), np.zeros((B, V), np.int32)
    answers: list[list[int]] = [[] for _ in range(B)]
    for step in range(num_tokens):
        drawn = _draw(
            TABLE_VV[tokens_B], ARRAYS, how="full", positions_B=np.full(B, 1 + step),
            generated_B=np.full(B, step), eos_E=EOS, seen_BV=SEEN_BV, counts_BV=counts_BV,
        )  # fmt: skip
        tokens_B = np.asarray(drawn.tokens_B)
        counts_BV[np.arange(B), tokens_B] += 1
        for row, token in enumerate(tokens_B):
            if not answers[row] or not ended(answers[row][-1], row):
                answers[row].append(int(token))
    return answers


def ended(token: int, row: int) -> bool:
    return token == EOS[0] and not REQUESTS[row].ignore_eos


@pytest.mark.parametrize("drafter", ["perfect", "poor", "mixed", "short"])
def test_verified_answers_are_those_without_speculation(drafter):
    length, rng = 24, np.random.default_rng(3)
    want = alone(length)
    answers, counts_BV = [[] for _ in range(B)], np.zeros((B, V), np.int32)
    rounds = 0
    while any(len(answers[row]) < len(want[row]) for row in range(B)):
        rounds += 1
        drafts_BK = rng.integers(0, V, (B, K))
        for row in range(B):
            coming = want[row][len(answers[row]) :][:K]
            known = {"poor": 0, "mixed": rng.integers(0, K + 1)}.get(drafter, K)
            drafts_BK[row, : min(known, len(coming))] = coming[:known]
        lengths_B = np.full(B, 1 if drafter == "short" else K)
        counts = np.array([len(answer) for answer in answers])
        last_B = np.array([([2] + answer)[-1] for answer in answers])
        before_BT = np.concatenate([last_B[:, None], drafts_BK], axis=1)
        got = verify(TABLE_VV[before_BT], drafts_BK, lengths_B, 1 + counts, counts, counts_BV)
        for row in range(B):
            new = np.asarray(got.tokens_BT)[row]
            assert (new != speculation.PAD).sum() == got.num_B[row] <= lengths_B[row] + 1
            answers[row] += new[: got.num_B[row]].tolist()
            counts_BV[row] = np.asarray(got.counts_BV)[row]
            assert counts_BV[row].sum() == len(answers[row])
            if len(answers[row]) >= len(want[row]):  # so that the next round's row is harmless
                answers[row] = answers[row][: len(want[row])]
                assert answers[row] == want[row]
                counts_BV[row] = np.bincount(answers[row], minlength=V)
        assert got.logprobs.top.shape[:2] == (B, K + 1)
    assert rounds <= {"perfect": length // (K + 1) + 1, "short": length // 2 + 1}.get(drafter, 99)


@functools.partial(jax.jit, static_argnames=("N",))
def _rounds(first: jax.Array, settings, lengths, *, N: int):
    """N rounds of `accept`: drafts sampled from DRAFT, one chain a row -> drafts, outcome."""
    settings = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape[1:])), settings)
    settings = dataclasses.replace(settings, seed_B=jnp.arange(N, dtype=jnp.uint32))
    seeds_N = speculation.draft_seeds(settings.seed_B)
    token_N, drafts, scores = jnp.broadcast_to(first, (N,)), [], []
    for k in range(K):
        shaped_NV = sampling.narrowed(jnp.asarray(DRAFT_VV)[token_N], settings)
        noise_NV = sampling.noise(seeds_N, jnp.full(N, 7 + k), vocab_size=V)
        token_N = sampling.argmax(shaped_NV + noise_NV)
        drafts.append(token_N)
        scores.append(shaped_NV)
    drafts_NK = jnp.stack(drafts, axis=1)
    before_NT = jnp.concatenate([jnp.broadcast_to(first, (N, 1)), drafts_NK], axis=1)
    target_NTV = jax.vmap(lambda x: sampling.narrowed(x, settings), in_axes=1, out_axes=1)(
        jnp.asarray(TABLE_VV)[before_NT]
    )
    found = speculation.accept(
        target_NTV, drafts_NK, draft_scores_BKV=jnp.stack(scores, axis=1), settings=settings,
        lengths_B=jnp.broadcast_to(lengths, (N,)), positions_B=jnp.full(N, 7),
    )  # fmt: skip
    return drafts_NK, found


@pytest.mark.parametrize("values", [{}, {"top_k": 4}, {"top_p": 0.8, "temperature": 1.4}], ids=str)
@pytest.mark.parametrize("length", [K, 1, 0])
def test_accepted_tokens_follow_the_targets_distribution(values, length):
    """The first two tokens of a round, given that there are two: p(a) p(b | a)."""
    N = 20_000
    settings = sampling.settings([schema.Sampling(**values)], num_rows=1)
    drafts_NK, found = _rounds(jnp.int32(2), settings, jnp.int32(length), N=N)
    num_N, next_N = np.asarray(found.num_B), np.asarray(found.tokens_B)
    assert num_N.max() == length
    first_N = np.where(num_N > 0, np.asarray(drafts_NK)[:, 0], next_N)
    p_VV = np.asarray(
        jax.nn.softmax(sampling.narrowed(TABLE_VV, sampling.settings(
            [schema.Sampling(**values)] * V, num_rows=V)), axis=-1)
    )  # fmt: skip
    follows(np.bincount(first_N, minlength=V), p_VV[2])
    if length > 1:
        second_N = np.where(num_N > 1, np.asarray(drafts_NK)[:, 1], next_N)
        # Only after a draft that stood is there a second token.
        chosen = {a: (num_N > 0) & (first_N == a) for a in range(V)}
        often = [a for a in chosen if chosen[a].sum() > 1000]
        assert len(often) >= 2
        for a in often:
            follows(np.bincount(second_N[chosen[a]], minlength=V), p_VV[a])


def follows(counts_V: np.ndarray, want_V: np.ndarray) -> None:
    """Pearson's test at 4.5 sigma, by Wilson and Hilferty's approximation."""
    count = counts_V.sum()
    assert counts_V[want_V == 0].sum() == 0
    likely = want_V * count >= 5
    expected = np.append(want_V[likely], want_V[~likely].sum()) * count
    observed = np.append(counts_V[likely], counts_V[~likely].sum())
    keep = expected > 0
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    degrees = keep.sum() - 1
    z = ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))
    assert z < 4.5


def test_as_many_drafts_stand_as_the_two_distributions_share():
    N = 20_000
    settings = sampling.settings([schema.Sampling()], num_rows=1)
    _, found = _rounds(jnp.int32(2), settings, jnp.int32(1), N=N)
    p_V, q_V = jax.nn.softmax(TABLE_VV[2]), jax.nn.softmax(DRAFT_VV[2])
    share = float(np.minimum(p_V, q_V).sum())
    assert abs(np.asarray(found.num_B).mean() - share) < 5 * np.sqrt(share * (1 - share) / N)


def test_greedy_keeps_exactly_what_it_would_have_said():
    settings = sampling.settings([schema.Sampling(temperature=0.0)] * 4, num_rows=4)
    path = [2]
    for _ in range(K + 1):
        path.append(int(np.argmax(TABLE_VV[path[-1]])))
    drafts_BK = np.array([path[1 : K + 1]] * 4)
    drafts_BK[1, 1] = (drafts_BK[1, 1] + 1) % V
    drafts_BK[2, 0] = (drafts_BK[2, 0] + 1) % V
    scores_BTV = TABLE_VV[np.concatenate([np.full((4, 1), 2), drafts_BK], axis=1)]
    found = speculation.accept(
        scores_BTV, drafts_BK, draft_scores_BKV=np.zeros((4, K, V), np.float32),
        settings=settings, lengths_B=np.array([K, K, K, 2]), positions_B=np.arange(4),
    )  # fmt: skip
    assert found.num_B.tolist() == [K, 1, 0, 2]
    assert found.tokens_B.tolist() == [path[K + 1], path[2], path[1], path[3]]
