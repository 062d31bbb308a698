"""A server on loopback at rising load: time to the first token, and between tokens.

    python benchmarks/serve.py --model Qwen2.5-7B-Instruct   # `qwen-jax serve` of this folder
    python benchmarks/serve.py --preset 0.5b                 # random bfloat16 weights
    python benchmarks/serve.py --tiny                        # rehearsal on a CPU
    python benchmarks/serve.py --no-model                    # what the server itself costs

Clients come at random (Poisson) at each rate for so many seconds, whether or not the earlier ones
have been answered; each streams one answer of full length to a prompt of random tokens. `pieces`
are the gaps between the pieces of an answer as its client sees them, `tokens` is a request's mean
time for a token after the first. A request is lost if it does not end as it should with all its
tokens; the exit code is 1 if one was. The server is a process of its own; so that the clients'
process is not what is measured, its share of a core stands in the table.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

HEADER = (
    "| rate /s | requests | lost | output tokens/s | first token ms p50 | p99 | pieces ms p50 "
    "| p99 | tokens ms p50 | p99 | most at once | clients' core |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder for `qwen-jax serve`")
    which.add_argument("--preset", help="size of a published model, with random weights")
    which.add_argument("--tiny", action="store_true")
    which.add_argument("--no-model", action="store_true")
    parser.add_argument("--rates", default="", help="requests a second, for example 1,2,4,8")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens in")
    parser.add_argument("--answer", type=int, default=256, help="tokens out")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.prompt, arguments.answer, arguments.slots = 24, 16, 4
        arguments.seconds = min(arguments.seconds, 4.0)
    if arguments.child:
        sys.exit(serve(arguments))
    with server(arguments) as address:
        sys.exit(asyncio.run(rise(address, arguments)))


# -- the server


@contextlib.contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server in a process of its own, ready; SIGTERM must end it in order."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--child", *sys.argv[1:]]
    if arguments.model:
        command = [
            sys.executable, "-m", "qwen_jax.cli", "serve", "--model", arguments.model,
            "--port", "0",
            "--engine.num-slots", str(arguments.slots),
            "--engine.max-length", str(arguments.prompt + arguments.answer),
        ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    try:
        for line in process.stdout:
            if found := re.search(r"listening at http://([\d.]+):(\d+)", line):
                break
        else:
            sys.exit("the server has not started")
        address = found[1], int(found[2])
        while asyncio.run(_status(address)) != 200:
            time.sleep(0.2)
            if process.poll() is not None:
                sys.exit("the server has not become ready")
        print(f"ready after {time.monotonic() - began:.1f} s", flush=True)
        yield address
        process.terminate()
        process.communicate(timeout=90)
        print(f"the server drained and ended with {process.returncode}")
    finally:
        process.kill()
        process.communicate()


async def _status(address: tuple[str, int]) -> int:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])


def serve(arguments: argparse.Namespace) -> int:
    """Runs the server process, with random weights or an engine that costs nothing."""
    from configs.sampling import SamplingParams
    from configs.server import ServerConfig
    from infer import server as server_lib
    from infer.text.service import Service
    from qwen_jax.text import tokenizer_training

    words = tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)
    if arguments.no_model:
        engine, warm_up = Nothing(), lambda: None
    else:
        engine = _random_engine(arguments)
        warm_up = functools.partial(engine.warm_up, show=functools.partial(print, file=sys.stderr))
    return server_lib.run(
        Service(engine, tokenizer=words, defaults=SamplingParams(), bos_id=0),
        settings=ServerConfig(port=0, max_queue=10_000, max_connections=20_000),
        model_name="benchmark",
        num_slots=arguments.slots,
        warm_up=warm_up,
        show=lambda text: print(text, flush=True),
    )


def _random_engine(arguments: argparse.Namespace):
    import engine as engine_benchmark

    from configs.engine import EngineConfig
    from configs.models import qwen2_5

    cfg = qwen2_5.tiny() if arguments.tiny else qwen2_5.base(arguments.preset)
    settings = EngineConfig(
        num_slots=arguments.slots,
        max_length=arguments.prompt + arguments.answer,
        page_size=16 if arguments.tiny else 64,
        prefill_chunk=32 if arguments.tiny else 2048,
        prefill_tokens=64 if arguments.tiny else 8192,
        buckets="one" if arguments.tiny else "few",
    )
    return engine_benchmark.make(cfg, settings, weights="bf16", mesh="")


class Nothing:
    """An engine without a model: eight tokens for everybody in each round, of 20 ms."""

    round_seconds = 0.02

    def __init__(self) -> None:
        self._left: dict[str, int] = {}

    @property
    def idle(self) -> bool:
        return not self._left

    def submit(self, request) -> None:
        self._left[request.id] = request.sampling.max_tokens

    def cancel(self, id: str) -> None:
        self._left[id] = 0

    def step(self) -> list:
        from infer.engine.request import Event

        time.sleep(self.round_seconds)
        events = []
        for id, left in list(self._left.items()):
            count = min(8, left)
            self._left[id] -= count
            reason = None if self._left[id] else "length"
            events.append(Event(id=id, tokens=(97,) * count, finish_reason=reason))
            if reason:
                del self._left[id]
        return events

    def stats(self) -> dict[str, float]:
        return {"running": len(self._left)}


# -- the clients


@dataclasses.dataclass
class Seen:
    """One request as its client saw it: seconds since it was sent, tokens of each piece."""

    times: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


async def rise(address: tuple[str, int], arguments: argparse.Namespace) -> int:
    default = "5,20,60" if arguments.tiny else "1,2,4,8,16,32"
    print(HEADER)
    print("|" + " --- |" * (HEADER.count("|") - 1))
    lost = 0
    await ask(address, arguments, random.Random(0))  # programs that a warm-up does not know of
    for rate in map(float, (arguments.rates or default).split(",")):
        lost += await run_rate(address, rate, arguments)
    print(f"{lost} lost")
    return 1 if lost else 0


async def run_rate(address: tuple[str, int], rate: float, arguments: argparse.Namespace) -> int:
    """Prints one row of the table, and returns the number of requests that were lost."""
    rng = random.Random(rate)
    now, cpu = time.perf_counter(), time.process_time()
    start, tasks, most = now, [], 0
    arrival = start
    while (arrival := arrival + rng.expovariate(rate)) < start + arguments.seconds:
        await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(address, arguments, rng)))
        most = max(most, sum(not task.done() for task in tasks))
    seen = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - start
    share = (time.process_time() - cpu) / seconds
    good = [s for s in seen if s.ended and sum(s.tokens) == arguments.answer]
    first = [s.times[0] for s in good]
    gaps = [b - a for s in good for a, b in zip(s.times, s.times[1:], strict=False)]
    each = [
        (s.times[-1] - s.times[0]) / (sum(s.tokens) - s.tokens[0]) for s in good if len(s.times) > 1
    ]
    columns = [
        f"{rate:g}", f"{len(seen)}", f"{len(seen) - len(good)}",
        f"{sum(sum(s.tokens) for s in good) / seconds:,.0f}",
        *(_ms(values, q) for values in (first, gaps, each) for q in (50, 99)),
        f"{most}", f"{share:.0%}",
    ]  # fmt: skip
    print("| " + " | ".join(columns) + " |", flush=True)
    return len(seen) - len(good)


def _ms(values: list[float], q: int) -> str:
    return f"{np.percentile(values, q) * 1e3:.1f}" if values else "-"


async def ask(address: tuple[str, int], arguments: argparse.Namespace, rng: random.Random) -> Seen:
    """One streamed completion by plain sockets: a client library would cost more than it shows."""
    body = {
        "prompt": [rng.randrange(256) for _ in range(arguments.prompt)],
        "max_tokens": arguments.answer,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    seen = Seen()
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head.encode() + data)
        async for line in reader:
            if line == b"data: [DONE]\n":
                seen.ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    break
                if tokens := event["choices"][0]["token_ids"]:
                    seen.times.append(time.perf_counter() - start)
                    seen.tokens.append(len(tokens))
        writer.close()
    except OSError as error:
        print(f"# {type(error).__name__}: {error}")
    return seen


if __name__ == "__main__":
    main()
