"""Calls that make text: from the body to the engine, and from its updates to the answer."""

import asyncio
import collections
import dataclasses
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from starlette.requests import Request

from infer.openai import parsing, responses
from infer.server import engine_thread
from infer.server.http import bodies, errors
from infer.server.http.errors import HttpError
from infer.server.prometheus import Call as Measured
from infer.server.shared_state import Sender, State, leaving, until_left
from infer.text.outputs import Answers, Update, Usage
from infer.text.service import TextRequest
from qwen_jax.text.chat import tool_calls

Parse = Callable[..., parsing.Call]


class Generate:
    """Answers to chats or completions: whole, or as a stream of events."""

    def __init__(self, state: State, parse: Parse, *, prefix: str) -> None:
        self._state = state
        self._parse = parse
        self._prefix = prefix  # of the answers' ids

    async def __call__(self, request: Request, sender: Sender, measured: Measured) -> None:
        state = self._state
        id = f"{self._prefix}-{uuid.uuid4().hex}"
        body = await bodies.read(request, state.settings)
        call = await state.in_thread(self._read, body, id)
        state.check_model(call.model)
        num_answers = sum(r.best_of or r.n for r in call.requests)
        if num_answers > state.settings.max_choices:
            most = state.settings.max_choices
            raise HttpError(400, f"{num_answers} answers are asked for; at most {most} are given")
        with state.gate.enter(num_answers):
            requests = await state.in_thread(self._encode, call)
            limit = state.settings.stream_buffer * num_answers
            stream = state.engine.open(requests, limit=limit)
            watching = asyncio.create_task(until_left(request.receive, leaving(stream)))
            try:
                answer = _Answer(call, id=id, model=state.model_name)
                if call.stream:
                    await answer.stream(stream, sender, measured)
                else:
                    await answer.collect(stream, request, sender, measured)
            finally:
                watching.cancel()
                state.engine.close(stream)

    def _read(self, body: dict[str, Any], id: str) -> parsing.Call:
        """The parsed call; requests without a seed get a random one."""
        defaults = self._state.service.defaults
        defaults = dataclasses.replace(defaults, seed=secrets.randbits(32))
        return self._parse(body, id=id, defaults=defaults)

    def _encode(self, call: parsing.Call) -> list[TextRequest]:
        """Requests with encoded prompts and compiled grammars, to spare the engine's thread."""
        self._state.service.constraint(call.requests[0].constraint)  # all requests have the same
        return [
            dataclasses.replace(request, prompt=self._tokens(request), tools=None)
            for request in call.requests
        ]

    def _tokens(self, request: TextRequest) -> tuple[int, ...]:
        tokens = self._state.service.encode(request)
        self._state.check_length(tokens)
        return tokens


class _Answer:
    """The answer to one call while it is being made."""

    def __init__(self, call: parsing.Call, *, id: str, model: str) -> None:
        self._call = call
        self._numbers = {request.id: number for number, request in enumerate(call.requests)}
        self._about = {"id": id, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()  # chat choices whose role has been said
        self._usages: list[Usage] = []
        self._tools: dict[int, _Tools] = collections.defaultdict(_Tools)  # by choice

    async def collect(
        self,
        stream: engine_thread.Stream,
        request: Request,
        sender: Sender,
        measured: Measured,
    ) -> None:
        answers = [Answers() for _ in self._call.requests]
        async for updates in stream:
            measured.saw(updates)
            for update in updates:
                answers[self._numbers[update.id]].add(update)
        body = responses.response(
            self._call,
            answers,
            split_tool_calls=tool_calls.split,
            **self._about,
        )
        await errors.json_response(body)(request.scope, request.receive, sender)

    async def stream(
        self, stream: engine_thread.Stream, sender: Sender, measured: Measured
    ) -> None:
        async for updates in stream:
            measured.saw(updates)
            await sender.begin_events()
            await sender.events([event for u in updates for event in self._events(u)])
        if self._call.usage != "none":
            chunk = responses.usage_chunk(self._call, self._usages, **self._about)
            await sender.events([chunk])
        await sender.end_events()

    def _events(self, update: Update) -> Iterator[dict[str, Any]]:
        number = self._numbers[update.id]
        if update.usage is not None:
            self._usages.append(update.usage)
        if self._call.kind == "chat" and update.index not in self._begun:
            self._begun.add(update.index)
            yield responses.first_chunk(self._call, update.index, **self._about)
        calls: list[dict[str, Any]] = []
        if self._call.requests[0].tools:
            update, calls = self._tools[update.index].take(update)
        if calls or self._shows(update):
            event = responses.chunk(self._call, update, number=number, **self._about)
            if calls:
                event["choices"][0]["delta"]["tool_calls"] = calls
            if self._tools[update.index].num_calls and update.finish_reason == "stop":
                event["choices"][0]["finish_reason"] = "tool_calls"
            yield event

    def _shows(self, update: Update) -> bool:
        """False for tokens whose text is still held back, unless they themselves are shown."""
        shown = update.text or update.finish_reason or update.prompt_logprobs
        return bool(shown or update.logprobs or self._call.token_ids == "shown")


class _Tools:
    """A parser that separates the tool calls of one choice from its text as it arrives."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._parser = tool_calls.Parser()

    def take(self, update: Update) -> tuple[Update, list[dict[str, Any]]]:
        """The update with its text alone, and the calls that are complete, as deltas."""
        pieces = self._parser.push(update.text)
        if update.finish_reason is not None:
            pieces += self._parser.finish()
        texts = [piece for piece in pieces if isinstance(piece, str)]
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        deltas = [
            {"index": self.num_calls + i, **tool_calls.to_openai(c)} for i, c in enumerate(calls)
        ]
        self.num_calls += len(calls)
        return dataclasses.replace(update, text="".join(texts)), deltas
