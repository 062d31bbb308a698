"""Requests to an engine and its events: tokens in, tokens out. No jax."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from configs.sampling import SamplingParams


class Constraint(Protocol):
    """The state of a grammar along one answer, which says what tokens may be drawn next."""

    def mask(self) -> np.ndarray:
        """Bits of the tokens allowed next: uint32 [ceil(V / 32)], token i at bit i % 32."""
        ...

    def accept(self, token: int) -> None:
        """Advances the grammar by a token that the mask allowed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and the settings of its answer; `id` is unique among the requests of an engine."""

    id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams
    constraint: Constraint | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural) of one token.

    drawn: under the distribution that was sampled, after penalties, temperature, top-k, top-p and
    min-p; for a token of the prompt, the same as raw. raw: under the model's own distribution. top:
    (token, raw) of the likeliest tokens, the likeliest first, as many as were asked for.
    """

    token: int
    drawn: float
    raw: float
    top: tuple[tuple[int, float], ...] = ()


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """New tokens of a request; the reason is given with the last ones.

    A token that ends the answer is part of the tokens, and its reason is "stop".
    `prompt_logprobs` come once, with the first event, one for each prompt token but the first.
    """

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached: int = 0  # prompt tokens whose keys and values an earlier prompt had left
    weight_version: int = 0  # version of the weights that all tokens of the request are drawn with
