"""Scores over an engine: of each pair alone, whatever its neighbours and the order of answers."""

import numpy as np
import pytest

from configs.sampling import SamplingParams
from infer.eval.service_backend import ServiceBackend
from infer.text.service import Service
from qwen_jax.tasks import backend as backend_lib
from qwen_jax.tasks.backend import GenerationRequest, ScoringRequest
from tests.infer import fake_engine
from tests.infer.eval import standin

SETTINGS = SamplingParams(max_tokens=40, temperature=0.0)
CONTEXT = tuple(range(40, 60))


def test_scores_are_those_of_each_pair_alone(loaded):
    ranked = np.argsort(-standin.logprobs(loaded, [*CONTEXT, 70])[-1], kind="stable")
    pairs = [
        *[ScoringRequest(CONTEXT, (70, int(last))) for last in ranked[:30]],
        ScoringRequest(CONTEXT, (71, 3)),
        *[ScoringRequest(CONTEXT[:5], tuple(range(90, 110)))] * 2,
        ScoringRequest((9,), (8,)),
    ]
    backend = standin.backend(loaded, num_open=3)
    engine = backend._service.engine
    got = dict(backend.loglikelihood(iter(pairs)))
    # One reading for the 20 likeliest last tokens, one for each of the other 10, 3 for the rest.
    assert (engine.num_scored, engine.most_open) == (1 + 10 + 3, 3)
    assert sorted(got) == list(range(len(pairs)))
    for index, pair in enumerate(pairs):
        [(_, alone)] = backend.loglikelihood([pair])
        assert alone.logprob == pytest.approx(got[index].logprob, abs=1e-6)
        assert alone.is_greedy == got[index].is_greedy


def test_a_score_is_the_sum_of_logprobs_of_the_continuation(loaded):
    pair = ScoringRequest(CONTEXT, (70, 101, 7))
    [(_, score)] = standin.backend(loaded).loglikelihood([pair])
    rows = standin.logprobs(loaded, [*CONTEXT, 70, 101, 7])
    want = sum(rows[len(CONTEXT) - 1 + i, token] for i, token in enumerate((70, 101, 7)))
    assert score.logprob == pytest.approx(float(want), abs=1e-4)
    greedy = int(np.argmax(rows[len(CONTEXT) - 1]))
    pairs = [ScoringRequest(CONTEXT, (greedy,)), ScoringRequest(CONTEXT, ((greedy + 1) % 200,))]
    assert [s.is_greedy for _, s in standin.backend(loaded).loglikelihood(pairs)] == [1, 0]


def fake(words, text: str, *, num_open: int = 8) -> ServiceBackend:
    """Whose engine answers everything with `text`, a few tokens at a time."""
    engine = fake_engine.FakeEngine(
        answer=lambda request: [*words.encode(text), words.eos_ids[0]],
        vocab_size=words.vocab_size,
        eos_ids=words.eos_ids,
    )
    service = Service(engine, tokenizer=words, defaults=SamplingParams())
    return ServiceBackend(service, max_length=engine.max_length, num_open=num_open)


def test_questions_are_taken_as_there_is_room(loaded):
    taken = []

    def prompts():
        for i in range(7):
            taken.append(i)
            yield GenerationRequest((40 + i,), SETTINGS)

    answers = fake(loaded.tokenizer, "an answer", num_open=2).generate(prompts())
    first = next(answers)
    assert first == (first[0], "an answer") and len(taken) == 2
    assert sorted((first, *answers)) == [(i, "an answer") for i in range(7)]


def test_a_stop_string_ends_an_answer(loaded):
    backend = fake(loaded.tokenizer, "one, two, three")
    asked = [
        GenerationRequest((40,), SETTINGS, (", t",)),
        GenerationRequest((41,), SETTINGS),
        GenerationRequest((42,), SETTINGS),
    ]
    want = {0: "one", 1: "one, two, three", 2: "one, two, three"}
    assert dict(backend.generate(asked)) == want
    assert backend._service.idle  # the cut answer left the engine too: the next call is alone
    want = {0: "one"}
    assert dict(backend.generate(asked[:1])) == want and backend._service.idle


def test_the_prefix_is_bos_then_eos(loaded):
    words = loaded.tokenizer
    assert backend_lib.prefix_id(words) == words.eos_ids[0]
