"""A text service over an engine that knows only tokens: text in, text out.

Used by jobs, the server, one prompt and chat. One thread calls it, as it does the engine.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from configs.sampling import SamplingParams
from infer.constraints.spec import ConstraintSpec
from infer.engine.request import Constraint, Event, Request
from infer.text import detokenizer as choices_lib
from infer.text.outputs import Answer, Answers, Update, Usage
from qwen_jax.text.chat import encoding as chat
from qwen_jax.text.tokenizer.tokenizer import Special, Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class Engine(Protocol):
    """The part of `infer.engine.engine.Engine`'s interface that the service uses."""

    idle: bool

    def submit(self, request: Request) -> None: ...
    def cancel(self, id: str) -> None: ...
    def step(self) -> list[Event]: ...
    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A prompt with the settings of its answer. `id` tells it apart among those that are open."""

    id: str
    prompt: Prompt  # a text, token ids, or a conversation
    sampling: SamplingParams
    tools: Sequence[Mapping[str, Any]] | None = None  # with a conversation
    stop: tuple[str, ...] = ()  # the answer ends before any of these
    n: int = 1  # answers
    best_of: int | None = None  # draw so many, and give the n with the best mean log-probability
    echo: Literal["answer", "prompt_and_answer"] = "answer"  # what the text holds
    constraint: ConstraintSpec | None = None
    special: Special = "text"  # what control tokens spelled in a text prompt are

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of={self.best_of} must be at least n={self.n}")
        if self.constraint is not None and self.sampling.min_tokens:
            raise ValueError(
                f"min_tokens={self.sampling.min_tokens} and a constraint ({self.constraint.kind}) "
                "can contradict each other; leave min_tokens out, and ask for length in the form"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every answer; remove it")


@dataclass(frozen=True)
class Embeddings:
    """Vectors [n, D] in float32 of length 1, and how many tokens they were made of."""

    vectors_ND: np.ndarray
    num_tokens: int


class Service:
    """A service that turns requests with text into engine requests, and tokens into text.

    A request's error is raised by its `submit` or given in its last update; others go on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Tokenizer,
        defaults: SamplingParams,
        bos_id: int | None = None,
        compile_constraint: Callable[[ConstraintSpec], Constraint] | None = None,
    ) -> None:
        """`defaults` serve requests that say nothing; `bos_id` begins an empty prompt.

        `compile_constraint` makes a fresh constraint; without it, constrained requests are refused.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._bos_id = bos_id
        self._compile_constraint = compile_constraint
        self._open: dict[str, _Open] = {}
        self._choices: dict[str, tuple[_Open, choices_lib.Choice]] = {}  # by the engine's id
        self._serial = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether no request is open, here or in the engine."""
        return not self._open and self.engine.idle

    @property
    def num_open(self) -> int:
        """Number of requests whose last update has not come."""
        return len(self._open)

    def encode(self, request: TextRequest) -> tuple[int, ...]:
        """The prompt's tokens. Raises `ValueError` for what template or tokenizer cannot take."""
        prompt = request.prompt
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, special=request.special)
        elif prompt and isinstance(prompt[0], Mapping):
            tokens = chat.encode(
                prompt,
                tokenizer=self.tokenizer,
                tools=request.tools,
                add_generation_prompt=True,
                mask="none",
            ).token_ids
        else:
            tokens = prompt
        return self._not_empty(tokens)

    def submit(self, request: TextRequest) -> None:
        """Opens a request: its updates come from `step`, the last of them with `usage`.

        Raises `ValueError`, and opens nothing, where it can never be served.
        """
        if request.id in self._open:
            raise ValueError(f"request {request.id!r} is open already; give each its own id")
        tokens = self.encode(request)
        opened = _Open(request, num_prompt=len(tokens))
        try:
            for index in range(request.best_of or request.n):
                sampling = _sampling(request, index)
                guard = self.constraint(request.constraint)
                name = str(next(self._serial))
                self.engine.submit(
                    Request(id=name, tokens=tokens, sampling=sampling, constraint=guard)
                )
                opened.running[name] = choices_lib.Choice(
                    request.id,
                    index,
                    tokens=tokens,
                    tokenizer=self.tokenizer,
                    sampling=sampling,
                    stop=request.stop,
                    echo=request.echo,
                )
                opened.guards[name] = guard
        except ValueError:
            for name in opened.running:
                self.engine.cancel(name)
            raise
        for name, choice in opened.running.items():
            self._choices[name] = (opened, choice)
        self._open[request.id] = opened

    def cancel(self, id: str) -> None:
        """Ends a request: what is still running of it gets the reason "cancelled" from `step`.

        Unknown or finished: nothing happens.
        """
        if id in self._open:
            for name in self._open[id].running:
                self.engine.cancel(name)

    def step(self) -> list[Update]:
        """Runs one round of the engine and returns the updates with new text."""
        return [update for event in self.engine.step() for update in self._updates(event)]

    def encode_input(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a prompt that is to be embedded."""
        return self._not_empty(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def embed(self, prompts: Sequence[str | Sequence[int]]) -> Embeddings:
        """A vector for each text or list of token ids. Raises `ValueError` for the whole call."""
        rows = [self.encode_input(prompt) for prompt in prompts]
        return Embeddings(self.engine.embed(rows), sum(map(len, rows)))

    def _not_empty(self, tokens: Sequence[int]) -> tuple[int, ...]:
        if not tokens and self._bos_id is None:
            raise ValueError(
                "the prompt is empty and the model has no bos_token_id to begin with; give at "
                "least one token"
            )
        return tuple(tokens) or (self._bos_id,)

    def constraint(self, spec: ConstraintSpec | None) -> "_Guard | None":
        """A new constraint. Any thread may call this: `submit` finds what it has compiled.

        Raises `ValueError` for what cannot be compiled.
        """
        if spec is None:
            return None
        if self._compile_constraint is None:
            raise ValueError(f"{spec.kind}: no structured output here; remove the constraint")
        return _Guard(self._compile_constraint(spec))

    def _updates(self, event: Event) -> Iterator[Update]:
        if event.id not in self._choices:  # its stop string was found, and this was under way
            return
        opened, choice = self._choices[event.id]
        update = choice.take(event)
        if (guard := opened.guards[event.id]) is not None and guard.error is not None:
            update = dataclasses.replace(update, finish_reason="cancelled", error=guard.error)
        opened.num_generated += len(update.tokens)
        if choice.index == 0:
            opened.num_cached = max(opened.num_cached, event.num_cached)
        if not opened.streams:
            opened.answers.add(update)
        if update.finish_reason is None:
            if opened.streams and not update.empty:
                yield update
            return
        if event.finish_reason is None:
            self.engine.cancel(event.id)
        del self._choices[event.id], opened.running[event.id]
        if opened.running:
            if opened.streams:
                yield update
            return
        del self._open[opened.request.id]
        last = [update] if opened.streams else opened.best()
        yield from last[:-1]
        yield dataclasses.replace(last[-1], usage=opened.usage)


class _Guard:
    """A constraint whose failure is its own answer's, and not that of the engine's step."""

    def __init__(self, inner: Constraint) -> None:
        self._inner = inner
        self._mask_W = inner.mask()
        self.error: str | None = None

    def mask(self) -> np.ndarray:
        """The constraint's mask; after a failure the last mask, until the answer is ended."""
        if self.error is None:
            try:
                self._mask_W = self._inner.mask()
            except RuntimeError as error:
                self.error = str(error)
        return self._mask_W

    def accept(self, token: int) -> None:
        if self.error is None:
            try:
                self._inner.accept(token)
            except RuntimeError as error:
                self.error = str(error)


class _Open:
    """An open request: its choices, and the tokens it has used."""

    def __init__(self, request: TextRequest, *, num_prompt: int) -> None:
        self.request = request
        self.running: dict[str, choices_lib.Choice] = {}
        self.guards: dict[str, _Guard | None] = {}
        self.answers = Answers()
        self.num_prompt = num_prompt
        self.num_generated = self.num_cached = 0

    @property
    def streams(self) -> bool:
        """Whether choices can be streamed; not if `best_of` picks among complete ones."""
        return (self.request.best_of or self.request.n) == self.request.n

    def best(self) -> list[Update]:
        """The n choices with the best mean log-probability, the best first, each in one update."""
        ranked = sorted(
            self.answers.choices, key=lambda a: (a.error is not None, -a.mean_logprob, a.index)
        )
        return [self._whole(index, answer) for index, answer in enumerate(ranked[: self.request.n])]

    def _whole(self, index: int, answer: Answer) -> Update:
        asked = self.request.sampling.logprobs is not None
        return Update(
            id=self.request.id,
            index=index,
            text=answer.text,
            tokens=tuple(answer.tokens),
            logprobs=tuple(answer.logprobs) if asked else (),
            prompt_logprobs=answer.prompt_logprobs,
            weight_version=answer.weight_version,
            finish_reason=answer.finish_reason,
            error=answer.error,
        )

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_generated,
            cached_tokens=self.num_cached,
        )


def _sampling(request: TextRequest, index: int) -> SamplingParams:
    """Sampling settings of one choice, with its own seed; the first has the request's seed."""
    own: dict[str, Any] = {}
    if index:
        own["seed"] = zlib.crc32(f"{request.sampling.seed}:{index}".encode())
    if (request.best_of or request.n) > request.n and request.sampling.logprobs is None:
        own["logprobs"] = 0
    return dataclasses.replace(request.sampling, **own) if own else request.sampling
