"""Connections with limits on slow clients, and a server that drains on a signal.

uvicorn bounds neither the time nor the size of a request's headers, and waits without limit for
a client that takes nothing of its answer.
"""

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http import httptools_impl

from configs.server import ServerConfig

log = logging.getLogger(__name__)


class Connection(httptools_impl.HttpToolsProtocol):
    """uvicorn's connection, with limits on slow clients; its loss ends the request."""

    def __init__(self, *args: Any, settings: ServerConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # What the kernel does not take at once is a client that does not read.
        transport.set_write_buffer_limits(high=0)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._settings.send_buffer)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_here()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > self._settings.max_header:
                self._headers_are_here()
                self.send_400_response(f"Headers exceed {self._settings.max_header} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers_are_here()
        self._await_headers()

    def on_headers_complete(self) -> None:
        self._headers_are_here()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:  # a client that is refused may go on sending, but not for ever
            seconds = self._settings.body_seconds
            self.loop.call_later(seconds, self._end_unless_read, self.cycle)

    def _end_unless_read(self, cycle: httptools_impl.RequestResponseCycle) -> None:
        if self.cycle is cycle and cycle.more_body:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _await_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(self._settings.header_seconds, self._too_late)

    def _headers_are_here(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_late(self) -> None:
        self._header_timer = None
        log.info("%s: no request within %g s", self.client, self._settings.header_seconds)
        self.transport.abort()

    def _start_stall_timer(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        seconds = self._settings.stall_seconds
        self._stall_timer = self.loop.call_later(seconds, self._check_stalled, waiting)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _check_stalled(self, waiting: int) -> None:
        """Gives the client up if it has taken nothing; nothing is added while writing pauses."""
        if self.transport.get_write_buffer_size() < waiting:
            self._start_stall_timer()
            return
        seconds = self._settings.stall_seconds
        log.warning("%s: has taken nothing of its answer for %g s", self.client, seconds)
        if self.cycle is not None:
            self.cycle.scope["state"]["stalled"] = True
        self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server; the first signal drains it, the second ends it at once."""

    def __init__(
        self,
        app: Any,
        *,
        settings: ServerConfig,
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Connection, settings=settings),  # type: ignore[arg-type]
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=settings.max_connections,
                timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=5,
            )
        )
        self._drain = drain
        self._draining: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None:
            log.info("%s: draining; once more ends at once", signal.Signals(sig).name)
            self._loop.call_soon_threadsafe(self.begin_drain)
        else:
            self.should_exit = self.force_exit = True

    def begin_drain(self) -> None:
        """Begins to drain: open calls are answered, then the server ends."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        await self._drain()
        self.should_exit = True
