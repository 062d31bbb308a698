"""Completes a batch of token sequences: buckets of shapes, dispatches, and the host's loop.

Tokens in, tokens out: text is the business of `infer/`. Shapes come from a few buckets, so that a
program is compiled once and serves every later batch of its bucket.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs import schema
from partitioning.sharding import Layout
from qwen_jax import decode, kv_cache, model, sampling

_MIN_PROMPT, _MIN_CACHE = 16, 64  # tokens: smallest buckets
_IN_FLIGHT = 2  # dispatches: the device always has one to go on with while the host reads another


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it. Make it with `request`, which checks it."""

    tokens: tuple[int, ...]
    sampling: schema.Sampling


@dataclass(frozen=True)
class Piece:
    """New tokens of the request at index `row`; the reason is given with the last ones.

    An end-of-sequence token is part of the tokens, and its reason is "stop".
    """

    row: int
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None


def request(cfg: schema.Model, tokens: Sequence[int], *, settings: schema.Sampling) -> Request:
    """A request that the model can serve. An empty prompt begins with the model's bos token.

    Raises `ValueError` for a token outside the vocabulary, for an empty prompt where the model has
    no bos token, and where prompt and answer would exceed the model's length.
    """
    tokens = tuple(int(token) for token in tokens)
    if not tokens:
        if cfg.bos_token_id is None:
            raise ValueError(
                f"the prompt is empty and {cfg.name} has no bos_token_id to begin with; give at "
                f"least one token"
            )
        tokens = (cfg.bos_token_id,)
    for token in tokens:
        if not 0 <= token < cfg.vocab_size:
            raise ValueError(
                f"prompt token {token} is outside the vocabulary of {cfg.vocab_size} rows; use the "
                f"tokenizer that came with the model"
            )
    for name, ids in (
        ("logit_bias", [token for token, _ in settings.logit_bias]),
        ("stop_token_ids", settings.stop_token_ids),
    ):
        for token in ids:
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(
                    f"{name} has token {token}, outside the vocabulary of {cfg.vocab_size} rows"
                )
    try:
        model.check_length(cfg, len(tokens) + settings.max_tokens)
    except ValueError as error:
        raise ValueError(
            f"prompt of {len(tokens)} tokens with max_tokens={settings.max_tokens}: {error}"
        ) from None
    return Request(tokens=tokens, sampling=settings)


def prompt_bucket(cfg: schema.Model, length: int) -> int:
    """The padded length of a prompt: a power of two, or the most that the model reads."""
    return min(max(_MIN_PROMPT, _power_of_two(length)), model.max_length(cfg))


def cache_bucket(length: int) -> int:
    """Positions of a cache for `length` tokens: 2^n or 1.5 x 2^n, so at most a third is spare."""
    size = max(_MIN_CACHE, _power_of_two(length))
    return size * 3 // 4 if length <= size * 3 // 4 and size > _MIN_CACHE else size


