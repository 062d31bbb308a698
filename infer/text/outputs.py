"""The outputs of a text service: streamed pieces of an answer, and whole answers."""

import math
from dataclasses import dataclass, field

from infer.engine.request import FinishReason


@dataclass(frozen=True)
class TokenText:
    """A token as bytes, which need not be whole characters, with its log-probability."""

    id: int
    bytes: bytes
    logprob: float | None  # natural logarithm, the model's own; None: the prompt's first token


@dataclass(frozen=True, kw_only=True)
class TextLogprobs(TokenText):
    """A token of a prompt or an answer with its log-probabilities and its place in the text.

    offset: number of characters of the text before the token. hidden: the token adds nothing to the
    text, as it is the closing token, part of a stop string or a control token. drawn: its
    log-probability after penalties, temperature, top-k and top-p. top: the likeliest tokens, best
    first, as many as were asked for.
    """

    drawn: float | None
    offset: int
    hidden: bool
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of a request, with the tokens of answers that `best_of` discarded."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens that were found in the prefix cache


@dataclass(frozen=True, kw_only=True)
class Update:
    """The next piece of one answer to a request.

    `text` may come later than its tokens: characters and possible stop strings are held back until
    they are decided. `tokens` ends with the closing token, or with the one that completed a stop
    string. `logprobs` come with the text; over all updates there is one for each token.
    `prompt_logprobs` come once, one for each token of the prompt.
    """

    id: str
    index: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TextLogprobs, ...] = ()
    prompt_logprobs: tuple[TextLogprobs, ...] = ()
    weight_version: int = 0  # version of the weights that all tokens of the choice are drawn with
    finish_reason: FinishReason | None = None
    error: str | None = None  # why a choice could not go on: its reason is "cancelled"
    usage: Usage | None = None  # with the last update of the whole request

    @property
    def empty(self) -> bool:
        """Whether the piece holds nothing to report."""
        return not (
            self.text or self.tokens or self.logprobs or self.prompt_logprobs or self.finish_reason
        )


@dataclass
class Answer:
    """One answer, joined from the pieces that have come so far."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TextLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TextLogprobs, ...] = ()
    weight_version: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        self.weight_version = update.weight_version
        self.finish_reason, self.error = update.finish_reason, update.error

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the answer's tokens, its closing token included.

        -inf for an answer without tokens.
        """
        values = [entry.logprob for entry in self.logprobs]
        return sum(values) / len(values) if values else -math.inf


class Answers:
    """The answers to one request, joined from its pieces; complete when `usage` is set."""

    def __init__(self) -> None:
        self._by_index: dict[int, Answer] = {}
        self.usage: Usage | None = None

    def add(self, update: Update) -> None:
        self._by_index.setdefault(update.index, Answer(update.index)).add(update)
        self.usage = update.usage

    @property
    def choices(self) -> list[Answer]:
        return [self._by_index[index] for index in sorted(self._by_index)]
