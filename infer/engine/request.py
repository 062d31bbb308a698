"""What goes into an engine and what comes out of it: tokens. No jax here."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from configs.sampling import SamplingParams


class Constraint(Protocol):
    """Which tokens one request may draw next: the state of a grammar along its answer."""

    def mask(self) -> np.ndarray:
        """Bits of the tokens allowed now: uint32 [ceil(V / 32)], token i at bit i % 32."""
        ...

    def accept(self, token: int) -> None:
        """Moves on by a token that the mask allowed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it. `id` tells it apart among those that an engine holds."""

    id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams
    constraint: Constraint | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of one token's probability.

    drawn: under the distribution that was sampled, after penalties, temperature and cutoffs; for a
    prompt's token, as raw. raw: under the model's own. top: (token, raw) of the likeliest, best
    first, as many as were asked for.
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
