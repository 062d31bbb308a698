"""How likely given continuations of a prompt are: requests that make no tokens, and their scores.

A text continuation is encoded together with its prompt, and scored from the first token that is not
the prompt's own; after a conversation or token ids it is encoded by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.sampling import SamplingParams
from infer.text.outputs import Answer
from infer.text.service import Prompt, Service, TextRequest
from qwen_jax.text.tokenizer.tokenizer import Special

# The likeliest token says whether greedy decoding would have gone this way.
_SAMPLING = SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=0.0)


@dataclass(frozen=True)
class Scored:
    """A request that reads prompt and continuation; the last `num_tokens` of it are scored."""

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
    """Raises `ValueError` for an empty continuation, and for one with nothing before it."""
    if not continuation:
        raise ValueError("a continuation is empty: there is nothing to score")
    words = service.tokenizer
    if isinstance(prompt, str) and isinstance(continuation, str):
        alone = words.encode(prompt, special=special)
        tokens = words.encode(prompt + continuation, special=special)
        start = _common(alone, tokens)
        if start == 0:
            # A first token has no probability of its own: the model's bos has to stand before it.
            before = service.encode(_text(id, ()))
            tokens, start = [*before, *tokens], len(before)
    else:
        before = service.encode(_text(id, prompt, special=special))
        if isinstance(continuation, str):
            continuation = words.encode_segment(continuation, at_start=False)
        tokens, start = [*before, *continuation], len(before)
    return Scored(_text(id, tuple(tokens)), len(tokens) - start)


def score(scored: Scored, answer: Answer) -> Score:
    """The score in the answer to a request."""
    entries = answer.prompt_logprobs[-scored.num_tokens :]
    return Score(
        tuple(entry.id for entry in entries),
        tuple(entry.logprob for entry in entries),
        all(entry.top[0].id == entry.id for entry in entries),
    )


def _text(id: str, prompt: Prompt, special: Special = "text") -> TextRequest:
    return TextRequest(id=id, prompt=prompt, sampling=_SAMPLING, special=special)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens they begin with alike; of the longer one at least one stays."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return min(count, len(b) - 1)
