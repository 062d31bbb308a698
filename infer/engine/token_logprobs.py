"""Logprobs of a dispatch, on the host."""

from collections.abc import Sequence

import jax
import numpy as np

from infer.engine.request import Request, TokenLogprobs
from qwen_jax.decode.logprobs import Logprobs


def host(logprobs: Logprobs | None, requests: Sequence[Request]) -> Logprobs | None:
    """With leaves [steps, R, ...] in numpy; None where no row asked for them."""
    if logprobs is None or all(request.sampling.logprobs is None for request in requests):
        return None
    values = jax.tree.map(np.asarray, logprobs)
    return values if values.drawn.ndim == 2 else jax.tree.map(lambda x: x[None], values)


def token_logprobs(
    tokens: Sequence[int], values: Logprobs, row: int, *, count: int
) -> tuple[TokenLogprobs, ...]:
    """Of one row's tokens, one a step, with `count` of the likeliest each."""
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
