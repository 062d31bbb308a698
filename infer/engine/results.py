"""Results of dispatches, read to the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from infer.engine.request import Request, TokenLogprobs
from infer.engine.request_state import RequestState
from infer.engine.scheduler import Chunk
from qwen_jax.decode import forward, sampling
from qwen_jax.decode.logprobs import Logprobs


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A dispatch whose results have not been read: the requests of its rows, without padding."""

    rows: tuple[RequestState, ...]
    drawn: sampling.Drawn  # leaves [R, ...] or [steps, R, ...]
    num_steps: int = 1  # tokens that it may have drawn for each row
    prompt_logprobs: Logprobs | None = None  # leaves [R, T, ...]
    chunks: tuple[Chunk, ...] = ()  # of a prefill, one a row
    draft_RT: np.ndarray | jax.Array | None = None  # draft tokens that it verifies


def drawn_tokens(dispatch: InFlight) -> list[tuple[int, ...]]:
    """Tokens that the dispatch drew for each of its rows."""
    tokens = np.asarray(dispatch.drawn.tokens_B)
    tokens_SR = tokens if tokens.ndim == 2 else tokens[None]
    return [
        tuple(int(token) for token in tokens_SR[:, row] if token != forward.PAD)
        for row in range(len(dispatch.rows))
    ]


def host_logprobs(logprobs: Logprobs | None, requests: Sequence[Request]) -> Logprobs | None:
    """Logprobs with leaves [steps, R, ...] in numpy; None where no request asked for them."""
    if logprobs is None or all(request.sampling.logprobs is None for request in requests):
        return None
    values = jax.tree.map(np.asarray, logprobs)
    return values if values.drawn.ndim == 2 else jax.tree.map(lambda x: x[None], values)


def token_logprobs(
    tokens: Sequence[int], values: Logprobs, row: int, *, count: int
) -> tuple[TokenLogprobs, ...]:
    """Logprobs of one row's tokens, one a step, each with the `count` likeliest tokens."""
    return tuple(
        TokenLogprobs(
            token=int(token),
            drawn=float(values.drawn[step, row]),
            raw=float(values.raw[step, row]),
            top=tuple(
                zip(
                    values.top_ids[step, row, :count].tolist(),
                    values.top[step, row, :count].tolist(),
                    strict=True,
                )
            ),
        )
        for step, token in enumerate(tokens)
    )


def prompt_logprobs(dispatch: InFlight, row: int, *, count: int) -> tuple[TokenLogprobs, ...]:
    """Logprobs of the prompt tokens that follow those of a row's chunk."""
    chunk = dispatch.chunks[row]
    following = chunk.request.tokens[chunk.start + 1 : chunk.start + len(chunk.tokens) + 1]
    values = jax.tree.map(lambda x: np.asarray(x[row])[:, None], dispatch.prompt_logprobs)
    return token_logprobs(following, values, 0, count=count)