def batch_bucket(count: int, *, layout: Layout | None = None) -> int:
    """Rows for `count` requests: a power of two, times what the batch is sharded over."""
    parts = 1 if layout is None else layout.size("batch")
    return parts * _power_of_two(-(-count // parts))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def shape(
    cfg: schema.Model, requests: Sequence[Request], *, layout: Layout | None = None
) -> tuple[int, int, int]:
    """Rows, prompt length and cache length of the bucket that holds these requests."""
    prompt = prompt_bucket(cfg, max(len(r.tokens) for r in requests))
    # The last token drawn is never read again.
    needed = max(len(r.tokens) + r.sampling.max_tokens - 1 for r in requests)
    return batch_bucket(len(requests), layout=layout), prompt, cache_bucket(max(needed, prompt))


def num_bytes(cfg: schema.Model, *, rows: int, prompt: int, cache: int, dtype: jnp.dtype) -> int:
    """Bytes that a batch needs beside the parameters, over all devices: an estimate from above.

    The cache, one layer's activations of the prompts, its scores where no flash kernel runs, and
    logits with their changed and noisy copies, tokens seen and their counts.
    """
    size = jnp.dtype(dtype).itemsize
    flash = jax.default_backend() == "gpu" and size == 2
    scores = 0 if flash else 2 * 4 * cfg.num_attention_heads * prompt
    activations = size * (6 * cfg.hidden_size + 3 * cfg.intermediate_size) + scores
    held = kv_cache.num_bytes(cfg, num_slots=1, length=cache, dtype=dtype)
    return rows * (held + prompt * activations + 24 * cfg.vocab_size)


def generate(
    cfg: schema.Model,
    params: dict,
    requests: Sequence[Request],
    *,
    eos_ids: tuple[int, ...],
    dtype: jnp.dtype,
    num_steps: int = 16,
    attention: str | None = None,
    layout: Layout | None = None,
) -> Iterator[Piece]:
    """Continues every request, in one batch, until it ends or has `max_tokens`.

    Pieces come as the device delivers them: each request's first token, then up to `num_steps` at
    a time. Requests do not influence each other. Raises `ValueError` for logprobs: an engine gives
    them.
    """
    for r in requests:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(r.sampling, name) is not None:
                raise ValueError(
                    f"{name}={getattr(r.sampling, name)} is not given by this simple loop; leave "
                    f"it out, or serve the request by an engine"
                )
    rows, prompt, length = shape(cfg, requests, layout=layout)
    settings = [r.sampling for r in requests]
    how = "full" if any(sampling.how(s) == "full" for s in settings) else "greedy"
    tokens_BT, lengths_B, max_tokens_B = _arrays(requests, rows=rows, prompt=prompt)
    arrays = jax.device_put(sampling.settings(settings, num_rows=rows))
    common = {"how": how, "eos_E": np.asarray(eos_ids, np.int32), "layout": layout}
    state, tokens_B = decode.start(
        cfg,
        params,
        tokens_BT,
        lengths_B,
        max_tokens_B,
        arrays,
        length=length,
        dtype=jnp.dtype(dtype),
        attention=attention,
        **common,
    )
    # A GPU asks its host before each step whether to go on; elsewhere that costs nothing.
    stop = "dispatch" if jax.default_backend() == "gpu" else "step"
    in_flight = collections.deque([tokens_B[:, None]])
    drawn, longest = 1, max(s.max_tokens for s in settings)
    counts = np.zeros(len(requests), np.int64)
    open_rows = set(range(len(requests)))
    ends = [{*s.stop_token_ids, *(() if s.ignore_eos else eos_ids)} for s in settings]
    while open_rows:
        while len(in_flight) < _IN_FLIGHT and drawn < longest:
            state, tokens_BC = decode.advance(
                cfg, params, state, arrays, num_steps=num_steps, stop=stop, **common
            )
            in_flight.append(tokens_BC)
            drawn += num_steps
        for row, tokens in _rows(np.asarray(in_flight.popleft()), open_rows):
            counts[row] += len(tokens)
            reason = None
            if tokens[-1] in ends[row]:
                reason = "stop"
            elif counts[row] == settings[row].max_tokens:
                reason = "length"
            if reason is not None:
                open_rows.discard(row)
            yield Piece(row, tokens, reason)


def _arrays(
    requests: Sequence[Request], *, rows: int, prompt: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded prompts [B, T], their lengths [B] and tokens to draw [B], 0 in spare rows."""
    tokens_BT = np.zeros((rows, prompt), np.int32)
    lengths_B, max_tokens_B = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for row, r in enumerate(requests):
        tokens_BT[row, : len(r.tokens)] = r.tokens
        lengths_B[row], max_tokens_B[row] = len(r.tokens), r.sampling.max_tokens
    return tokens_BT, lengths_B, max_tokens_B


def _rows(tokens_BC: np.ndarray, open_rows: set[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The open rows that have new tokens, without their padding."""
    for row in sorted(open_rows):
        tokens = tuple(int(token) for token in tokens_BC[row] if token != decode.PAD)
        if tokens:
            yield row, tokens
