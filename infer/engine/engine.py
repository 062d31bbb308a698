"""The batch inference engine: requests in, tokens out, as the scheduler shares out one model.

The host is always one dispatch ahead: it reads a dispatch's tokens while the device runs the
next. What it learns late, that a row has ended, costs rows of a dispatch that do nothing. Shapes
come from a short list, which `warm_up` compiles.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import capacity, device, page_table, scheduler, token_logprobs, validation
from infer.engine.live import Live
from infer.engine.request import Event, FinishReason, Request
from infer.speculation import draft as draft_lib
from infer.speculation import proposers
from partitioning.sharding import Layout
from qwen_jax.decode import forward, sampling
from qwen_jax.decode.logprobs import Logprobs
from qwen_jax.model import transformer


@dataclass(frozen=True)
class _Flight:
    """A dispatch whose results have not been read: its rows' requests, without padding."""

    rows: tuple[Live, ...]
    drawn: sampling.Drawn  # leaves [R, ...] or [steps, R, ...]
    num_steps: int = 1  # tokens that it may have drawn of each
    scored: Logprobs | None = None
    chunks: tuple[scheduler.Chunk, ...] = ()
    guesses_RT: np.ndarray | jax.Array | None = None  # that it checks


class Engine:
    """Serves requests over one set of parameters; one thread may call it."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: dict,
        *,
        settings: EngineConfig,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: forward.Attention | None = None,
        layout: Layout | None = None,
        draft: draft_lib.Draft | None = None,
    ):
        """`params` have their layers apart, in a form of `decode_params.prepare`.

        `draft` guesses where settings say so; its tokens mean what the model's do. Raises
        `ValueError` for stacked parameters, a mesh that spreads the batch, memory in which not even
        one request fits, and a draft that is missing, not asked for, or does not read as far.
        """
        draft_lib.check_asked(settings, given="none" if draft is None else "draft")
        if not isinstance(params["layers"], tuple):
            raise ValueError("an engine's layers lie apart: prepare them as 'fused' or 'unstacked'")
        if layout is not None:
            _check_mesh(layout)
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
        self._guesser = _guesser(self.settings, self._device)
        self._pages = page_table.PageTable(
            num_pages,
            page_size=settings.page_size,
            granularity=scheduler.granularity(self.settings),
        )
        self._scheduler = scheduler.Scheduler(self.settings, self._pages)
        self._live: dict[str, Live] = {}
        self._in_slot: dict[int, Live] = {}
        self._flights: collections.deque[_Flight] = collections.deque()
        self._events: list[Event] = []  # of what ended without a dispatch
        self._counts = collections.Counter()

    # -- requests

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises `ValueError` for an id in use, a token outside the vocabulary, and a prompt that with
        its max_tokens exceeds the engine's max_length or all of its pages.
        """
        if request.id in self._live:
            raise ValueError(f"a request with id {request.id!r} is being served; give each its own")
        tokens = validation.prompt(self._cfg, request.tokens, settings=request.sampling)
        request = dataclasses.replace(request, tokens=tokens)
        needed = len(request.tokens) + request.sampling.max_tokens
        limit = min(self.settings.max_length, self.settings.num_pages * self.settings.page_size)
        if needed > limit:
            raise ValueError(
                f"prompt of {len(request.tokens)} tokens with max_tokens="
                f"{request.sampling.max_tokens} needs {needed} positions; this engine has {limit} "
                f"for a request: shorten the prompt, lower max_tokens, or raise max_length"
            )
        sampler = "full" if request.constraint else sampling.sampler(request.sampling)
        self._live[request.id] = Live(request, sampler, self._ends(request.sampling))
        self._scheduler.add(request)

    def cancel(self, id: str) -> None:
        """Ends a request, with an event; nothing happens where none of this id is being served."""
        live = self._live.get(id)
        if live is not None:
            self._scheduler.cancel(id)
            self._events.append(self._end(live, (), "cancelled"))

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or unread."""
        return not (self._live or self._flights or self._events)

    # -- rounds

    def step(self) -> list[Event]:
        """Dispatches what the scheduler says, and gives what has arrived; [] when idle."""
        events, self._events = self._events, []
        work, in_flight = self._scheduler.next(), len(self._flights)
        if isinstance(work, scheduler.Prefill):
            self._read_prompts(work)
        elif isinstance(work, scheduler.Decode):
            events += self._decode(work)
        # The device always has one dispatch to go on with while another is read.
        if self._flights and (len(self._flights) > 1 or len(self._flights) <= in_flight):
            events += self._read(self._flights.popleft())
        return events

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Submits all, and gives events until the engine is idle."""
        for request in requests:
            self.submit(request)
        while not self.idle:
            yield from self.step()

    def stats(self) -> dict[str, float]:
        """What a monitor shows, by name; sums since the engine was made."""
        return {
            "waiting": self._scheduler.num_waiting,
            "running": len(self._in_slot),
            "free_pages": self._pages.free_pages,
            "cached_pages": self._pages.cached_pages,
            "compilations": forward.compilations.total(),
            **{name: self._counts[name] for name in _COUNTED},
        }

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The final hidden state of each prompt's last token, of length 1: [n, D] in float32."""
        settings = SamplingParams(max_tokens=1)
        rows = [validation.prompt(self._cfg, tokens, settings=settings) for tokens in prompts]
        return np.stack([self._device.embed(row) for row in rows])

    def warm_up(self, *, show: Callable[[str], None] = lambda line: None) -> float:
        """Compiles every program that requests can need, and gives the seconds that it took.

        As many at a time as there are cores, 16 at most; `show` is told of each. Afterwards
        `stats()["compilations"]` stays as it is, but for embed.
        """

        def compile(program: device.Program) -> tuple[str, float]:
            at = time.monotonic()
            program.compile()
            return program.name, time.monotonic() - at

        began = time.monotonic()
        programs = list(self._device.programs())
        pool = futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            jobs = [pool.submit(compile, program) for program in programs]
            for count, job in enumerate(futures.as_completed(jobs), 1):
                name, seconds = job.result()
                show(f"compiled {count} of {len(jobs)}: {name}, {seconds:.1f} s")
        finally:
            pool.shutdown(cancel_futures=True)
        for program in programs:
            jax.block_until_ready(program.run())
        return time.monotonic() - began

    # -- dispatches

    def _read_prompts(self, work: scheduler.Prefill) -> None:
        rows, score = [], "no"
        for chunk in work.chunks:
            live = self._live[chunk.request.id]
            if live.slot < 0:
                live.slot, live.pages, live.num_cached = chunk.slot, chunk.pages, chunk.num_cached
                self._in_slot[chunk.slot] = live
                self._counts["cached_tokens"] += chunk.num_cached
            self._counts["prompt_tokens"] += len(chunk.tokens)
            if chunk.request.sampling.prompt_logprobs is not None:
                score = "prompt"
            rows.append(live)
        drawn, scored = self._device.prefill(work, _masks(rows), score=score)
        self._flights.append(_Flight(tuple(rows), drawn, scored=scored, chunks=work.chunks))
        for chunk, live in zip(work.chunks, rows, strict=True):
            if chunk.is_last:
                self._scheduler.started(chunk.slot)
                live.dispatched = 1

    def _decode(self, work: scheduler.Decode) -> list[Event]:
        """Events of what had to be read first: grammars, and some guesses, go by the token before.

        Whether to guess goes by the scheduler's number of rows, for which programs are compiled.
        """
        events: list[Event] = []
        rows = self._decoding(work)
        constrained = any(live.request.constraint for live in rows)
        guesser = self._guesser
        if constrained or len(work.slots) > self.settings.speculation_rows:
            guesser = None
        if constrained or (guesser is not None and guesser.must_see(rows)):
            while self._flights:
                events += self._read(self._flights.popleft())
            rows = self._decoding(work)
        if rows:
            self._flights.append(self._draw(rows, guesser, num_rows=work.num_rows))
        return events

    def _draw(
        self, rows: Sequence[Live], guesser: proposers.Guesser | None, *, num_rows: int
    ) -> _Flight:
        """Dispatches a check of guesses where there are some, and plain steps otherwise."""
        slots, masks, sampler = [live.slot for live in rows], _masks(rows), _joint(rows)
        guesses_RT = guesser and guesser.guess(rows, num_rows=num_rows, sampler=sampler)
        if guesses_RT is not None:
            num_steps = self.settings.guesses + 1
            drawn = self._device.verify(slots, guesses_RT, sampler=sampler)
        else:
            free = all(mask is None for mask in masks)  # a mask serves one step
            num_steps = self.settings.decode_steps if free else 1
            drawn = self._device.advance(
                slots, masks, rows=num_rows, sampler=sampler, num_steps=num_steps
            )
            if self._guesser is not None:
                self._guesser.passed(rows)
        for live in rows:
            live.dispatched += num_steps
        return _Flight(tuple(rows), drawn, num_steps, guesses_RT=guesses_RT)

    def _decoding(self, work: scheduler.Decode) -> list[Live]:
        """Those that still run, and have tokens left that no dispatch was asked for."""
        rows = [self._in_slot[slot] for slot in work.slots if slot in self._in_slot]
        return [live for live in rows if live.budget > 0]

    # -- results

    def _read(self, flight: _Flight) -> list[Event]:
        tokens = np.asarray(flight.drawn.tokens_B)
        tokens_SR = tokens if tokens.ndim == 2 else tokens[None]
        logprobs = token_logprobs.host(
            flight.drawn.logprobs, [live.request for live in flight.rows]
        )
        guesses_RT = None if flight.guesses_RT is None else np.asarray(flight.guesses_RT)
        events = []
        for row, live in enumerate(flight.rows):
            if live.finished:
                continue
            if flight.chunks:
                self._keep_scores(flight, row, live)
                if not flight.chunks[row].is_last:
                    continue
                if live.request.sampling.max_tokens == 0:
                    events.append(self._end(live, (), "length"))
                    continue
            column = tokens_SR[:, row]
            drawn = tuple(int(token) for token in column if token != forward.PAD)
            live.dispatched -= flight.num_steps - len(drawn)
            if guesses_RT is not None:
                self._counts["guessed_tokens"] += int(np.sum(guesses_RT[row] >= 0))
                self._counts["accepted_tokens"] += max(0, len(drawn) - 1)
            if drawn:
                events.append(self._event(live, drawn, logprobs, row))
        return events

    def _event(self, live: Live, drawn: tuple[int, ...], logprobs, row: int) -> Event:
        settings = live.request.sampling
        first = not live.answer
        live.answer += drawn
        self._counts["generated_tokens"] += len(drawn)
        if live.request.constraint is not None:
            for token in drawn:
                if token not in live.ends:
                    live.request.constraint.accept(token)
        given = None
        if settings.logprobs is not None:
            given = token_logprobs.token_logprobs(drawn, logprobs, row, count=settings.logprobs)
        reason: FinishReason | None = None
        if drawn[-1] in live.ends:
            reason = "stop"
        elif len(live.answer) == settings.max_tokens:
            reason = "length"
        if reason is not None:
            return self._end(live, drawn, reason, logprobs=given, first=first)
        return self._made(live, drawn, None, logprobs=given, first=first)

    def _ends(self, settings: SamplingParams) -> frozenset[int]:
        eos = () if settings.ignore_eos else self._eos
        return frozenset((*settings.stop_token_ids, *eos))

    def _end(self, live: Live, tokens, reason: FinishReason, *, logprobs=None, first=True) -> Event:
        live.finished = True
        del self._live[live.request.id]
        if live.slot >= 0:
            del self._in_slot[live.slot]
            if reason != "cancelled":  # the scheduler knows of those already
                self._scheduler.finished(live.slot)
        self._counts[f"finished_{reason}"] += 1
        return self._made(live, tokens, reason, logprobs=logprobs, first=first)

    def _made(self, live: Live, tokens, reason, *, logprobs, first: bool) -> Event:
        asked = live.request.sampling.prompt_logprobs is not None and first
        return Event(
            id=live.request.id,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(live.prompt_logprobs) if asked else None,
            finish_reason=reason,
            num_cached=live.num_cached,
        )

    def _keep_scores(self, flight: _Flight, row: int, live: Live) -> None:
        count = live.request.sampling.prompt_logprobs
        if count is None:
            return
        chunk = flight.chunks[row]
        following = live.request.tokens[chunk.start + 1 : chunk.start + len(chunk.tokens) + 1]
        scored = jax.tree.map(lambda x: np.asarray(x[row])[:, None], flight.scored)
        live.prompt_logprobs += token_logprobs.token_logprobs(following, scored, 0, count=count)


