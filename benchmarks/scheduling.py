"""Effect of the scheduler's settings on several kinds of traffic, on a simulated device.

    python benchmarks/scheduling.py            # half a minute on a CPU; no accelerator, no jax
    python benchmarks/scheduling.py --tiny     # a rehearsal: few requests

The device is Qwen2.5 7B in bfloat16 on one H100: a prefill takes the longer of reading the weights
and 2 * parameters * padded tokens operations (attention aside), a decode step reads the weights and
the keys and values of all rows, and every program takes LAUNCH more. Seconds are this formula's;
padding, cached tokens and the host's time for a decision are counted and measured. The last column
is the longest that any request waited between two of its tokens' dispatches.
"""

import argparse
import pathlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from infer.engine import buckets
from infer.engine.page_table import PageTable
from infer.engine.request import Request
from infer.engine.scheduler import Decode, Prefill, Scheduler

BANDWIDTH = 2.9e12  # bytes/s of a large copy
SPEED = 600e12  # operations/s of large products
WEIGHTS = 7.1e9  # those that take part in products
POSITION = 28 * 2 * 4 * 128 * 2  # bytes of keys and values of one position
LAUNCH = 0.3e-3  # seconds
NUM_PAGES = 12_000  # of 64 positions: 44 GB


@dataclass(frozen=True)
class Arrival:
    request: Request
    at: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="few requests")
    scale = 20 if parser.parse_args().tiny else 1
    base = EngineConfig()
    variants = (
        base,
        replace(base, prefill_rounds=4),
        replace(base, prefill_rounds=64),
        replace(base, decode_steps=16, prefill_rounds=4),
        replace(base, policy="longest_first", prefill_rounds=64),
        replace(base, prefix_cache="off"),
    )
    print(
        "| traffic | settings | s | output tokens/s | first token s p50, p99 | padding | cached | "
        "prefills, decodes | host us | longest wait s |"
    )
    for name, make in TRAFFIC.items():
        for settings in variants:
            print(f"| {name} | {_name(settings)} | {drive(settings, make(scale))}", flush=True)


def _name(settings: EngineConfig) -> str:
    text = f"{settings.policy}, {settings.decode_steps} steps, {settings.prefill_rounds} rounds"
    return text + (", no cache" if settings.prefix_cache == "off" else "")


def drive(settings: EngineConfig, arrivals: Sequence[Arrival]) -> str:
    """Simulates one kind of traffic; returns its row of the table."""
    pages = PageTable(
        NUM_PAGES,
        page_size=settings.page_size,
        granularity=buckets.granularity(settings),
    )
    scheduler = Scheduler(settings, pages)
    coming = sorted(arrivals, key=lambda arrival: -arrival.at)
    clock = host = longest_wait = 0.0
    first, since, drawn = {}, {}, {}
    read = cached = padded = prefills = decodes = 0
    while coming or not scheduler.idle:
        while coming and coming[-1].at <= clock:
            scheduler.add(coming.pop().request)
        began = time.thread_time()
        program = scheduler.next()
        host += time.thread_time() - began
        if program is None:
            clock = coming[-1].at
        elif isinstance(program, Prefill):
            prefills += 1
            clock += _prefill_seconds(program)
            padded += program.num_rows * program.length
            read += sum(len(chunk.tokens) for chunk in program.chunks)
            for chunk in (chunk for chunk in program.chunks if chunk.is_last):
                cached += chunk.num_cached
                first[chunk.request.id] = since[chunk.slot] = clock
                drawn[chunk.slot] = 1
                scheduler.started(chunk.slot)
        else:
            decodes += 1
            longest_wait = max(longest_wait, *(clock - since[slot] for slot in program.slots))
            clock += _decode_seconds(program, scheduler, drawn)
            for slot in program.slots:
                since[slot] = clock
                drawn[slot] += program.num_steps
                if drawn[slot] >= scheduler.request(slot).sampling.max_tokens:
                    scheduler.finished(slot)
    waits = sorted(first[arrival.request.id] - arrival.at for arrival in arrivals)
    total = sum(arrival.request.sampling.max_tokens for arrival in arrivals)
    return (
        f"{clock:.1f} | {total / clock:.0f} | {waits[len(waits) // 2]:.2f}, "
        f"{waits[len(waits) * 99 // 100]:.2f} | {1 - read / padded:.0%} | "
        f"{cached / (read + cached):.0%} | {prefills}, {decodes} | "
        f"{host / (prefills + decodes) * 1e6:.0f} | {longest_wait:.2f} |"
    )


def _prefill_seconds(program: Prefill) -> float:
    tokens = program.num_rows * program.length
    return LAUNCH + max(2 * WEIGHTS / BANDWIDTH, 2 * WEIGHTS * tokens / SPEED)


def _decode_seconds(program: Decode, scheduler: Scheduler, drawn: dict[int, int]) -> float:
    positions = sum(len(scheduler.request(s).tokens) + drawn[s] for s in program.slots)
    step = (2 * WEIGHTS + positions * POSITION) / BANDWIDTH
    return LAUNCH + program.num_steps * step


def _requests(
    num: int,
    lengths: Callable[[random.Random], tuple[int, int]],
    *,
    rate: float = 0,
    shared: int = 0,
) -> list[Arrival]:
    """Requests at `rate` a second, or all at once; they share their first `shared` tokens."""
    rng, clock, arrivals = random.Random(0), 0.0, []
    for i in range(num):
        clock += rng.expovariate(rate) if rate else 0
        prompt, answer = lengths(rng)
        tokens = (*range(shared), *(rng.randrange(150_000) for _ in range(prompt)))
        sampling = SamplingParams(max_tokens=answer)
        arrivals.append(Arrival(Request(id=str(i), tokens=tokens, sampling=sampling), clock))
    return arrivals


def _chat(rng: random.Random) -> tuple[int, int]:
    """Prompt and answer lengths of a chat: median 300, one in 100 above 4,000; up to 512."""
    return min(8192, max(8, int(rng.lognormvariate(5.7, 1.1)))), rng.randint(16, 512)


TRAFFIC = {
    "256 at once, 1024 in, 256 out": lambda k: _requests(256 // k, lambda rng: (1024, 256)),
    "3000 chats at once": lambda k: _requests(3000 // k, _chat),
    "20 chats a second": lambda k: _requests(2000 // k, _chat, rate=20),
    "1500 shared and 100 own tokens at once": lambda k: _requests(
        1000 // k, lambda rng: (rng.randint(60, 140), 64), shared=1500
    ),
}

if __name__ == "__main__":
    main()
