"""Drives a scheduler and a page table with a device that only pretends, and checks every step.

What traffic costs in padding is measured by `benchmarks/scheduling.py`.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from infer.engine import buckets
from infer.engine import scheduler as scheduler_lib
from infer.engine.page_table import PageTable
from infer.engine.request import Request
from infer.engine.scheduler import Decode, Prefill, Scheduler
from tests.infer import pretended


@dataclass
class Job:
    """A request, the step in which it comes, and that in which its sender gives it up, if any."""

    request: Request
    arrives: int
    leaves: int | None = None


@dataclass
class _Wait:
    """What a request has been through so far."""

    arrival: int
    overtaken: int = 0
    prefills: int = 0  # since it was admitted
    most_prefills: int = 0


@dataclass
class Report:
    """What a run came to."""

    answers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    prompt_tokens: int = 0  # read, not cached
    cached_tokens: int = 0
    most_overtaken: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)


class Simulation:
    """Requests through a scheduler; results are known `lag` programs after the one that made them.

    `run` raises `AssertionError` at the first step that breaks a promise.
    """

    def __init__(
        self, settings: EngineConfig, jobs: Sequence[Job], *, num_pages: int, lag: int = 0
    ) -> None:
        self.settings = settings
        self.jobs = deque(sorted(jobs, key=lambda job: job.arrives))
        self.pages = PageTable(
            num_pages,
            page_size=settings.page_size,
            granularity=buckets.granularity(settings),
        )
        self.scheduler = Scheduler(settings, self.pages)
        self.device = pretended.Device(num_pages, settings.page_size)
        self.lag = lag
        self.report = Report()
        self.unread: deque[dict[str, tuple[int, list[int]]]] = deque()
        self.tokens: dict[str, list[int]] = {}  # of requests that are not over
        self.requests = {job.request.id: job.request for job in jobs}
        self.waits: dict[str, _Wait] = {}  # of those in line
        self.reading: dict[str, _Wait] = {}  # of those whose prompts are being read
        self.departures: dict[int, list[str]] = {}
        self.num_arrived = 0
        self.in_a_row: list[int] = []  # padded tokens of the prefills without a pause
        self.last: Prefill | Decode | None = None
        shapes = buckets.shapes(settings)
        self.allowed = {*shapes.prefill, *((rows,) for rows in shapes.decode)}

    def run(self) -> Report:
        step = 0
        while self.jobs or self.unread or not self.scheduler.idle:
            self._arrive(step)
            for id in self.departures.pop(step, ()):
                self._cancel(id)
            program = self.scheduler.next()
            self._note_admissions()
            if program is None:
                self._check_idle()
                self.in_a_row = []  # nobody decodes, so nobody has waited for them
            elif isinstance(program, Prefill):
                self._prefill(program)
            else:
                self._decode(program)
            self.last = program
            while len(self.unread) > (self.lag if program is not None else 0):
                self._read(self.unread.popleft())
            audit(self.pages, [r.reservation for r in self.scheduler._running.values()])
            step += 1
        self._check_end()
        return self.report

    def _arrive(self, step: int) -> None:
        while self.jobs and self.jobs[0].arrives <= step:
            job = self.jobs.popleft()
            self.scheduler.add(job.request)
            self.tokens[job.request.id] = []
            self.num_arrived += 1
            self.waits[job.request.id] = _Wait(arrival=self.num_arrived)
            if job.leaves is not None:
                self.departures.setdefault(max(step, job.leaves), []).append(job.request.id)

    def _cancel(self, id: str) -> None:
        if id not in self.tokens:
            return
        self.scheduler.cancel(id)
        assert self.scheduler.cancel(id) is None
        del self.tokens[id]
        self.waits.pop(id, None)
        self.reading.pop(id, None)
        self.report.cancelled.add(id)

    def _note_admissions(self) -> None:
        """Counts who was overtaken, and sets how many prefills each may be read in."""
        running = [r.request.id for r in self.scheduler._running.values()]
        for id in running:
            if id not in self.waits:
                continue
            wait = self.reading[id] = self.waits.pop(id)
            for other in self.waits.values():  # dicts keep the order of arrival
                if other.arrival > wait.arrival:
                    break
                other.overtaken += 1
                self.report.most_overtaken = max(self.report.most_overtaken, other.overtaken)
        patience = scheduler_lib._PATIENCE[self.settings.policy] * self.settings.num_slots
        assert self.report.most_overtaken <= patience
        before = 0
        for running in self.scheduler._running.values():
            if (wait := self.reading.get(running.request.id)) is None:
                continue
            before += -(-(running.num_to_prefill) // self.settings.prefill_chunk)
            if wait.most_prefills == 0:
                wait.most_prefills = 2 * before + 1

    def _prefill(self, program: Prefill) -> None:
        report = self.report
        assert (program.num_rows, program.length) in self.allowed
        assert len({chunk.slot for chunk in program.chunks}) == len(program.chunks)
        assert 1 <= len(program.chunks) <= program.num_rows
        assert program.num_rows * program.length <= self.settings.prefill_tokens
        assert program.fresh == (not any(chunk.start for chunk in program.chunks))
        self.in_a_row.append(program.num_rows * program.length)
        if any(r.phase == "decoding" for r in self.scheduler._running.values()):
            budget = self.settings.prefill_rounds * self.settings.prefill_tokens
            assert len(self.in_a_row) == 1 or sum(self.in_a_row) <= budget
        owners = self._owners()
        drawn = self.device.prefill(program)
        self._check_owners(owners)
        for wait in self.reading.values():
            wait.prefills += 1
        results = {}
        for chunk in program.chunks:
            assert 1 <= len(chunk.tokens) <= program.length
            assert chunk.start % self.settings.page_size == 0
            report.prompt_tokens += len(chunk.tokens)
            if not chunk.is_last:
                continue
            report.cached_tokens += chunk.num_cached
            wait = self.reading.pop(chunk.request.id)
            assert wait.prefills <= wait.most_prefills
            results[chunk.request.id] = (chunk.slot, drawn[chunk.slot])
            if chunk.request.sampling.max_tokens > 1:
                self.scheduler.started(chunk.slot)
        report.shapes.add((program.num_rows, program.length))
        self.unread.append(results)

    def _decode(self, program: Decode) -> None:
        self.in_a_row = []
        running = self.scheduler._running
        decoding = sorted(slot for slot, r in running.items() if r.phase == "decoding")
        assert list(program.slots) == decoding
        if any(r.phase == "prefilling" for r in running.values()):
            assert not isinstance(self.last, Decode)
        assert (program.num_rows,) in self.allowed
        assert len(program.slots) <= program.num_rows
        ids = {slot: running[slot].request.id for slot in decoding}
        owners = self._owners()
        drawn = self.device.decode(program)
        self._check_owners(owners)
        self.report.shapes.add((program.num_rows,))
        self.unread.append({ids[slot]: (slot, drawn[slot]) for slot in decoding})

    def _read(self, results: dict[str, tuple[int, list[int]]]) -> None:
        for id, (slot, tokens) in results.items():
            if id not in self.tokens:
                continue
            answer = self.tokens[id]
            answer += tokens
            if pretended.END in answer[-1:] or len(answer) == self.requests[id].sampling.max_tokens:
                self.report.answers[id] = tuple(answer)
                del self.tokens[id]
                self.scheduler.finished(slot)

    def _owners(self) -> dict[int, int]:
        """How many of those that run hold each page."""
        owners: dict[int, int] = {}
        for running in self.scheduler._running.values():
            for page in running.reservation.pages:
                owners[page] = owners.get(page, 0) + 1
        return owners

    def _check_owners(self, owners: dict[int, int]) -> None:
        for page in self.device.written:
            assert owners.get(page) == 1, f"page {page} of {owners.get(page, 0)} owners was written"

    def _check_idle(self) -> None:
        """Nothing to do is true only while results are unread, or when all is done."""
        assert self.unread or self.scheduler.idle

    def _check_end(self) -> None:
        assert not self.tokens and not self.waits and not self.reading
        assert self.pages.free_pages + self.pages.cached_pages == self.pages.num_pages
        assert len(self.report.answers) + len(self.report.cancelled) == len(self.requests)
        for id, answer in self.report.answers.items():
            assert answer == pretended.alone(self.requests[id]), id


def audit(pages: PageTable, reservations: Sequence) -> None:
    """Every page has one place, every block its true number of users and the one it follows."""
    users: dict[int, int] = {}
    places = list(pages._free)
    for reservation in reservations:
        blocks = [*reservation._chain, *reservation._promised]
        for block in blocks:
            users[block.number] = users.get(block.number, 0) + 1
        in_chain = [page for block in reservation._chain for page in block.pages]
        places += reservation._private
        # A copy of a block that another prompt shares is private too.
        assert set(reservation.pages) == reservation._private | set(in_chain)
        assert {p for b in reservation._promised for p in b.pages} <= reservation._private
        assert all(block.written for block in reservation._chain)
        assert not any(block.written for block in reservation._promised)
        assert reservation.pages[: len(in_chain)] == tuple(in_chain)
    numbers = {block.number for block in pages._blocks.values()} | {0}
    for key, block in pages._blocks.items():
        assert block.key == key and key[0] in numbers
        assert block.users == users.get(block.number, 0)
        assert (block.users == 0) == (block.number in pages._unused)
        if block.written:
            places += block.pages
    assert sorted(places) == list(range(pages.num_pages))


def traffic(
    seed: int,
    *,
    num_requests: int,
    longest: int,
    most_tokens: int,
    burst: float = 0.3,
    prefixes: int = 6,
    cancelled: float = 0.1,
    scored: float = 0.05,
) -> list[Job]:
    """Requests of random lengths in random bursts; some begin alike, some give up, some score."""
    rng = random.Random(seed)
    shared = [
        tuple(rng.randrange(pretended.VOCABULARY) for _ in range(rng.randint(1, longest)))
        for _ in range(prefixes)
    ]
    jobs, step = [], 0
    for i in range(num_requests):
        if rng.random() > burst:
            step += rng.randint(0, 6)
        length = 1 + int((longest - 1) * rng.random() ** 2)
        tokens = tuple(rng.randrange(pretended.VOCABULARY) for _ in range(length))
        if rng.random() < 0.6:
            prefix = rng.choice(shared)
            cut = rng.choice((len(prefix), rng.randint(1, len(prefix))))
            tokens = (prefix[:cut] + tokens)[:longest]
            if rng.random() < 0.2:
                tokens = prefix[:cut]
        score = rng.random() < scored
        sampling = SamplingParams(
            max_tokens=0 if score else rng.randint(1, most_tokens),
            prompt_logprobs=0 if score else None,
        )
        leaves = step + rng.randint(0, 60) if rng.random() < cancelled else None
        request = Request(id=str(i), tokens=tokens, sampling=sampling)
        jobs.append(Job(request, arrives=step, leaves=leaves))
    return jobs
