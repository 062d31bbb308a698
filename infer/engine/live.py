"""What an engine knows, on the host, of a request on its way. No jax."""

from dataclasses import dataclass, field
from typing import Literal

from infer.engine.request import Request, TokenLogprobs
from infer.speculation.prompt_lookup import PromptLookup


@dataclass(eq=False)
class Live:
    """A request on its way."""

    request: Request
    sampler: Literal["greedy", "full"]  # what drawing its tokens takes: `sampling.How`
    ends: frozenset[int]  # tokens that end its answer
    slot: int = -1
    pages: tuple[int, ...] = ()
    dispatched: int = 0  # tokens that dispatches so far may have drawn
    answer: list[int] = field(default_factory=list)  # tokens read
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: bool = False
    lookup: PromptLookup | None = None
    drafted: int | None = None  # tokens that a draft model has read; None: as many as the model

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer, as far as it was read."""
        return (*self.request.tokens, *self.answer)

    @property
    def budget(self) -> int:
        """Tokens that no dispatch has been asked for yet."""
        return self.request.sampling.max_tokens - self.dispatched
