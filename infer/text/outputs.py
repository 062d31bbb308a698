"""What a service says of its requests, piece by piece and collected."""

import math
from dataclasses import dataclass, field

from infer.engine.request import FinishReason


@dataclass(frozen=True)
class TokenText:
    """A token as text: its bytes, which need not be whole characters, and how likely it was."""

    id: int
    bytes: bytes
    logprob: float | None  # natural logarithm, the model's own; None: the prompt's first token


@dataclass(frozen=True, kw_only=True)
class TextLogprobs(TokenText):
    """How likely a token of prompt or answer was, and where it stands.

    offset: characters of the text before it. hidden: it adds nothing to the text, being the closing
    token, part of a stop string or a control token. drawn: after penalties, temperature and
    cutoffs. top: the likeliest, best first, as many as were asked for.
    """

    drawn: float | None
    offset: int
    hidden: bool
    top: tuple[TokenText, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took; those of choices that `best_of` discarded are counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True, kw_only=True)
class Update:
    """News of one choice of a request.

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
    finish_reason: FinishReason | None = None
    error: str | None = None  # why a choice could not go on: its reason is "cancelled"
    usage: Usage | None = None  # with the last update of the whole request

    @property
    def empty(self) -> bool:
        """Nothing that anybody would want to see."""
        return not (
            self.text or self.tokens or self.logprobs or self.prompt_logprobs or self.finish_reason
        )


@dataclass
class Answer:
    """One choice, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TextLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TextLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        self.finish_reason, self.error = update.finish_reason, update.error

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, the closing one included, as the model has it; of none: the least."""
        values = [entry.logprob for entry in self.logprobs]
        return sum(values) / len(values) if values else -math.inf


class Answers:
    """Collects the updates of one request; complete when `usage` is known."""

    def __init__(self) -> None:
        self._by_index: dict[int, Answer] = {}
        self.usage: Usage | None = None

    def add(self, update: Update) -> None:
        self._by_index.setdefault(update.index, Answer(update.index)).add(update)
        self.usage = update.usage

    @property
    def choices(self) -> list[Answer]:
        return [self._by_index[index] for index in sorted(self._by_index)]
