"""What an evaluation needs of a model: tokens in; how likely they are, or text, out.

`service_backend` gives it over the batch engine. Answers come in any order, each with the index of
its question, so that an engine is kept full and what has come can be kept. Questions are taken
from their iterable as there is room for them: no benchmark lies in memory as tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from configs.sampling import SamplingParams
from qwen_jax.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Tokens and the ones whose probability after them is asked for; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """ln p(continuation | context), and whether greedy decoding would have written it."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue until one of `stop`, which the answer does not hold, or the end."""

    tokens: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()


class Backend(Protocol):
    """A model with its tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def prefix_id(self) -> int:
        """The token before a text that has no context."""
        ...

    @property
    def max_length(self) -> int:
        """Most tokens of context and continuation together."""
        ...

    def loglikelihood(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Score]]: ...

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, str]]: ...


def prefix_id(tokenizer: Tokenizer) -> int:
    """bos, or where there is none the first eos, as lm-evaluation-harness has it.

    Raises `ValueError` for a tokenizer with neither.
    """
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if not tokenizer.eos_ids:
        raise ValueError("the tokenizer names neither a bos nor an eos token; scoring needs one")
    return tokenizer.eos_ids[0]
