"""Errors of one request, and the HTTP responses that report them."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from infer.openai import responses

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """A request that is refused, with the status and the reason its client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        fallback = "server_error" if status >= 500 else "invalid_request_error"
        kind = _TYPES.get(status, fallback)
        self.body = responses.error(message, type=kind, param=param, code=code)

    @property
    def response(self) -> Response:
        return json_response(self.body, status=self.status, headers=self.headers)


def json_response(
    value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        dump(value),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/json",
    )


def dump(value: Any) -> bytes:
    """Compact JSON in UTF-8. Lone surrogates, which a client's text may hold, become `?`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
