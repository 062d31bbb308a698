"""The `Backend` protocol: what evaluating a task needs of a model, as tokens in and results out.

Results come in any order, each with the index of its request, so that a batch engine stays full
and finished work can be saved. Requests are read from their iterable as there is room for them, so
that a benchmark is never held in memory as tokens. `infer.eval` implements the protocol over the
batch engine.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from configs.sampling import SamplingParams
from qwen_jax.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoringRequest:
    """A request for ln p(continuation | context), both as tokens; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """ln p(continuation | context), and whether greedy decoding would generate it."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class GenerationRequest:
    """A request to continue `tokens` up to the first string of `stop`, which is cut off."""

    tokens: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()


class Backend(Protocol):
    """A model with its tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def prefix_id(self) -> int:
        """The token that stands for an empty context."""
        ...

    @property
    def max_length(self) -> int:
        """The largest number of tokens that a context and its continuation may have together."""
        ...

    def loglikelihood(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[int, Score]]:
        """(index of the request, its score), in any order."""
        ...

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[tuple[int, str]]:
        """(index of the request, the generated text), in any order."""
        ...


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token for an empty context: bos, else the first eos, as in lm-evaluation-harness.

    Raises `ValueError` for a tokenizer with neither.
    """
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if not tokenizer.eos_ids:
        raise ValueError(
            "the tokenizer has neither a bos nor an eos token, but scoring without a context needs "
            "one; name one in tokenizer_config.json"
        )
    return tokenizer.eos_ids[0]
