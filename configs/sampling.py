"""How the tokens of one request are drawn."""

import dataclasses
import math
from dataclasses import dataclass

from configs import schema

MOST_LOGPROBS = 20  # likeliest tokens that one logprob can bring along, as in OpenAI's API
MOST_BIASES = 300  # as in OpenAI's API
MOST_STOPS = 16  # stop_token_ids of one request


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are drawn. The defaults sample from the model's own distribution.

    Applied in this order: logit bias, min_tokens, a grammar's mask, penalties, temperature, top-k,
    top-p, min-p.
    """

    max_tokens: int = 512  # most tokens to generate, the closing one included
    min_tokens: int = 0  # the answer may not end before it has so many
    temperature: float = 1.0  # 0 is greedy: the likeliest token, always
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides the scores of tokens seen in prompt and answer
    presence_penalty: float = 0.0  # taken from the scores of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each time that they occur
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its score)
    stop_token_ids: tuple[int, ...] = ()  # end the answer too
    ignore_eos: bool = False  # end at max_tokens alone (and stop tokens)
    logprobs: int | None = None  # the answer's, with so many of the likeliest; None: none at all
    prompt_logprobs: int | None = None  # the prompt's; allows max_tokens=0, which only scores
    seed: int = 0  # same seed, same request: same tokens, whatever else is in the batch

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type not in (int, float):
                continue
            kinds = int if f.type is int else (int, float)
            schema.check(
                isinstance(value, kinds) and not isinstance(value, bool),
                f"{f.name}={value!r} must be {'a whole' if kinds is int else 'a'} number",
            )
        least = 1 if self.prompt_logprobs is None else 0
        schema.check(
            self.max_tokens >= least,
            f"max_tokens={self.max_tokens} must be at least 1, or 0 with prompt_logprobs",
        )
        schema.check(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} must be in [0, max_tokens={self.max_tokens}]",
        )
        schema.check(
            0 <= self.temperature < math.inf,
            f"temperature={self.temperature} must be 0 (greedy) or greater, and finite",
        )
        schema.check(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all tokens) or greater")
        schema.check(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        schema.check(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")
        schema.check(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty={self.repetition_penalty} must be greater than 0 and finite",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            schema.check(-2 <= value <= 2, f"{name}={value} must be in [-2, 2]")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            schema.check(
                value is None or 0 <= value <= MOST_LOGPROBS,
                f"{name}={value} must be in [0, {MOST_LOGPROBS}]",
            )
        schema.check(
            len(self.logit_bias) <= MOST_BIASES,
            f"logit_bias has {len(self.logit_bias)} tokens; at most {MOST_BIASES} are taken",
        )
        for token, bias in self.logit_bias:
            schema.check(
                math.isfinite(bias),
                f"logit_bias={bias} of token {token} must be finite; -100 keeps a token out",
            )
        schema.check(
            len(self.stop_token_ids) <= MOST_STOPS,
            f"stop_token_ids has {len(self.stop_token_ids)} tokens; at most {MOST_STOPS} are taken",
        )
        schema.check(0 <= self.seed < 2**32, f"seed={self.seed} must be in [0, 2**32)")
