"""Starts a server, and stops it on SIGTERM or SIGINT."""

import asyncio
import concurrent.futures
import logging
import socket
from collections.abc import Callable
from typing import Any

from configs.server import ServerConfig
from infer.server import app as app_lib
from infer.server import engine_thread, prometheus
from infer.server.http import connections, limits
from infer.server.shared_state import State
from infer.text.service import Service

log = logging.getLogger(__name__)

NUM_ENCODERS = 4
_TICK = 0.05  # seconds between looks at what is still open


def run(
    service: Service,
    *,
    settings: ServerConfig,
    model_name: str,
    num_slots: int,
    warm_up: Callable[[], Any],
    show: Callable[[str], None] = print,
) -> int:
    """Serves until SIGTERM or SIGINT; 0 if every answer was finished then, 1 if some were cut off.

    `num_slots` answers are worked on at one time and `settings.max_queue` may wait. It listens at
    once, and is ready when `warm_up` has returned. Raises `OSError` for an address that cannot be
    had and `ValueError` for an API key that is none.
    """
    key = limits.read_key(settings)
    with _listen(settings) as listener:
        show(_greeting(listener, model_name=model_name, key=key))
        running = Running(
            service,
            settings=settings,
            model_name=model_name,
            num_slots=num_slots,
            warm_up=warm_up,
            api_key=key,
        )
        return asyncio.run(running.serve(listener))


class Running:
    """One server on an event loop. `state` and `server` are there to be looked at."""

    def __init__(
        self,
        service: Service,
        *,
        settings: ServerConfig,
        model_name: str,
        num_slots: int,
        warm_up: Callable[[], Any],
        api_key: str | None,
    ) -> None:
        engine = engine_thread.EngineThread(service, warm_up=warm_up)
        gate = limits.Gate(num_slots + settings.max_queue)
        self.state = State(
            settings=settings,
            model_name=model_name,
            api_key=api_key,
            service=service,
            engine=engine,
            gate=gate,
            metrics=prometheus.Metrics(engine_stats=lambda: engine.stats, open=lambda: gate.open),
            encoders=concurrent.futures.ThreadPoolExecutor(NUM_ENCODERS, "encoder"),
        )
        app = app_lib.build(self.state)
        self.server = connections.Server(app, settings=settings, drain=self._drain)
        self.num_cut = 0  # answers that draining has not waited for

    async def serve(self, listener: socket.socket) -> int:
        """Serves until told to stop; returns 0 if every answer was finished, else 1."""
        state = self.state
        state.engine.start()
        watching = asyncio.create_task(_watch(state.engine, state.settings))
        try:
            await self.server.serve(sockets=[listener])
        finally:
            watching.cancel()
            self.num_cut = max(self.num_cut, state.gate.open)
            await state.engine.stop()
            state.encoders.shutdown(wait=False, cancel_futures=True)
        log.info("stopped; %d answers were cut off", self.num_cut)
        return 1 if self.num_cut else 0

    async def _drain(self) -> None:
        """Waits for open calls to finish, and refuses new ones."""
        gate, seconds = self.state.gate, self.state.settings.drain_seconds
        gate.draining = True
        try:
            async with asyncio.timeout(seconds):
                while gate.open:
                    await asyncio.sleep(_TICK)
        except TimeoutError:
            self.num_cut = gate.open
            log.warning("%d answers are cut off after %g s of draining", self.num_cut, seconds)
            self.state.engine.end("stopped", "the server has stopped")


async def _watch(engine: engine_thread.EngineThread, settings: ServerConfig) -> None:
    while True:
        await asyncio.sleep(min(1.0, settings.engine_seconds / 4))
        engine.watch(longest_seconds=settings.engine_seconds)


def _listen(settings: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise OSError(f"cannot listen at {where}: {error.strerror}; choose another port") from None


def _greeting(listener: socket.socket, *, model_name: str, key: str | None) -> str:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    lines = [f"{model_name}: listening at {url}/v1"]
    if key is None:
        whom = "this machine" if host in ("127.0.0.1", "::1") else "ANYBODY WHO REACHES THIS HOST"
        lines.append(f"no API key: it answers {whom}; {limits.API_KEY} or --api-key-file sets one")
    return "\n".join(lines)
