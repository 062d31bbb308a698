"""Calls for embeddings: a few prompts at a time, so that answers go on between them."""

import asyncio
from collections.abc import Sequence

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from infer.openai import parsing, responses
from infer.server import engine_thread
from infer.server.http import bodies, errors
from infer.server.http.errors import HttpError
from infer.server.prometheus import Call as Measured
from infer.server.shared_state import Sender, State, until_left
from infer.text.service import Embeddings

AT_ONCE = 4  # prompts of a call that the engine takes in one round


class Embed:
    """The endpoint that answers calls for embeddings."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def __call__(self, request: Request, sender: Sender, measured: Measured) -> None:
        state = self._state
        body = await bodies.read(request, state.settings)
        call = await state.in_thread(parsing.parse_embeddings, body)
        state.check_model(call.model)
        if len(call.prompts) > state.settings.max_inputs:
            most = state.settings.max_inputs
            raise HttpError(400, f"input holds {len(call.prompts)} texts; at most {most} are taken")
        with state.gate.enter(1):
            prompts = await state.in_thread(self._encode, call)
            here = asyncio.Event()
            watching = asyncio.create_task(until_left(request.receive, here.set))
            parts: list[Embeddings] = []
            try:
                for start in range(0, len(prompts), AT_ONCE):
                    parts.append(await state.engine.embed(prompts[start : start + AT_ONCE]))
                    if here.is_set():
                        raise engine_thread.ClientLeft
            finally:
                watching.cancel()
            response = await state.in_thread(self._response, call, parts)
        await response(request.scope, request.receive, sender)

    def _encode(self, call: parsing.EmbeddingsCall) -> list[tuple[int, ...]]:
        return [self._tokens(prompt) for prompt in call.prompts]

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        tokens = self._state.service.encode_input(prompt)
        self._state.check_length(tokens)
        return tokens

    def _response(self, call: parsing.EmbeddingsCall, parts: Sequence[Embeddings]) -> Response:
        """Written row by row: one call for all would keep every other thread from running."""
        vectors_ND = np.concatenate([part.vectors_ND for part in parts])
        whole = Embeddings(vectors_ND, sum(part.num_tokens for part in parts))
        model = self._state.model_name
        body = responses.embeddings_response(call, whole, model=model)
        rows = b",".join(errors.dump(row) for row in body.pop("data"))
        data = b'%b,"data":[%b]}' % (errors.dump(body)[:-1], rows)
        return Response(data, media_type="application/json")
