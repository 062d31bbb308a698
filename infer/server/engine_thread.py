"""The one thread that calls the engine, and its bridge to the event loop.

The loop's side never waits for the engine: it leaves orders in a queue, and updates come back
through `call_soon_threadsafe`, all of a round at once. An engine that fails or hangs fails every
open request; none waits for ever.
"""

import asyncio
import collections
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Literal

from infer.text.outputs import Update
from infer.text.service import Embeddings, Service, TextRequest

log = logging.getLogger(__name__)

State = Literal["warming up", "ready", "stopped", "failed"]


class EngineFailed(Exception):
    """The engine raised or hung; nothing more comes from it."""


class Refused(Exception):
    """A request that cannot be served, or not to its end; the text says why."""


class TooSlow(Exception):
    """A client that takes its answer more slowly than it is made, beyond what is kept for it."""


class ClientLeft(Exception):
    """The client closed its connection before the answer was complete."""


class Stream:
    """Updates of a call's requests on the loop's side; iterating gives all that wait, at least one.

    At most `limit` updates wait: the one too many raises `TooSlow` in whoever iterates. Ends after
    the update with the last request's usage.
    """

    def __init__(self, ids: Iterable[str], *, limit: int) -> None:
        self.ids = tuple(ids)
        self.open = set(self.ids)  # what the engine is not done with
        self.limit = limit
        self._waiting: list[Update] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, update: Update) -> None:
        self._waiting.append(update)
        if update.error is not None:
            self.fail(Refused(update.error))
        if update.usage is not None:
            self.open.discard(update.id)
        self._news.set()

    @property
    def is_full(self) -> bool:
        return len(self._waiting) > self.limit

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error; the first one counts."""
        self._error = self._error or error
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[list[Update]]:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            waiting, self._waiting = self._waiting, []
            if waiting:
                yield waiting
            if not self.open and not self._waiting:
                return


class EngineThread:
    """Runs a service. All methods but those with `_on_thread` in their name are the loop's."""

    def __init__(self, service: Service, *, warm_up: Callable[[], Any]) -> None:
        self.service = service
        self.state: State = "warming up"
        self.stats: dict[str, float] = {}  # of the engine, after its last round
        self._warm_up = warm_up
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._embeddings: collections.deque[tuple[asyncio.Future, Sequence]] = collections.deque()
        self._streams: dict[str, Stream] = {}
        self._futures: set[asyncio.Future] = set()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run_on_thread, name="engine", daemon=True)

    @property
    def num_open(self) -> int:
        """Number of requests and calls for embeddings that are still open."""
        return len(self._streams) + len(self._futures)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, *, seconds: float = 10.0) -> None:
        """Ends the thread, and every request that is still open."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        self.end("stopped", "the server has stopped")
        if self._thread.is_alive():
            log.error("the engine has not come back within %g s of being stopped", seconds)

    def open(self, requests: Sequence[TextRequest], *, limit: int) -> Stream:
        """Submits requests. `Refused` and `EngineFailed` come from iterating their stream."""
        stream = Stream((request.id for request in requests), limit=limit)
        if self.state in ("failed", "stopped"):
            stream.fail(EngineFailed("the engine is not running"))
            return stream
        for request in requests:
            self._streams[request.id] = stream
            self._orders.put(functools.partial(self._submit_on_thread, request))
        return stream

    def close(self, stream: Stream) -> None:
        """Closes a stream that has no reader any more, and cancels its unfinished requests."""
        for id in stream.ids:
            if self._streams.pop(id, None) is not None and id in stream.open:
                self._orders.put(functools.partial(self.service.cancel, id))

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Embeddings:
        """Embedding vectors of a few prompts. Raises `Refused` or `EngineFailed`."""
        if self.state in ("failed", "stopped"):
            raise EngineFailed("the engine is not running")
        future = self._loop.create_future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        self._orders.put(functools.partial(self._embeddings.append, (future, prompts)))
        return await future

    def watch(self, *, longest_seconds: float) -> None:
        """Gives the engine up where one round takes longer. Called now and then."""
        since = self._busy_since
        if self.state == "ready" and since and time.monotonic() - since > longest_seconds:
            log.critical("the engine has been at one round for more than %g s", longest_seconds)
            self.end("failed", "the engine hangs")

    def _deliver(
        self, updates: list[Update], refused: Sequence[tuple[str, Exception]] = ()
    ) -> None:
        for update in updates:
            if (stream := self._streams.get(update.id)) is not None:
                stream.put(update)
                if stream.is_full:  # whoever iterates may be stuck in sending
                    self._give_up(stream)
        for id, error in refused:
            if (stream := self._streams.get(id)) is not None:
                stream.open.discard(id)
                stream.fail(error)

    def _give_up(self, stream: Stream) -> None:
        reason = f"{stream.limit} pieces of the answer wait for its client, who reads too slowly"
        log.warning("%s is cancelled: %s", stream.ids[0], reason)
        stream.fail(TooSlow(reason))
        self.close(stream)

    def _settle(self, future: asyncio.Future, result: Embeddings | Exception) -> None:
        if future.done():  # whoever waited has left
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _set_state(self, state: State) -> None:
        if self.state not in ("failed", "stopped"):
            self.state = state

    def end(self, state: State, reason: str) -> None:
        """Fails every open request, and refuses new ones from now on."""
        self._set_state(state)
        for stream in set(self._streams.values()):
            stream.fail(EngineFailed(reason))
        for future in list(self._futures):
            self._settle(future, EngineFailed(reason))

    def _run_on_thread(self) -> None:
        try:
            began = time.monotonic()
            self._warm_up()
            log.info("ready after %.1f s of warming up", time.monotonic() - began)
            self.stats = self.service.engine.stats()
            self._tell(self._set_state, "ready")
            while self._obey_on_thread():
                self._round_on_thread()
        except Exception:
            log.critical("the engine failed", exc_info=True)
            self._tell(self.end, "failed", "the engine failed; the server's log says why")

    def _obey_on_thread(self) -> bool:
        """Takes the orders that are there; waits for one where there is nothing else to do."""
        wait = self.service.idle and not self._embeddings
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            self._busy_since = self._busy_since or time.monotonic()
            order()
            wait = False

    def _round_on_thread(self) -> None:
        self._busy_since = self._busy_since or time.monotonic()
        if not self.service.idle:
            updates = self.service.step()
            if updates:
                self._tell(self._deliver, updates)
        if self._embeddings:  # one call a round, so that answers go on between them
            future, prompts = self._embeddings.popleft()
            if not future.done():
                self._tell(self._settle, future, self._embed_on_thread(prompts))
        self.stats = self.service.engine.stats()
        self._busy_since = None

    def _embed_on_thread(self, prompts: Sequence[Sequence[int]]) -> Embeddings | Exception:
        try:
            return self.service.embed(prompts)
        except ValueError as error:
            return Refused(str(error))

    def _submit_on_thread(self, request: TextRequest) -> None:
        try:
            self.service.submit(request)
        except ValueError as error:
            self._tell(self._deliver, [], [(request.id, Refused(str(error)))])
        except Exception:  # a mistake of ours that one request has met; the others go on
            log.exception("request %s could not be submitted", request.id)
            self.service.cancel(request.id)
            refused = EngineFailed("internal error; the server's log says more")
            self._tell(self._deliver, [], [(request.id, refused)])

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is there to be told
            log.debug("nobody was told by %s", function)
