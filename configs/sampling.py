"""Sampling parameters of one request."""

from typing import Annotated

from configs import schema
from configs.schema import NonNegative, Positive, Range

MOST_LOGPROBS = 20  # likeliest tokens that one logprob can bring along, as in OpenAI's API
MOST_BIASES = 300  # as in OpenAI's API
MOST_STOPS = 16  # stop_token_ids of one request

Fraction = Annotated[float, Range(min=0, max=1)]
Penalty = Annotated[float, Range(min=-2, max=2)]
NumLogprobs = Annotated[int, Range(min=0, max=MOST_LOGPROBS)] | None


@schema.config()
class SamplingParams:
    """Sampling parameters of one request. The defaults sample from the model's distribution.

    Applied in this order: logit bias, min_tokens, a grammar's mask, penalties, temperature, top-k,
    top-p, min-p.
    """

    max_tokens: NonNegative[int] = 512  # most tokens to generate, the closing one included
    min_tokens: NonNegative[int] = 0  # fewest tokens before the answer may end
    temperature: NonNegative[float] = 1.0  # 0 is greedy: the likeliest token, always
    top_k: NonNegative[int] = 0  # keep the k likeliest tokens; 0 keeps all
    # Keep the likeliest tokens that together reach this probability
    top_p: Annotated[float, Range(above=0, max=1)] = 1.0
    min_p: Fraction = 0.0  # keep tokens at least this fraction as likely as the likeliest
    # Divides the scores of tokens seen in prompt and answer
    repetition_penalty: Positive[float] = 1.0
    presence_penalty: Penalty = 0.0  # subtracted from logits of tokens in the answer
    frequency_penalty: Penalty = 0.0  # the same, times the count of the token
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, number added to its logit)
    stop_token_ids: tuple[int, ...] = ()  # further tokens that end the answer
    ignore_eos: bool = False  # end only at max_tokens or a stop token
    logprobs: NumLogprobs = None  # of the answer, with this many likeliest tokens; None: off
    prompt_logprobs: NumLogprobs = None  # of the prompt; allows max_tokens=0 (scoring only)
    # Seed of the request: equal seeds give equal tokens, whatever else is in the batch
    seed: Annotated[int, Range(min=0, below=2**32)] = 0

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        schema.check(
            self.max_tokens >= least,
            f"max_tokens={self.max_tokens} must be at least 1, or 0 with prompt_logprobs",
        )
        schema.check(
            self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} must be in [0, max_tokens={self.max_tokens}]",
        )
        schema.check(
            len(self.logit_bias) <= MOST_BIASES,
            f"logit_bias has {len(self.logit_bias)} tokens; at most {MOST_BIASES} are taken",
        )
        schema.check(
            len(self.stop_token_ids) <= MOST_STOPS,
            f"stop_token_ids has {len(self.stop_token_ids)} tokens; at most {MOST_STOPS} are taken",
        )
