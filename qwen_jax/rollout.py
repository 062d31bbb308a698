"""What training asks of a sampler whose weights it changes: the `Rollout` protocol, over tokens.

A recipe such as GRPO takes a `Rollout` and knows no engine; `infer/engine/engine_rollout.py` has
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from configs.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer to a prompt; all tuples but the prompt have an entry a token.

    logprobs: natural logarithms of probabilities under the model's own distribution, as
    `Rollout.logprobs` gives them. sampling_logprobs: under the distribution that was sampled, after
    penalties, temperature, top-k, top-p and min-p. weight_versions: of the weights that drew each.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]  # with the one that ended it, where the reason is "stop"
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@runtime_checkable
class Rollout(Protocol):
    """A sampler of a model under training."""

    weight_version: int  # of the weights that the next call uses

    def generate(
        self, prompts: Sequence[Sequence[int]], *, sampling: SamplingParams
    ) -> list[Completion]:
        """One completion of each prompt, in order.

        Prompt i is sampled with a seed made of `sampling.seed` and i: a prompt that is given
        several times has answers that are independent of each other, and the same call with the
        same weights has the same result.
        """
        ...

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of each token but the first given those before it, float32 [T - 1] each.

        Natural logarithms, under the model's own distribution.
        """
        ...

    def update_weights(self, params: dict, *, version: int) -> None:
        """Has later calls use new parameters of the same shapes, under a greater version."""
        ...
