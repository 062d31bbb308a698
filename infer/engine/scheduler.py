"""Which requests run next: admission by memory, prompts in chunks, decode in between. No jax.

A request waits, is admitted to a slot with all the pages that it can ever need, has its prompt read
in chunks, decodes, and finishes. Nothing that was admitted is put back.

Nothing waits for ever:

- Admission. The policy's first request that fits is admitted; where one does not fit, or waits for
  a prompt that begins alike to be written, others may go before it. A request is overtaken when one
  that came later is admitted first. Once the oldest has been overtaken `_PATIENCE[policy]` times a
  slot, nobody else is admitted until it is, so a request waits for those before it and for no more
  than that many of those behind it. What the head of the line waits for is running, which ends.
- Prompts. Chunks are read by turns for the prompt that was admitted first and for the one with the
  least left to read, so a short prompt never waits for all of a long one, and a long one gets every
  other turn. Others of a similar length join in.
- Decode. Everything that decodes has its turn before prefills come to more tokens, padded, than
  `prefill_rounds` full ones: one large, or several small.
"""

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from configs.engine import EngineConfig
from infer.engine.page_table import PageTable, Reservation
from infer.engine.request import Request

_SHORTEST = 64  # tokens; a program of fewer takes as long: it reads the same weights
_HALVED = 512  # tokens from which lengths are closer: there padding costs the most
_PATIENCE = {"fair": 1, "longest_first": 16}  # times num_slots: how often one may be overtaken
_LOOK_AHEAD = 32  # requests that do not fit which are passed over in one look
_AT_ONCE = 32  # requests admitted in one look, so that the first need not wait for all the others
_WORTH_READING = 127  # tokens that are read again rather than waited for, if another writes them
_LEAST_COST = 512  # tokens that any prefill counts as at least, against those that decode
_CHEAP_PADDING = 512  # tokens of empty rows that cost less than one more prefill


@dataclass(frozen=True)
class Chunk:
    """Some of a prompt to read: `tokens` at positions from `start` on, into `pages`.

    `pages[i]` holds positions from i * page_size on; those before `start` are written.
    """

    slot: int
    request: Request
    pages: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]
    is_last: bool  # its last token's output draws the answer's first token
    num_cached: int  # how many of the prompt's tokens were never to be read


@dataclass(frozen=True)
class Prefill:
    """Chunks of different slots, to be padded to `num_rows` rows of `length` tokens."""

    chunks: tuple[Chunk, ...]
    num_rows: int
    length: int

    @property
    def fresh(self) -> bool:
        """Whether no chunk has anything before it in its pages."""
        return all(chunk.start == 0 for chunk in self.chunks)


@dataclass(frozen=True)
class Decode:
    """Draw `num_steps` tokens for each of these slots (ascending), padded to `num_rows` rows."""

    slots: tuple[int, ...]
    num_steps: int
    num_rows: int


@dataclass(frozen=True)
class Shapes:
    """Every shape that a scheduler asks for: what to compile before the first request."""

    prefill: tuple[tuple[int, int], ...]  # (num_rows, length)
    decode: tuple[int, ...]  # num_rows


def granularity(settings: EngineConfig) -> int:
    """Tokens that prompts which begin alike share at a time; see `PageTable`.

    A page; with one bucket a chunk, so that a prompt is cut at the same places whatever is cached.
    """
    return settings.prefill_chunk if settings.buckets == "one" else settings.page_size


def shapes(settings: EngineConfig) -> Shapes:
    """All shapes of prefills and decodes under these settings, smallest first."""
    return Shapes(
        prefill=tuple(
            (rows, length) for length in _lengths(settings) for rows in _rows(settings, length)
        ),
        decode=_decode_rows(settings),
    )


def capacity(request: Request) -> int:
    """Positions that a request can ever write: the last token drawn is never read."""
    return len(request.tokens) + max(1, request.sampling.max_tokens) - 1


