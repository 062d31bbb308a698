"""The scheduler of an engine: admission by memory, prefill in chunks, decode in between. No jax.

A request waits, is admitted to a slot with all the pages that it can ever need, is prefilled in
chunks, decodes, and finishes. No request that was admitted goes back to waiting.

No request waits for ever:

- Admission. The policy's first request that fits is admitted; where one does not fit, or waits for
  a prompt that begins alike to be written, others may go before it. A request is overtaken when one
  that came later is admitted first. Once the oldest has been overtaken `_PATIENCE[policy]` times a
  slot, nobody else is admitted until it is, so a request waits for those before it and for no more
  than that many of those behind it. What the head of the line waits for is running, which ends.
- Prompts. Prefills alternate between the prompt that was admitted first and the one with the least
  left to prefill, so a short prompt never waits for all of a long one, and a long one gets every
  other prefill. Others of a similar length join in.
- Decode. All requests that decode do so before prefills come to more tokens, padded, than
  `prefill_rounds` full ones: one large, or several small.
"""

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from configs.engine import EngineConfig
from infer.engine import buckets
from infer.engine.page_table import PageTable
from infer.engine.request import Request
from infer.engine.request_state import RequestState

_PATIENCE = {"fair": 1, "longest_first": 16}  # times num_slots: how often one may be overtaken
_LOOK_AHEAD = 32  # requests that do not fit which are passed over in one look
_AT_ONCE = 32  # requests admitted in one look, so that the first need not wait for all the others
_WORTH_READING = 127  # tokens that are read again rather than waited for, if another writes them
_LEAST_COST = 512  # tokens that any prefill counts as at least, against those that decode
_CHEAP_PADDING = 512  # tokens of empty rows that cost less than one more prefill


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt to prefill: `tokens` at positions from `start` on, into `pages`.

    `pages[i]` holds positions from i * page_size on; those before `start` are written.
    """

    state: RequestState
    start: int
    tokens: tuple[int, ...]
    is_last: bool  # its last token's output draws the answer's first token

    @property
    def slot(self) -> int:
        return self.state.slot

    @property
    def request(self) -> Request:
        return self.state.request

    @property
    def pages(self) -> tuple[int, ...]:
        return self.state.pages

    @property
    def num_cached(self) -> int:
        return self.state.num_cached


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
    """Draw `num_steps` tokens for each of these requests, padded to `num_rows` rows."""

    states: tuple[RequestState, ...]  # by slot, ascending
    num_steps: int
    num_rows: int

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(state.slot for state in self.states)


def capacity(request: Request) -> int:
    """Positions that a request can ever write: the last token drawn is never read."""
    return len(request.tokens) + max(1, request.sampling.max_tokens) - 1


class Scheduler:
    """Decides one device program at a time: `next`, dispatch it, tell what came of it, repeat.

    Programs must run in the order in which `next` gave them: a prompt's pages count as written for
    every later program as soon as the prefill that writes them was given.
    """

    def __init__(self, settings: EngineConfig, pages: PageTable) -> None:
        self._settings = settings
        self._pages = pages
        self._lengths = buckets.lengths(settings)
        self._rows = {length: buckets.rows(settings, length) for length in self._lengths}
        self._decode_rows = buckets.decode_rows(settings)
        self._states: dict[str, RequestState] = {}  # of those that wait or run, by id
        self._waiting: OrderedDict[int, RequestState] = OrderedDict()  # by order of arrival
        self._running: dict[int, RequestState] = {}  # by slot, in order of admission
        self._order: list[tuple[int, int]] = []  # heap: what the policy looks at, arrival
        self._last_arrival = 0
        self._overtook: set[int] = set()  # arrivals admitted before the oldest that waits
        self._free_slots = list(range(settings.num_slots))  # a heap: low slots stay in use
        self._admissions: Literal["open", "held"] = "open"
        self._look_again = False  # since the last look at the line somebody may fit who did not
        self._spent = 0  # tokens of prefills since the last decode
        self._next_prompt: Literal["first", "shortest"] = "first"

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._states

    def request(self, slot: int) -> Request:
        """The request that this slot belongs to."""
        return self._running[slot].request

    def state(self, id: str) -> RequestState | None:
        """The state of the request of this id; None if it neither waits nor runs."""
        return self._states.get(id)

    def add(
        self,
        request: Request,
        *,
        end_tokens: frozenset[int] = frozenset(),
        sampler: Literal["greedy", "full"] = "full",
    ) -> RequestState:
        """The state of a new request, which waits from now on.

        Raises `ValueError` for an id in use, an empty prompt, and one that all pages together
        cannot hold.
        """
        if request.id in self._states:
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
        state = RequestState(
            request=request, arrival=self._last_arrival, end_tokens=end_tokens, sampler=sampler
        )
        self._states[request.id] = self._waiting[state.arrival] = state
        first = 0 if self._settings.policy == "fair" else -capacity(request)
        heapq.heappush(self._order, (first, state.arrival))
        self._look_again = True
        return state

    def cancel(self, id: str) -> int | None:
        """The slot that a request leaves when it is removed; None if it had none or is unknown."""
        state = self._states.get(id)
        if state is None:
            return None
        if state.phase == "waiting":
            self._leave_line(state)
            del self._states[id]
            state.phase = "finished"
            self._look_again = True
            return None
        self.finished(state.slot)
        return state.slot

    def started(self, slot: int) -> None:
        """The prompt of this slot is read and its request decodes from now on."""
        state = self._running[slot]
        assert state.phase == "prefilled", f"slot {slot} is {state.phase}"
        state.phase = "decoding"

    def finished(self, slot: int) -> None:
        """The request of this slot is done, or given up: its slot and pages are free."""
        state = self._running.pop(slot)
        del self._states[state.request.id]
        state.phase = "finished"
        self._pages.release(state.reservation)
        heapq.heappush(self._free_slots, slot)
        self._look_again = True

    def hold_admissions(self) -> None:
        """Requests that wait go on waiting until `open_admissions`; those that run go on."""
        self._admissions = "held"

    def open_admissions(self) -> None:
        """Requests that wait are admitted again."""
        self._admissions = "open"
        self._look_again = True

    def next(self) -> Prefill | Decode | None:
        """What the device does next; None if nothing can be done before `add` or `started`."""
        if self._look_again and self._admissions == "open":
            self._look_again = False
            self._admit()
        running = self._running.values()
        decoding = sorted((s for s in running if s.phase == "decoding"), key=lambda s: s.slot)
        prefilling = [s for s in running if s.phase == "prefilling"]
        if prefilling:
            group, rows, length = self._choose(prefilling)
            cost = max(rows * length, _LEAST_COST)
            budget = self._settings.prefill_rounds * self._settings.prefill_tokens
            if not decoding or self._spent == 0 or self._spent + cost <= budget:
                self._spent += cost
                return self._prefill(group, rows, length)
        self._spent = 0
        if not decoding:
            return None
        return Decode(
            states=tuple(decoding),
            num_steps=self._settings.decode_steps,
            num_rows=buckets.round_up(len(decoding), self._decode_rows),
        )

    # Admission

    def _admit(self) -> None:
        """Admits waiting requests that fit, in the policy's order but for the overtaken."""
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
        state = self._waiting[arrival]
        request = state.request
        tokens = request.tokens if self._shares(request) else ()
        reservation = self._pages.reserve(
            tokens, capacity=capacity(request), most_promised=None if overdue else _WORTH_READING
        )
        if reservation is None:
            return False
        self._overtook.add(arrival)
        self._leave_line(state)
        state.phase, state.slot = "prefilling", heapq.heappop(self._free_slots)
        state.reservation, state.num_prefilled = reservation, reservation.num_cached
        self._running[state.slot] = state
        return True

    def _shares(self, request: Request) -> bool:
        """Whether cached pages will do: a prompt's logprobs need every token of it read."""
        return self._settings.prefix_cache == "on" and request.sampling.prompt_logprobs is None

    def _leave_line(self, state: RequestState) -> None:
        del self._waiting[state.arrival]
        if not self._waiting:
            self._order.clear()
            self._overtook.clear()
            return
        oldest = next(iter(self._waiting))
        if state.arrival < oldest:  # the oldest left: the next one was overtaken by fewer
            self._overtook = {other for other in self._overtook if other > oldest}

    # Prompts

    def _choose(self, prefilling: list[RequestState]) -> tuple[list[RequestState], int, int]:
        """Requests to prefill together, with the number of rows and the length of the prefill."""
        first = prefilling[0]
        if self._next_prompt == "shortest":
            first = min(prefilling, key=lambda s: s.num_to_prefill)
        length = self._length(first)
        return *self._group(first, prefilling, length), length

    def _prefill(self, group: list[RequestState], rows: int, length: int) -> Prefill:
        """A prefill of one chunk of each request."""
        self._next_prompt = "shortest" if self._next_prompt == "first" else "first"
        chunks = tuple(self._chunk(state) for state in group)
        for state in group:
            self._pages.share(state.reservation, state.num_prefilled)
        self._look_again = True  # what was read may be what somebody waits for
        return Prefill(chunks=chunks, num_rows=rows, length=length)

    def _length(self, state: RequestState) -> int:
        chunk = min(state.num_to_prefill, self._settings.prefill_chunk)
        return buckets.round_up(chunk, self._lengths)

    def _group(
        self, first: RequestState, prefilling: list[RequestState], length: int
    ) -> tuple[list[RequestState], int]:
        """Requests that share a prefill of this length with `first`, and its number of rows.

        Requests of the same bucket, as many as there are rows for, or fewer where more than a
        quarter of the rows would be empty at a cost; then shorter ones in rows that would be empty.
        """
        row_counts = self._rows[length]
        others = [s for s in prefilling if s is not first]
        alike = [first, *(s for s in others if self._length(s) == length)][: row_counts[-1]]
        shorter = [s for s in others if self._length(s) < length]
        shorter.sort(key=lambda s: -s.num_to_prefill)
        rows = buckets.round_up(len(alike), row_counts)
        empty = max(0, rows - len(alike) - len(shorter))
        fewer = [count for count in row_counts if count < len(alike)]
        if fewer and 4 * empty > rows and empty * length >= _CHEAP_PADDING:
            rows = fewer[-1]
        return [*alike, *shorter][:rows], rows

    def _chunk(self, state: RequestState) -> Chunk:
        start = state.num_prefilled
        tokens = state.prompt[start : start + self._settings.prefill_chunk]
        state.num_prefilled += len(tokens)
        if state.num_to_prefill == 0:
            state.phase = "prefilled"
        return Chunk(state, start, tokens, is_last=state.num_to_prefill == 0)
