"""An engine as a `qwen_jax.rollout.Rollout`: completions and log-probabilities for training."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from configs.sampling import SamplingParams
from infer.engine.engine import Engine
from infer.engine.request import Event, Request
from qwen_jax.rollout import Completion

_SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


class EngineRollout:
    """Serves rollouts by an engine that serves nobody else while a call lasts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next call uses."""
        return self._engine.weight_version

    def generate(
        self, prompts: Sequence[Sequence[int]], *, sampling: SamplingParams
    ) -> list[Completion]:
        """One completion of each prompt, in order; see `Rollout.generate`.

        Raises `ValueError`, and generates nothing, for a prompt that the engine cannot serve, for
        `max_tokens=0`, and while the engine serves other requests.
        """
        if sampling.max_tokens == 0:
            raise ValueError("max_tokens=0 generates nothing; use `logprobs` to score sequences")
        if sampling.logprobs is None:
            sampling = dataclasses.replace(sampling, logprobs=0)
        settings = [
            dataclasses.replace(sampling, seed=zlib.crc32(f"{sampling.seed}:{index}".encode()))
            for index in range(len(prompts))
        ]
        served = self._serve(prompts, settings)
        return [_completion(tuple(p), events) for p, events in zip(prompts, served, strict=True)]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of each token but the first, float32 [T - 1] each.

        Raises `ValueError` for an empty sequence, for one that the engine cannot serve, and while
        the engine serves other requests.
        """
        for index, tokens in enumerate(sequences):
            if not len(tokens):
                raise ValueError(f"sequence {index} is empty; give at least one token")
        served = self._serve(sequences, [_SCORE] * len(sequences))
        scores = [[x.raw for event in events for x in event.prompt_logprobs] for events in served]
        return [np.asarray(values, np.float32) for values in scores]

    def update_weights(self, params: dict, *, version: int) -> None:
        """Has later calls use these weights; see `Engine.update_weights`."""
        self._engine.update_weights(params, version=version)

    def _serve(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[SamplingParams]
    ) -> list[list[Event]]:
        """Events of a request for each prompt."""
        engine = self._engine
        if not engine.idle:
            raise ValueError("the engine serves other requests; let them end, or use another one")
        served: list[list[Event]] = [[] for _ in prompts]
        try:
            for index, (tokens, sampling) in enumerate(zip(prompts, settings, strict=True)):
                prompt = tuple(int(token) for token in tokens)
                engine.submit(Request(id=str(index), tokens=prompt, sampling=sampling))
        except ValueError:
            for index in range(len(prompts)):
                engine.cancel(str(index))
            while not engine.idle:
                engine.step()
            raise
        while not engine.idle:
            for event in engine.step():
                served[int(event.id)].append(event)
        return served


def _completion(prompt: tuple[int, ...], events: Sequence[Event]) -> Completion:
    logprobs = [entry for event in events for entry in event.logprobs]
    return Completion(
        prompt=prompt,
        tokens=tuple(token for event in events for token in event.tokens),
        logprobs=tuple(entry.raw for entry in logprobs),
        sampling_logprobs=tuple(entry.drawn for entry in logprobs),
        weight_versions=tuple(event.weight_version for event in events for _ in event.tokens),
        finish_reason=events[-1].finish_reason,
    )
