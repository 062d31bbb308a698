"""Reads a request's body as JSON, within limits on its size and on the time it takes."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from configs.server import ServerConfig
from infer.server.http.errors import HttpError

MOST_NESTED = 100  # JSON values inside each other
_CLOSE = {"connection": "close"}  # what is left of the body is not wanted
_PATIENCE = 4  # a body so many times too large is read to its end, so that its client sees why


async def read(request: Request, settings: ServerConfig) -> dict[str, Any]:
    """The JSON object that a request brings. Raises 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Not only for order's sake: a browser asks before it sends this type to another site.
        raise HttpError(415, f"content-type is {kind!a}; send application/json", headers=_CLOSE)
    try:
        async with asyncio.timeout(settings.body_seconds):
            body = await _bytes(request, settings.max_body)
    except TimeoutError:
        seconds = settings.body_seconds
        raise HttpError(
            408, f"the body was not there after {seconds:g} s", headers=_CLOSE
        ) from None
    return parse(body)


async def _bytes(request: Request, most: int) -> bytes:
    body = bytearray()
    size = 0
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) <= most * _PATIENCE:
        async for part in request.stream():
            size += len(part)
            if size <= most:
                body += part
            elif size > most * _PATIENCE:
                break
        else:
            if size <= most:
                return bytes(body)
    raise HttpError(413, f"the body is larger than {most} bytes, the limit here", headers=_CLOSE)


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object from UTF-8. Raises 400 for anything else, and for what JSON does not have."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise HttpError(400, f"the body has more than {MOST_NESTED} levels") from None
    except ValueError as error:
        raise HttpError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise HttpError(400, f"the body is a JSON {type(value).__name__}; an object is needed")
    _check_levels(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise HttpError(400, f"the body has more than {MOST_NESTED} levels")
