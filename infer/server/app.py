"""The ASGI application: the server's routes and their handlers."""

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infer.openai import parsing
from infer.server import description
from infer.server.answering import Generate
from infer.server.embeddings import Embed
from infer.server.http.errors import HttpError, json_response
from infer.server.shared_state import Endpoint, State


def build(state: State) -> Starlette:
    """The ASGI application. `/v1` asks for the API key; health, readiness and metrics do not."""
    generates = {
        "chat/completions": Generate(state, parsing.parse_chat, prefix="chatcmpl"),
        "completions": Generate(state, parsing.parse_completion, prefix="cmpl"),
    }
    posts = {**generates, "embeddings": Embed(state)}
    created = int(time.time())

    def model() -> dict[str, object]:
        about = {"id": state.model_name, "object": "model", "created": created}
        return {**about, "owned_by": "qwen_jax"}

    def models(request: Request) -> Response:
        state.check_key(request)
        return json_response({"object": "list", "data": [model()]})

    def one_model(request: Request) -> Response:
        state.check_key(request)
        state.check_model(request.path_params["name"])
        return json_response(model())

    def health(request: Request) -> Response:
        """Response of the liveness probe: 503 if the engine has failed or stopped."""
        alive = state.engine.state not in ("failed", "stopped")
        return json_response({"status": state.engine.state}, status=200 if alive else 503)

    def ready(request: Request) -> Response:
        """Response of the readiness probe: 200 if the server is warm and not about to stop."""
        status = "draining" if state.gate.draining else state.engine.state
        return json_response({"status": status}, status=200 if status == "ready" else 503)

    def metrics(request: Request) -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")

    def openapi(request: Request) -> Response:
        return json_response(description.openapi(state.model_name))

    return Starlette(
        routes=[
            *(
                Route(f"/v1/{path}", Endpoint(state, path, answer), methods=["POST"])
                for path, answer in posts.items()
            ),
            Route("/v1/models", _inline(models)),
            Route("/v1/models/{name:path}", _inline(one_model)),
            Route("/health", _inline(health)),
            Route("/ready", _inline(ready)),
            Route("/metrics", _inline(metrics)),
            Route("/openapi.json", _inline(openapi)),
        ],
        exception_handlers={HttpError: _refusal, HTTPException: _unknown, Exception: _mistake},
    )


def _inline(answer):
    """Runs on the event loop: none of these waits for anything, and a thread would cost more."""

    async def endpoint(request: Request) -> Response:
        return answer(request)

    return endpoint


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    text = f"{what!a}: {error.detail.lower()}; /openapi.json says what there is"
    return HttpError(error.status_code, text, headers=error.headers).response


async def _mistake(request: Request, error: Exception) -> Response:
    return HttpError(500, "internal error; the server's log says more").response
