"""An engine serves rollouts: what it draws, it scores alike, before and after an update."""

import dataclasses

import numpy as np
import pytest

from configs.sampling import SamplingParams
from infer.engine.engine_rollout import EngineRollout
from infer.engine.request import Request
from qwen_jax.rollout import Rollout
from tests.infer.engine.test_engine import EOS, PARAMS, make_engine
from tests.infer.engine.test_update_weights import NEW

SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, seed=4)
PROMPTS = [(5, 6, 7), (5, 6, 7), tuple(range(40)), (9,)]


@pytest.fixture(scope="module")
def rollout() -> EngineRollout:
    return EngineRollout(make_engine())


def check(rollout: EngineRollout, *, version: int) -> list[tuple[int, ...]]:
    """Answers to PROMPTS, whose logprobs are those of the same sequences scored afterwards."""
    completions = rollout.generate(PROMPTS, sampling=SAMPLING)
    assert [completion.prompt for completion in completions] == PROMPTS
    scores = rollout.logprobs([one.prompt + one.tokens for one in completions])
    for one, score in zip(completions, scores, strict=True):
        assert score.dtype == np.float32 and len(score) == len(one.prompt + one.tokens) - 1
        np.testing.assert_allclose(one.logprobs, score[len(one.prompt) - 1 :], atol=1e-4)
        assert one.logprobs != one.sampling_logprobs, "temperature and top-p changed nothing"
        assert one.weight_versions == (version,) * len(one.tokens)
        ended = one.tokens[-1] == EOS
        assert one.finish_reason == ("stop" if ended else "length")
        assert ended or len(one.tokens) == SAMPLING.max_tokens
    return [completion.tokens for completion in completions]


@pytest.mark.takes(90, "compiles an engine's programs")
def test_generate_update_generate(rollout):
    assert isinstance(rollout, Rollout)
    version = rollout.weight_version
    first = check(rollout, version=version)
    assert first[0] != first[1], "equal prompts were drawn alike"
    assert first == check(rollout, version=version), "the same call had another result"
    rollout.update_weights(NEW, version=version + 1)  # as a trainer has them
    second = check(rollout, version=version + 1)
    assert second != first
    rollout.update_weights(PARAMS, version=version + 2)
    assert check(rollout, version=version + 2) == first


@pytest.mark.takes(90, "compiles an engine's programs")
def test_what_a_rollout_refuses(rollout):
    with pytest.raises(ValueError, match="max_tokens=0 generates nothing"):
        scored = dataclasses.replace(SAMPLING, max_tokens=0, prompt_logprobs=0)
        rollout.generate(PROMPTS, sampling=scored)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        rollout.logprobs([(1, 2), ()])
    with pytest.raises(ValueError, match="token 999 is outside the vocabulary"):
        rollout.generate([(1, 2), (999,)], sampling=SAMPLING)
    assert rollout._engine.idle, "a refused call left requests behind"
    rollout._engine.submit(Request(id="other", tokens=(1,), sampling=SAMPLING))
    with pytest.raises(ValueError, match="the engine serves other requests"):
        rollout.logprobs([(1, 2)])
    while not rollout._engine.idle:
        rollout._engine.step()
