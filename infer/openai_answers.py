"""Answers in the forms of OpenAI's API."""

from collections.abc import Callable, Sequence
from typing import Any

from infer.openai_format import Call, EmbeddingsCall
from infer.service import Embeddings
from infer.updates import Answers, Update

# Cuts the calls of tools out of an answer: the text without them, and OpenAI's `tool_calls`.
SplitToolCalls = Callable[[str], tuple[str, list[dict[str, Any]]]]


def response(
    call: Call,
    answers: Sequence[Answers],
    *,
    id: str,
    created: int,
    model: str,
    split_tool_calls: SplitToolCalls | None = None,
) -> dict[str, Any]:
    """The whole answer to a call, one of `answers` for each of its requests.

    `split_tool_calls` is used where the call has tools.
    """
    ...


def chunk(
    call: Call, update: Update, *, id: str, created: int, model: str, number: int = 0
) -> dict[str, Any]:
    """One event of a stream: news of the call's request at index `number`."""
    ...


def first_chunk(call: Call, index: int, *, id: str, created: int, model: str) -> dict[str, Any]:
    """The event with which a chat's choice begins: its role."""
    ...


def usage_chunk(
    call: Call, answers: Sequence[Answers], *, id: str, created: int, model: str
) -> dict[str, Any]:
    """The event with which a stream ends where `stream_options.include_usage` asks for it."""
    ...


def embeddings_response(
    call: EmbeddingsCall, embeddings: Embeddings, *, model: str
) -> dict[str, Any]:
    """Vectors as numbers or as base64 of little-endian float32."""
    ...


def error(
    message: str,
    *,
    type: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
