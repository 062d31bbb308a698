"""Servers on loopback over an engine without a model."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httptools  # noqa: F401 (before any loop runs: it is slow to import)
import pytest

from configs.sampling import SamplingParams
from configs.server import ServerConfig
from infer.constraints.spec import ConstraintSpec
from infer.engine.request import Constraint, Event, Request
from infer.server.serve import Running
from infer.text.service import Service
from qwen_jax.text import tokenizer_training
from qwen_jax.text.tokenizer.tokenizer import Tokenizer
from tests.infer.fake_engine import FakeEngine

TEXT = "the quick brown fox jumps over the lazy dog and runs away into the dark green wood. "


class Engine(FakeEngine):
    """Answers `TEXT` over and over; a round takes `seconds`, and `trouble` is called in each."""

    def __init__(self, tokenizer: Tokenizer, *, seconds: float = 0.0, **more) -> None:
        letters = tokenizer.encode(TEXT)
        super().__init__(
            answer=lambda request: _repeated(letters, request),
            vocab_size=tokenizer.vocab_size,
            eos_ids=tokenizer.eos_ids,
            **more,
        )
        self.seconds = seconds
        self.trouble: Callable[[], None] = lambda: None

    def step(self) -> list[Event]:
        self.trouble()
        time.sleep(self.seconds)
        return super().step()

    def stats(self) -> dict[str, float]:
        return {"waiting": len(self.waiting), "running": len(self.running), "generated_tokens": 0}


def _repeated(letters: list[int], request: Request) -> list[int]:
    count = request.sampling.max_tokens
    return (letters * (count // len(letters) + 1))[:count]


class Client:
    """A server in a thread, and what a test wants to know of it."""

    def __init__(self, running: Running, engine: Engine, port: int) -> None:
        self.running, self.engine, self.port = running, engine, port
        self.url = f"http://127.0.0.1:{port}"
        self.code: int | None = None

    @property
    def is_quiet(self) -> bool:
        """Nothing is open, on any side."""
        state = self.running.state
        return not (state.gate.open or state.service.num_open) and self.engine.idle

    @property
    def num_waiting_tasks(self) -> int:
        """Calls that are under way on the event loop."""
        return len(self.running.server.server_state.tasks)

    def wait(self, condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{condition} is not so after {seconds} s"
            time.sleep(0.01)

    def wait_until_quiet(self, *, seconds: float = 10.0) -> None:
        self.wait(lambda: self.is_quiet, seconds=seconds)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.running.server.begin_drain)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return connection


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    return tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)


@contextlib.contextmanager
def running_server(
    words: Tokenizer,
    *,
    engine: Engine | None = None,
    service: Service | None = None,
    warm_up: Callable[[], object] = lambda: None,
    api_key: str | None = None,
    compile_constraint: Callable[[ConstraintSpec], Constraint] | None = None,
    **settings,
) -> Iterator[Client]:
    """Over `service`, or over one of the engine."""
    engine = service.engine if service else engine or Engine(words)
    service = service or Service(
        engine,
        tokenizer=words,
        defaults=SamplingParams(max_tokens=8),
        bos_id=words.eos_ids[0],
        compile_constraint=compile_constraint,
    )
    running = Running(
        service,
        settings=ServerConfig(**settings),
        model_name="tiny",
        num_slots=getattr(engine, "num_slots", 4),
        warm_up=warm_up,
        api_key=api_key,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    client = Client(running, engine, listener.getsockname()[1])

    async def serve() -> None:
        client.loop = asyncio.get_running_loop()
        client.code = await running.serve(listener)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        client.wait(lambda: running.server.started)
        yield client
    finally:
        client.stop()
        thread.join(timeout=60)
        assert not thread.is_alive(), "the server has not stopped"


@pytest.fixture(scope="module")
def server(words) -> Iterator[Client]:
    with running_server(words) as client:
        client.wait(lambda: client.running.state.engine.state == "ready")
        yield client
        client.wait_until_quiet()
