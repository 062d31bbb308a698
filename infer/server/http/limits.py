"""The check of the API key, and the limit on the number of answers in progress."""

import contextlib
import hmac
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from configs.server import ServerConfig
from infer.server.http.errors import HttpError

API_KEY = "QWEN_JAX_API_KEY"


def read_key(settings: ServerConfig) -> str | None:
    """The API key from the file, or else from the environment; None if neither has one.

    Raises `ValueError` for an empty key and for a file that everybody on the machine may read.
    """
    if not settings.api_key_file:
        if (key := os.environ.get(API_KEY)) is None:
            return None
        return _check_key(key.strip(), f"environment variable {API_KEY}")
    path = Path(settings.api_key_file)
    if path.stat().st_mode & stat.S_IROTH:
        raise ValueError(f"{path} holds the API key and may be read by everybody; chmod 600 it")
    return _check_key(path.read_text(encoding="utf-8").strip(), str(path))


def _check_key(key: str, source: str) -> str:
    if not key or not key.isascii():
        raise ValueError(f"{source} holds no API key; ASCII characters are needed, at least one")
    return key


def check_key(key: str | None, authorization: str | None) -> None:
    """Raises 401 unless the header is `Bearer KEY`; takes as long whatever it holds."""
    if key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if scheme.lower() != "bearer" or not same:
        raise HttpError(
            401,
            "the API key is missing or wrong; send `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


class Gate:
    """A counter of the answers in progress, queued ones included, with an upper limit."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open = 0
        self.draining = False

    def check_draining(self) -> None:
        """Raises 503 while the server drains."""
        if self.draining:
            raise HttpError(503, "the server is stopping; ask another one", headers=_LATER)

    @contextlib.contextmanager
    def enter(self, num: int) -> Iterator[None]:
        """Holds `num` places. Raises 429 where they are taken, 503 where nothing new begins."""
        self.check_draining()
        if num > self.most:
            raise HttpError(400, f"{num} answers are asked for at once; at most {self.most} can be")
        if self.open + num > self.most:
            raise HttpError(
                429,
                f"{self.open} of {self.most} places are taken and {num} are needed; try later",
                code="rate_limit_exceeded",
                headers=_LATER,
            )
        self.open += num
        try:
            yield
        finally:
            self.open -= num


_LATER = {"retry-after": "1"}
