"""Scores over an engine: of each pair alone, whatever its neighbours and the order of answers."""

import numpy as np
import pytest

from configs import schema
from infer.eval import backend as backend_lib
from infer.eval.backend import Pair, Prompt
from tests.infer.eval import standin

CONTEXT = tuple(range(40, 60))


def logprobs(generator, tokens) -> np.ndarray:
    """[T, V]: of what follows each token."""
    tokens_BT = np.asarray([tokens], np.int32)
    return np.asarray(standin._logprobs(generator.cfg, generator.params, tokens_BT))[0]


def test_scores_are_those_of_each_pair_alone(generator):
    ranked = np.argsort(-logprobs(generator, [*CONTEXT, 70])[-1], kind="stable")
    pairs = [
        *[Pair(CONTEXT, (70, int(last))) for last in ranked[:30]],
        Pair(CONTEXT, (71, 3)),
        *[Pair(CONTEXT[:5], tuple(range(90, 120)))] * 2,
        Pair((9,), (8,)),
    ]
    backend = standin.backend(generator, num_open=3)
    engine = backend._service.engine
    got = dict(backend.loglikelihood(iter(pairs)))
    # One reading for the 20 likeliest last tokens, one for each of the other 10, 3 for the rest.
    assert (engine.num_scored, engine.most_open) == (1 + 10 + 3, 3)
    assert sorted(got) == list(range(len(pairs)))
    for index, pair in enumerate(pairs):
        [(_, alone)] = backend.loglikelihood([pair])
        assert alone.logprob == pytest.approx(got[index].logprob, abs=1e-6)
        assert alone.is_greedy == got[index].is_greedy


def test_a_score_is_the_sum_of_logprobs_of_the_continuation(generator):
    pair = Pair(CONTEXT, (70, 101, 7))
    [(_, score)] = standin.backend(generator).loglikelihood([pair])
    rows = logprobs(generator, [*CONTEXT, 70, 101, 7])
    want = sum(rows[len(CONTEXT) - 1 + i, token] for i, token in enumerate((70, 101, 7)))
    assert score.logprob == pytest.approx(float(want), abs=1e-4)
    greedy = int(np.argmax(rows[len(CONTEXT) - 1]))
    pairs = [Pair(CONTEXT, (greedy,)), Pair(CONTEXT, ((greedy + 1) % 200,))]
    assert [s.is_greedy for _, s in standin.backend(generator).loglikelihood(pairs)] == [1, 0]


def test_questions_are_taken_as_there_is_room(generator):
    taken = []

    def prompts():
        for i in range(4):
            taken.append(i)
            settings = schema.Sampling(max_tokens=12, temperature=0.0)
            yield Prompt(tuple(generator.tokenizer.encode(f"number {i}")), settings)

    answers = standin.backend(generator, num_open=2).generate(prompts())
    first = next(answers)
    assert first[0] in (0, 1) and len(taken) == 2
    assert sorted(index for index, _ in (first, *answers)) == list(range(4))


def test_a_stop_string_ends_an_answer(generator):
    tokens = tuple(generator.tokenizer.encode("a few words"))
    settings = schema.Sampling(max_tokens=12, temperature=0.0)
    backend = standin.backend(generator)
    [(_, whole), (_, same)] = backend.generate([Prompt(tokens, settings)] * 2)
    assert whole == same and len(whole) > 4
    stop = whole[2:4]
    asked = [Prompt(tokens, settings, (stop,)), Prompt(tokens, settings)]
    assert dict(backend.generate(asked)) == {0: whole[: whole.index(stop)], 1: whole}


def test_the_prefix_is_bos_then_eos(generator):
    words = generator.tokenizer
    assert backend_lib.prefix_id(words) == words.eos_ids[0]