def _check_mesh(layout: Layout) -> None:
    """Raises `ValueError` where devices would do the same work, or rows would be spread."""
    idle = [axis for axis in ("data", "fsdp", "context") if layout.mesh.shape.get(axis, 1) > 1]
    if idle or layout.size("batch") > 1:
        raise ValueError(
            f"an engine shares out its model over tensor and expert, and this mesh has "
            f"{dict(layout.mesh.shape)} under rules {layout.rules.name!r}; give fsdp=1 and no "
            f"other axis, rules 'engine', and one engine to each replica"
        )


def _guesser(settings: EngineConfig, on: device.Device) -> proposers.Guesser | None:
    """The way to guess that the settings name."""
    if settings.speculation == "off":
        return None
    if settings.speculation == "draft":
        return proposers.Drafts(settings, on)
    return proposers.Lookups(settings)


def _masks(rows: Sequence[Live]) -> list[np.ndarray | None]:
    """What each row's grammar allows next."""
    constraints = [live.request.constraint for live in rows]
    return [None if grammar is None else grammar.mask() for grammar in constraints]


def _joint(rows: Sequence[Live]) -> sampling.Sampler:
    """What serves all of them."""
    return "full" if any(r.sampler != "greedy" for r in rows) else "greedy"


_COUNTED = (
    "prompt_tokens", "cached_tokens", "generated_tokens", "finished_stop", "finished_length",
    "finished_cancelled", "guessed_tokens", "accepted_tokens",
)  # fmt: skip
