"""The state of one request in an engine, from its submission to its last event. No jax."""

from dataclasses import dataclass, field
from typing import Literal

from infer.engine.page_table import Reservation
from infer.engine.request import Request, TokenLogprobs
from infer.speculation.prompt_lookup import PromptLookup

# prefilling: has a slot, and tokens of its prompt that no prefill was given yet. prefilled: all of
# them were. decoding: draws tokens. finished: nothing more is dispatched for it.
Phase = Literal["waiting", "prefilling", "prefilled", "decoding", "finished"]


@dataclass(eq=False, kw_only=True)
class RequestState:
    """All that the host knows of one request.

    `Scheduler.add` makes it. The scheduler owns the fields up to `num_prefilled`; the engine adds
    what was dispatched and read, and a proposer of draft tokens keeps its notes in the last two.
    """

    request: Request
    arrival: int  # its place in the order of submission
    end_tokens: frozenset[int] = frozenset()  # tokens that end its answer
    sampler: Literal["greedy", "full"] = "full"  # the least general one that serves it
    phase: Phase = "waiting"
    slot: int = -1  # row of the device's state; -1 before admission
    reservation: Reservation | None = None  # pages; None before admission
    num_prefilled: int = 0  # tokens of the prompt that are cached or were given to a prefill

    weight_version: int = 0  # of the weights that serve it from its first prefill to its end
    num_dispatched: int = 0  # tokens of the answer that dispatches so far may have drawn
    answer: list[int] = field(default_factory=list)  # tokens read from the device
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # those read so far

    prompt_lookup: PromptLookup | None = None  # index over `tokens`; None before it is needed
    num_draft_read: int | None = None  # tokens a draft model has read; None: as many as the model

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens of the prompt."""
        return self.request.tokens

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the prompt and of the answer, as far as it was read."""
        return (*self.request.tokens, *self.answer)

    @property
    def pages(self) -> tuple[int, ...]:
        """Numbers of its pages; page i holds positions from i * page_size on."""
        return self.reservation.pages

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt whose keys and values an earlier prompt had left."""
        return 0 if self.reservation is None else self.reservation.num_cached

    @property
    def num_to_prefill(self) -> int:
        """Tokens of the prompt that no prefill was given yet."""
        return len(self.request.tokens) - self.num_prefilled

    @property
    def num_to_dispatch(self) -> int:
        """Tokens of the answer that no dispatch was asked for yet."""
        return self.request.sampling.max_tokens - self.num_dispatched
