"""Log-probabilities of given continuations: requests that generate nothing, and their scores.

A text continuation is encoded together with its prompt, and scored from the first token that is not
the prompt's own; after a conversation or token ids it is encoded by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.sampling import SamplingParams
from infer.text.outputs import Answer
from infer.text.service import Prompt, Service, TextRequest
from qwen_jax.text.tokenizer.tokenizer import Special

# The likeliest token of each position says whether greedy decoding gives the continuation.
_SAMPLING = SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=0.0)


@dataclass(frozen=True)
class Scored:
    """A request with prompt and continuation, of which the last `num_tokens` are scored."""

    request: TextRequest
    num_tokens: int


@dataclass(frozen=True)
class Score:
    """A continuation's tokens, their log-probabilities by the model, and whether all are greedy."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)


def request(
    service: Service,
    prompt: Prompt,
    continuation: str | Sequence[int],
    *,
    id: str,
    special: Special = "text",
) -> Scored:
    """The request that scores `continuation` after `prompt`.

    Raises `ValueError` for an empty continuation, and where no token precedes it.
    """
    if not continuation:
        raise ValueError("a continuation is empty: give at least one token to score")
    tokenizer = service.tokenizer
    if isinstance(prompt, str) and isinstance(continuation, str):
        alone = tokenizer.encode(prompt, special=special)
        tokens = tokenizer.encode(prompt + continuation, special=special)
        start = _common(alone, tokens)
        if start == 0:
            # A first token has no probability of its own: the model's bos has to stand before it.
            before = service.encode(_text(id, ()))
            tokens, start = [*before, *tokens], len(before)
    else:
        before = service.encode(_text(id, prompt, special=special))
        if isinstance(continuation, str):
            continuation = tokenizer.encode_segment(continuation, at_start=False)
        tokens, start = [*before, *continuation], len(before)
    return Scored(_text(id, tuple(tokens)), len(tokens) - start)


def score(scored: Scored, answer: Answer) -> Score:
    """The continuation's score, from the answer to its request."""
    entries = answer.prompt_logprobs[-scored.num_tokens :]
    return Score(
        tuple(entry.id for entry in entries),
        tuple(entry.logprob for entry in entries),
        all(entry.top[0].id == entry.id for entry in entries),
    )


def _text(id: str, prompt: Prompt, special: Special = "text") -> TextRequest:
    return TextRequest(id=id, prompt=prompt, sampling=_SAMPLING, special=special)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common beginning of `a` and `b`, less than the length of `b`."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return min(count, len(b) - 1)
