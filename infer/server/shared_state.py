"""State that all calls of one server share, and the base class of its endpoints."""

import asyncio
import concurrent.futures
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from configs.server import ServerConfig
from infer.openai.parameters import ParameterError
from infer.server import engine_thread
from infer.server import prometheus as metrics_lib
from infer.server.http import errors, limits
from infer.server.http.errors import HttpError
from infer.text.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class State:
    """One server. `encoders` are threads for work that would keep the event loop from others."""

    settings: ServerConfig
    model_name: str
    api_key: str | None
    service: Service
    engine: engine_thread.EngineThread
    gate: limits.Gate
    metrics: metrics_lib.Metrics
    encoders: concurrent.futures.Executor

    def check_key(self, request: Request) -> None:
        """Raises 401 unless the request brings the server's key, if it has one."""
        limits.check_key(self.api_key, request.headers.get("authorization"))

    def check_model(self, name: str | None) -> None:
        """Raises 404 for the name of another model; none is this one."""
        if name is not None and name != self.model_name:
            raise HttpError(
                404,
                f"model {name!a} is not served here; {self.model_name!a} is",
                code="model_not_found",
                param="model",
            )

    def check_ready(self) -> None:
        """Raises 503 where the model is not ready yet, 500 where it will not be again."""
        self.gate.check_draining()
        if self.engine.state in ("failed", "stopped"):
            raise HttpError(500, f"the engine has {self.engine.state}; the server's log says why")
        if self.engine.state != "ready":
            raise HttpError(503, "the model is warming up; try later", headers={"retry-after": "5"})

    def check_length(self, tokens: Sequence[int]) -> None:
        """Raises 400 for a prompt beyond the server's own limit; the engine has one, too."""
        most = self.settings.max_prompt_tokens
        if most and len(tokens) > most:
            raise HttpError(
                400,
                f"a prompt has {len(tokens)} tokens; at most {most} are taken here",
                code="context_length_exceeded",
            )

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls it beside the event loop. What a client's text makes it raise becomes a 400."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.encoders, function, *arguments)
        except ParameterError as error:
            raise HttpError(400, str(error), param=error.name) from None
        except (ValueError, RecursionError) as error:
            raise HttpError(400, str(error)) from None


class Sender:
    """The sender of one call's response, which can report a failure half-way through."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False

    async def __call__(self, message: Message) -> None:
        self._begun = True
        await self._send(message)

    async def begin_events(self) -> None:
        """Begins an answer of server-sent events, if it has not begun."""
        if not self._begun:
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            headers = [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self({"type": "http.response.start", "status": 200, "headers": headers})

    async def events(self, values: Sequence[object]) -> None:
        data = b"".join(b"data: %b\n\n" % errors.dump(value) for value in values)
        if data:
            await self({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self) -> None:
        await self({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def fail(self, error: HttpError, scope: Scope, receive: Receive) -> None:
        if not self._begun:
            await error.response(scope, receive, self)
            return
        await self.events([error.body])
        await self({"type": "http.response.body", "body": b""})


Answer = Callable[[Request, Sender, metrics_lib.Call], Awaitable[None]]


class Endpoint:
    """An ASGI application that answers one kind of call, or responds with the error."""

    def __init__(self, state: State, name: str, answer: Answer) -> None:
        self._state, self._name, self._answer = state, name, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, sender = Request(scope, receive), Sender(send)
        with self._state.metrics.call(self._name) as call:
            try:
                self._state.check_key(request)
                self._state.check_ready()
                await self._answer(request, sender, call)
                call.outcome = "answered"
            except (ClientDisconnect, engine_thread.ClientLeft):
                stalled = scope.get("state", {}).get("stalled")
                call.outcome = "client_stalled" if stalled else "client_left"
                log.info("%s: the client of %s has left", request.client, self._name)
            except engine_thread.TooSlow as error:
                call.outcome = "client_stalled"
                await sender.fail(HttpError(408, str(error)), scope, receive)
            except HttpError as error:
                call.outcome = _outcome(error.status)
                await sender.fail(error, scope, receive)
            except engine_thread.Refused as error:
                call.outcome = "refused"
                await sender.fail(HttpError(400, str(error)), scope, receive)
            except engine_thread.EngineFailed as error:
                await sender.fail(HttpError(500, str(error)), scope, receive)
            except Exception:
                log.exception("%s failed", self._name)
                error = HttpError(500, "internal error; the server's log says more")
                await sender.fail(error, scope, receive)


def _outcome(status: int) -> metrics_lib.Outcome:
    if status >= 500:
        return "unavailable" if status == 503 else "failed"
    return "busy" if status == 429 else "refused"


async def until_left(receive: Receive, leave: Callable[[], None]) -> None:
    """Waits for the client to go, and calls `leave`."""
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


def leaving(stream: engine_thread.Stream) -> Callable[[], None]:
    return functools.partial(stream.fail, engine_thread.ClientLeft())
