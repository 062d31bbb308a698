"""The batch inference engine: requests in, tokens out, of one model that the scheduler shares out.

The host is always one dispatch ahead: it reads a dispatch's tokens while the device runs the
next. So it learns one dispatch late that a row has ended, and that row of the next does nothing.
Shapes come from a short list, which `warm_up` compiles.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import buckets, capacity, device, page_table, results, scheduler
from infer.engine.request import Event, FinishReason, Request
from infer.engine.request_state import RequestState
from infer.engine.results import InFlight
from infer.speculation import draft as draft_lib
from infer.speculation import proposers
from partitioning.sharding import Layout
from qwen_jax.decode import forward, sampling
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer


@dataclass(frozen=True)
class _Update:
    """New arrays of the device by name, and the version of the weights among them."""

    arrays: dict[str, Any]
    version: int


class Engine:
    """Serves requests by one model, whose weights can be updated; one thread may call it."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: DecodeWeights,
        *,
        settings: EngineConfig,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: forward.Attention | None = None,
        layout: Layout | None = None,
        draft: draft_lib.Draft | None = None,
        weight_version: int = 0,
    ):
        """`params` are as `qwen_jax.decode.weights.prepare` gives them.

        `draft` is the draft model where settings ask for one; it has the model's tokenizer. Raises
        `ValueError` for stacked parameters, a mesh that spreads the batch, memory in which not even
        one request fits, and a draft that is missing, not asked for, or does not read as far.
        """
        draft_lib.check_asked(settings, given="none" if draft is None else "draft")
        if not isinstance(params, DecodeWeights):
            raise ValueError("an engine's layers lie apart: make DecodeWeights by weights.prepare")
        if layout is not None:
            capacity.check_mesh(layout)
        reach = transformer.max_length(cfg)
        if settings.max_length > reach:
            raise ValueError(
                f"max_length={settings.max_length} exceeds the {reach} tokens of {cfg.name}; lower "
                f"it, or extend the context with rope_scaling"
            )
        dtype = jnp.dtype(dtype)
        models = [(cfg, params, layout)]
        if draft is not None:
            draft_lib.check(draft, max_length=settings.max_length or reach, layout=layout)
            models.append((draft.cfg, draft.params, draft.layout))
        num_pages = settings.num_pages or capacity.num_pages(models, settings=settings, dtype=dtype)
        fits = min(reach, num_pages * settings.page_size)
        self.settings = dataclasses.replace(
            settings, max_length=settings.max_length or fits, num_pages=num_pages
        )
        self._cfg, self._eos = cfg, tuple(eos_ids)
        self._device = device.Device(
            cfg,
            params,
            settings=self.settings,
            eos_ids=self._eos,
            dtype=dtype,
            attention=attention,
            layout=layout,
            draft=draft,
        )
        shapes = buckets.shapes(self.settings).prefill
        self._proposer = proposers.make(self.settings, self._device, prefill_shapes=shapes)
        self._pages = page_table.PageTable(
            num_pages,
            page_size=settings.page_size,
            granularity=buckets.granularity(self.settings),
        )
        self._scheduler = scheduler.Scheduler(self.settings, self._pages)
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._events: list[Event] = []  # of requests that ended without a dispatch
        self._counts = collections.Counter()
        self.weight_version = weight_version  # of the weights that admitted requests are served by
        self._update: _Update | None = None

    # -- requests

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises `ValueError` for an id in use, a token outside the vocabulary, and a prompt that with
        its max_tokens exceeds the engine's max_length or all of its pages.
        """
        if self._scheduler.state(request.id) is not None:
            raise ValueError(f"a request with id {request.id!r} is being served; give each its own")
        tokens = capacity.check_prompt(self._cfg, request.tokens, settings=request.sampling)
        request = dataclasses.replace(request, tokens=tokens)
        needed = len(request.tokens) + request.sampling.max_tokens
        limit = min(self.settings.max_length, self.settings.num_pages * self.settings.page_size)
        if needed > limit:
            raise ValueError(
                f"prompt of {len(request.tokens)} tokens with max_tokens="
                f"{request.sampling.max_tokens} needs {needed} positions; this engine has {limit} "
                f"for a request: shorten the prompt, lower max_tokens, or raise max_length"
            )
        self._scheduler.add(
            request,
            end_tokens=self._end_tokens(request.sampling),
            sampler="full" if request.constraint else sampling.sampler(request.sampling),
        )

    def cancel(self, id: str) -> None:
        """Ends a request, with an event; nothing happens where none of this id is being served."""
        state = self._scheduler.state(id)
        if state is not None:
            self._events.append(self._end(state, (), "cancelled"))
            self._update_if_drained()

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting, running or unread."""
        return self._scheduler.idle and not (self._in_flight or self._events)

    # -- rounds

    def step(self) -> list[Event]:
        """Events that have arrived, after a dispatch of what the scheduler says; [] when idle."""
        events, self._events = self._events, []
        work, num_unread = self._scheduler.next(), len(self._in_flight)
        if isinstance(work, scheduler.Prefill):
            self._prefill(work)
        elif isinstance(work, scheduler.Decode):
            events += self._decode(work)
        # The device always has one dispatch to go on with while another is read.
        unread = self._in_flight
        if unread and (len(unread) > 1 or len(unread) <= num_unread):
            events += self._read(unread.popleft())
        self._update_if_drained()
        return events

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Events of these requests and of all others, until the engine is idle."""
        for request in requests:
            self.submit(request)
        while not self.idle:
            yield from self.step()

    def stats(self) -> dict[str, float]:
        """Counts by name, for monitors; sums are since the engine was made."""
        return {
            "waiting": self._scheduler.num_waiting,
            "running": self._scheduler.num_running,
            "free_pages": self._pages.free_pages,
            "cached_pages": self._pages.cached_pages,
            "compilations": self._device.num_compiled,
            **{name: self._counts[name] for name in _COUNTED},
        }

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Final hidden state of each prompt's last token, scaled to length 1: [n, D] in float32."""
        settings = SamplingParams(max_tokens=1)
        rows = [capacity.check_prompt(self._cfg, tokens, settings=settings) for tokens in prompts]
        return np.stack([self._device.embed(row) for row in rows])

    def warm_up(self, *, show: Callable[[str], None] = lambda line: None) -> float:
        """Seconds that it took to compile every program that requests can need.

        `show` is told of each. Afterwards `stats()["compilations"]`, the number of programs that
        this engine has compiled, stays as it is, but for embed.
        """
        began = time.monotonic()
        self._device.warm_up(show=show)
        return time.monotonic() - began

    # -- weights

    def update_weights(
        self,
        params: dict | DecodeWeights,
        *,
        version: int,
        draft_params: DecodeWeights | None = None,
    ) -> None:
        """Has requests served by new weights of the same names, shapes and dtypes.

        Requests that run end on the old weights. Those that wait, and those submitted from now on,
        begin once none runs any more: then the new weights take the place of the old, every cached
        prompt is forgotten, and `weight_version` becomes `version`, which events report. Where none
        runs, that is at once. Until then both are in memory; a later update replaces one that has
        not been made. Nothing is compiled. To hurry, cancel what runs.

        `params` are the model's own, stacked and on any devices, as a trainer holds them: they are
        copied, cast, and put into the engine's form. `DecodeWeights` are in that form already, as
        `draft_params` are in the draft model's, which stays as it is without them: arrays that are
        placed as the engine's are shared with it and must stay valid.
        Raises `ValueError`, and changes nothing, for a leaf that is missing, unknown, or of another
        shape or dtype, for a version that is not greater than the last, and for `draft_params`
        without a draft model.
        """
        latest = self.weight_version if self._update is None else self._update.version
        if version <= latest:
            raise ValueError(
                f"version={version} is not greater than {latest}, the last; number updates upwards"
            )
        if draft_params is not None and self.settings.speculation != "draft":
            raise ValueError("draft_params are given, and this engine has no draft model")
        if not isinstance(params, DecodeWeights):
            params = self._device.prepared(params)
        arrays = {"params": self._device.placed("params", params)}
        if draft_params is not None:
            arrays["draft_params"] = self._device.placed("draft_params", draft_params)
        self._update = _Update(arrays, version)
        self._scheduler.hold_admissions()
        self._update_if_drained()

    def _update_if_drained(self) -> None:
        """Makes the update that was asked for, if there is one and no request runs."""
        if self._update is None or self._scheduler.num_running:
            return
        for name, new in self._update.arrays.items():
            self._device.replace(name, new)
        self._pages.flush()
        self.weight_version, self._update = self._update.version, None
        self._scheduler.open_admissions()

    # -- dispatches

    def _prefill(self, work: scheduler.Prefill) -> None:
        score = "no"
        for chunk in work.chunks:
            if chunk.start == chunk.num_cached:  # the prompt's first
                self._counts["cached_tokens"] += chunk.num_cached
                chunk.state.weight_version = self.weight_version
            self._counts["prompt_tokens"] += len(chunk.tokens)
            if chunk.request.sampling.prompt_logprobs is not None:
                score = "prompt"
        rows = tuple(chunk.state for chunk in work.chunks)
        drawn, logprobs = self._device.prefill(work, _masks(rows), score=score)
        self._in_flight.append(
            InFlight(rows=rows, drawn=drawn, prompt_logprobs=logprobs, chunks=work.chunks)
        )
        for chunk in work.chunks:
            if chunk.is_last:
                self._scheduler.started(chunk.slot)
                chunk.state.num_dispatched = 1

    def _decode(self, work: scheduler.Decode) -> list[Event]:
        """Events of results that had to be read before this dispatch.

        Grammars, and some proposers, go by the tokens before. Whether draft tokens are asked for
        goes by the scheduler's number of rows, for which programs are compiled.
        """
        events: list[Event] = []
        rows = _with_tokens_left(work.states)
        constrained = any(state.request.constraint for state in rows)
        proposer = self._proposer
        if constrained or len(work.states) > self.settings.speculation_rows:
            proposer = None
        if constrained or (proposer is not None and proposer.needs_answers(rows)):
            while self._in_flight:
                events += self._read(self._in_flight.popleft())
            rows = _with_tokens_left(work.states)
        if rows:
            self._in_flight.append(self._draw(rows, proposer, num_rows=work.num_rows))
        return events

    def _draw(
        self, rows: Sequence[RequestState], proposer: proposers.Proposer | None, *, num_rows: int
    ) -> InFlight:
        """Dispatches the verification of draft tokens if there are any, else plain decoding."""
        slots, masks, sampler = [state.slot for state in rows], _masks(rows), _sampler(rows)
        draft_RT = proposer and proposer.propose(rows, num_rows=num_rows, sampler=sampler)
        if draft_RT is not None:
            num_steps = self.settings.guesses + 1
            drawn = self._device.verify(slots, draft_RT, sampler=sampler)
        else:
            free = all(mask is None for mask in masks)  # a mask serves one step
            num_steps = self.settings.decode_steps if free else 1
            drawn = self._device.decode(
                slots, masks, num_rows=num_rows, sampler=sampler, num_steps=num_steps
            )
            if self._proposer is not None:
                self._proposer.skipped(rows)
        for state in rows:
            state.num_dispatched += num_steps
        return InFlight(rows=tuple(rows), drawn=drawn, num_steps=num_steps, draft_RT=draft_RT)

    # -- results

    def _read(self, dispatch: InFlight) -> list[Event]:
        tokens = results.drawn_tokens(dispatch)
        requests = [state.request for state in dispatch.rows]
        logprobs = results.host_logprobs(dispatch.drawn.logprobs, requests)
        draft_RT = None if dispatch.draft_RT is None else np.asarray(dispatch.draft_RT)
        events = []
        for row, (state, drawn) in enumerate(zip(dispatch.rows, tokens, strict=True)):
            settings = state.request.sampling
            if state.phase == "finished":
                continue
            if dispatch.chunks:
                if (count := settings.prompt_logprobs) is not None:
                    state.prompt_logprobs += results.prompt_logprobs(dispatch, row, count=count)
                if not dispatch.chunks[row].is_last:
                    continue
                if settings.max_tokens == 0:
                    events.append(self._end(state, (), "length"))
                    continue
            state.num_dispatched -= dispatch.num_steps - len(drawn)
            if draft_RT is not None:
                self._counts["guessed_tokens"] += int(np.sum(draft_RT[row] >= 0))
                self._counts["accepted_tokens"] += max(0, len(drawn) - 1)
            if drawn:
                given = None
                if (count := settings.logprobs) is not None:
                    given = results.token_logprobs(drawn, logprobs, row, count=count)
                events.append(self._take(state, drawn, given))
        return events

    def _take(self, state: RequestState, drawn: tuple[int, ...], logprobs) -> Event:
        """The event of tokens that were drawn for a request, which may end with them."""
        first = not state.answer
        state.answer += drawn
        self._counts["generated_tokens"] += len(drawn)
        if state.request.constraint is not None:
            for token in drawn:
                if token not in state.end_tokens:
                    state.request.constraint.accept(token)
        if drawn[-1] in state.end_tokens:
            return self._end(state, drawn, "stop", logprobs=logprobs, first=first)
        if len(state.answer) == state.request.sampling.max_tokens:
            return self._end(state, drawn, "length", logprobs=logprobs, first=first)
        return self._event(state, drawn, None, logprobs=logprobs, first=first)

    def _end(
        self, state: RequestState, tokens, reason: FinishReason, *, logprobs=None, first=True
    ) -> Event:
        self._scheduler.cancel(state.request.id)
        self._counts[f"finished_{reason}"] += 1
        return self._event(state, tokens, reason, logprobs=logprobs, first=first)

    def _event(self, state: RequestState, tokens, reason, *, logprobs, first: bool) -> Event:
        asked = state.request.sampling.prompt_logprobs is not None and first
        return Event(
            id=state.request.id,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(state.prompt_logprobs) if asked else None,
            finish_reason=reason,
            num_cached=state.num_cached,
            weight_version=state.weight_version,
        )

    def _end_tokens(self, settings: SamplingParams) -> frozenset[int]:
        eos = () if settings.ignore_eos else self._eos
        return frozenset((*settings.stop_token_ids, *eos))


def _with_tokens_left(states: Sequence[RequestState]) -> list[RequestState]:
    """Those that still run, and have tokens left that no dispatch was asked for."""
    return [s for s in states if s.phase != "finished" and s.num_to_dispatch > 0]


def _masks(rows: Sequence[RequestState]) -> list[np.ndarray | None]:
    """Tokens that each row's grammar allows next; None where there is no grammar."""
    constraints = [state.request.constraint for state in rows]
    return [None if grammar is None else grammar.mask() for grammar in constraints]


def _sampler(rows: Sequence[RequestState]) -> sampling.Sampler:
    """The least general sampler that serves every row."""
    return "full" if any(state.sampler != "greedy" for state in rows) else "greedy"


_COUNTED = (
    "prompt_tokens", "cached_tokens", "generated_tokens", "finished_stop", "finished_length",
    "finished_cancelled", "guessed_tokens", "accepted_tokens",
)  # fmt: skip