def _doubles(least: int, most: int) -> tuple[int, ...]:
    """`least`, its doubles below `most`, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return (*sizes, most)


def _lengths(settings: EngineConfig) -> tuple[int, ...]:
    """Powers of two, and from `_HALVED` on what lies halfway between them."""
    most = settings.prefill_chunk
    if settings.buckets == "one":
        return (most,)
    sizes = _doubles(_SHORTEST, most)
    halfway = {size * 3 // 4 for size in sizes if size >= _HALVED and size & (size - 1) == 0}
    return tuple(sorted({*sizes, *halfway}))


def _rows(settings: EngineConfig, length: int) -> tuple[int, ...]:
    """The most, about half of them, and then 1/8, 1/32 ... of them; and 1."""
    most = min(settings.num_slots, settings.prefill_tokens // length)
    if settings.buckets == "one":
        return (most,)
    sizes = _doubles(1, most)[::-1]
    return tuple(sorted({1, most, *sizes[1::2]}))


def _decode_rows(settings: EngineConfig) -> tuple[int, ...]:
    return (settings.num_slots,) if settings.buckets == "one" else _doubles(1, settings.num_slots)


def _up(size: int, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if bucket >= size)


@dataclass(eq=False)
class _Running:
    request: Request
    slot: int
    reservation: Reservation
    read: int  # tokens of the prompt that are cached or were handed out in chunks
    state: Literal["reading", "read", "decoding"] = "reading"

    @property
    def left(self) -> int:
        return len(self.request.tokens) - self.read


class Scheduler:
    """Decides one device program at a time: `next`, dispatch it, tell what came of it, repeat.

    Programs must run in the order in which `next` gave them: a prompt's pages count as written for
    every later program as soon as the prefill that writes them was given.
    """

    def __init__(self, settings: EngineConfig, pages: PageTable) -> None:
        self._settings = settings
        self._pages = pages
        self._lengths = _lengths(settings)
        self._rows = {length: _rows(settings, length) for length in self._lengths}
        self._decode_rows = _decode_rows(settings)
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by order of arrival
        self._order: list[tuple[int, int]] = []  # heap: what the policy looks at, arrival
        self._arrivals: dict[str, int] = {}  # of those that wait, by id
        self._last_arrival = 0
        self._overtook: set[int] = set()  # arrivals admitted before the oldest that waits
        self._free_slots = list(range(settings.num_slots))  # a heap: low slots stay in use
        self._running: dict[int, _Running] = {}  # by slot, in order of admission
        self._slots: dict[str, int] = {}  # of those that run, by id
        self._news = False  # since the last look at the line: somebody may fit who did not
        self._spent = 0  # tokens of prefills since the last decode
        self._turn: Literal["first", "shortest"] = "first"

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def request(self, slot: int) -> Request:
        """Whose this slot is."""
        return self._running[slot].request

    def add(self, request: Request) -> None:
        """Puts a request in line.

        Raises `ValueError` for an id in use, an empty prompt, and one that all pages together
        cannot hold.
        """
        if request.id in self._arrivals or request.id in self._slots:
            raise ValueError(f"request {request.id!r} is here already; give each its own id")
        if not request.tokens:
            raise ValueError(f"request {request.id!r} has an empty prompt; give one token or more")
        most = self._pages.num_pages * self._pages.page_size
        if capacity(request) > most:
            raise ValueError(
                f"request {request.id!r} needs {capacity(request)} positions "
                f"(prompt {len(request.tokens)}, max_tokens {request.sampling.max_tokens}), and "
                f"all pages hold {most}; shorten it or give more pages"
            )
        self._last_arrival += 1
        arrival = self._last_arrival
        self._waiting[arrival] = request
        self._arrivals[request.id] = arrival
        first = 0 if self._settings.policy == "fair" else -capacity(request)
        heapq.heappush(self._order, (first, arrival))
        self._news = True

    def cancel(self, id: str) -> int | None:
        """Forgets a request; returns the slot that it leaves, None if it had none or is unknown."""
        if (arrival := self._arrivals.get(id)) is not None:
            self._leave_line(arrival)
            self._news = True
            return None
        if (slot := self._slots.get(id)) is not None:
            self.finished(slot)
        return slot

    def started(self, slot: int) -> None:
        """The prompt of this slot is read and its request decodes from now on."""
        running = self._running[slot]
        assert running.state == "read", f"slot {slot} is {running.state}"
        running.state = "decoding"

    def finished(self, slot: int) -> None:
        """The request of this slot is done, or given up: its slot and pages are free."""
        running = self._running.pop(slot)
        del self._slots[running.request.id]
        self._pages.release(running.reservation)
        heapq.heappush(self._free_slots, slot)
        self._news = True

    def next(self) -> Prefill | Decode | None:
        """What the device does next; None if nothing can be done before `add` or `started`."""
        if self._news:
            self._news = False
            self._admit()
        decoding = tuple(sorted(s for s, r in self._running.items() if r.state == "decoding"))
        reading = [r for r in self._running.values() if r.state == "reading"]
        if reading:
            group, rows, length = self._choose(reading)
            cost = max(rows * length, _LEAST_COST)
            budget = self._settings.prefill_rounds * self._settings.prefill_tokens
            if not decoding or self._spent == 0 or self._spent + cost <= budget:
                self._spent += cost
                return self._prefill(group, rows, length)
        self._spent = 0
        if not decoding:
            return None
        return Decode(
            slots=decoding,
            num_steps=self._settings.decode_steps,
            num_rows=_up(len(decoding), self._decode_rows),
        )

    # Admission

    def _admit(self) -> None:
        """Gives slots and pages to those that fit, in the policy's order but for the overtaken."""
        patience = _PATIENCE[self._settings.policy] * self._settings.num_slots
        passed_over: list[tuple[int, int]] = []
        enough = len(self._running) + _AT_ONCE  # more come after the next prefill
        while self._free_slots and self._waiting and len(passed_over) < _LOOK_AHEAD:
            if len(self._running) == enough:
                break
            if len(self._overtook) >= patience:
                if not self._try(next(iter(self._waiting)), overdue=True):
                    break
                continue
            if not self._order:
                break
            entry = heapq.heappop(self._order)
            arrival = entry[1]
            if arrival in self._waiting and not self._try(arrival, overdue=False):
                passed_over.append(entry)
        for entry in passed_over:
            heapq.heappush(self._order, entry)

    def _try(self, arrival: int, *, overdue: bool) -> bool:
        """Whether the request could be admitted, and was.

        One whose beginning is being written for another waits for that, unless it is overdue.
        """
        request = self._waiting[arrival]
        tokens = request.tokens if self._shares(request) else ()
        reservation = self._pages.reserve(
            tokens, capacity=capacity(request), most_promised=None if overdue else _WORTH_READING
        )
        if reservation is None:
            return False
        self._overtook.add(arrival)
        self._leave_line(arrival)
        slot = heapq.heappop(self._free_slots)
        self._running[slot] = _Running(request, slot, reservation, read=reservation.num_cached)
        self._slots[request.id] = slot
        return True

    def _shares(self, request: Request) -> bool:
        """Whether cached pages will do: a prompt's logprobs need every token of it read."""
        return self._settings.prefix_cache == "on" and request.sampling.prompt_logprobs is None

    def _leave_line(self, arrival: int) -> None:
        request = self._waiting.pop(arrival)
        del self._arrivals[request.id]
        if not self._waiting:
            self._order.clear()
            self._overtook.clear()
            return
        oldest = next(iter(self._waiting))
        if arrival < oldest:  # the oldest left: the next one was overtaken by fewer
            self._overtook = {other for other in self._overtook if other > oldest}

    # Prompts

    def _choose(self, reading: list[_Running]) -> tuple[list[_Running], int, int]:
        """The prompt whose turn it is and those that go well with it, rows, and length."""
        first = reading[0] if self._turn == "first" else min(reading, key=lambda r: r.left)
        length = self._length(first)
        return *self._group(first, reading, length), length

    def _prefill(self, group: list[_Running], rows: int, length: int) -> Prefill:
        """One chunk of each."""
        self._turn = "shortest" if self._turn == "first" else "first"
        chunks = tuple(self._chunk(running) for running in group)
        for running in group:
            self._pages.share(running.reservation, running.read)
        self._news = True  # what was read may be what somebody waits for
        return Prefill(chunks=chunks, num_rows=rows, length=length)

    def _length(self, running: _Running) -> int:
        chunk = min(running.left, self._settings.prefill_chunk)
        return _up(chunk, self._lengths)

    def _group(
        self, first: _Running, reading: list[_Running], length: int
    ) -> tuple[list[_Running], int]:
        """Who shares a prefill of this length with `first`, and its rows.

        Those of the same bucket, as many as there are rows for, or fewer where more than a quarter
        of the rows would be empty and dear; then shorter ones in rows that would be empty.
        """
        buckets = self._rows[length]
        others = [r for r in reading if r is not first]
        alike = [first, *(r for r in others if self._length(r) == length)][: buckets[-1]]
        shorter = sorted((r for r in others if self._length(r) < length), key=lambda r: -r.left)
        rows = _up(len(alike), buckets)
        empty = max(0, rows - len(alike) - len(shorter))
        fewer = [bucket for bucket in buckets if bucket < len(alike)]
        if fewer and 4 * empty > rows and empty * length >= _CHEAP_PADDING:
            rows = fewer[-1]
        return [*alike, *shorter][:rows], rows

    def _chunk(self, running: _Running) -> Chunk:
        start = running.read
        tokens = running.request.tokens[start : start + self._settings.prefill_chunk]
        running.read += len(tokens)
        if running.left == 0:
            running.state = "read"
        return Chunk(
            slot=running.slot,
            request=running.request,
            pages=running.reservation.pages,
            start=start,
            tokens=tokens,
            is_last=running.left == 0,
            num_cached=running.reservation.num_cached,
        )
