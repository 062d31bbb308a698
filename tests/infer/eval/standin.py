"""Stands in for the batch engine: whole forward passes and the batched loop, slow and plain."""

import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from configs import schema
from infer import generate
from infer.eval.backend import Pair, Prompt, Score
from infer.eval.service_backend import ServiceBackend
from infer.request import Event, Request, TokenLogprobs
from infer.service import Service
from qwen_jax import generation, model
from qwen_jax.tokenizer import Tokenizer


class Engine:
    """All that is waiting is answered by one step."""

    def __init__(self, generator: generate.Generator) -> None:
        self._generator = generator
        self._waiting: dict[str, Request] = {}
        self.num_scored = self.most_open = 0

    @property
    def idle(self) -> bool:
        return not self._waiting

    def submit(self, request: Request) -> None:
        model.check_length(self._generator.cfg, len(request.tokens) + request.sampling.max_tokens)
        self._waiting[request.id] = request
        self.most_open = max(self.most_open, len(self._waiting))

    def cancel(self, id: str) -> None:
        self._waiting.pop(id, None)

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        raise NotImplementedError

    def step(self) -> list[Event]:
        requests, self._waiting = list(self._waiting.values()), {}
        drawing = [r for r in requests if r.sampling.max_tokens]
        events = [self._score(r) for r in requests if not r.sampling.max_tokens]
        return [*reversed(events), *self._draw(drawing)]

    def _draw(self, requests: list[Request]) -> list[Event]:
        if not requests:
            return []
        made = [
            generation.request(self._generator.cfg, r.tokens, settings=r.sampling) for r in requests
        ]
        return [
            Event(id=requests[p.row].id, tokens=p.tokens, finish_reason=p.finish_reason)
            for p in generate.run(self._generator, made)
        ]

    def _score(self, request: Request) -> Event:
        self.num_scored += 1
        rows = logprobs(self._generator, request.tokens)
        found = []
        for row, token in zip(rows, request.tokens[1:], strict=False):
            best = np.argsort(-row, kind="stable")[: request.sampling.prompt_logprobs]
            top = tuple((int(i), float(row[i])) for i in best)
            found.append(TokenLogprobs(token, float(row[token]), float(row[token]), top))
        return Event(id=request.id, tokens=(), prompt_logprobs=tuple(found), finish_reason="length")


def logprobs(generator: generate.Generator, tokens: Sequence[int]) -> np.ndarray:
    """[T, V]: of what follows each token. Few lengths are compiled."""
    padded = np.zeros((1, max(32, 1 << (len(tokens) - 1).bit_length())), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logprobs(generator.cfg, generator.params, padded))[0, : len(tokens)]


@functools.partial(jax.jit, static_argnames="cfg")
def _logprobs(cfg: schema.Model, params: dict, tokens_BT: jax.Array) -> jax.Array:
    hidden_BTD = model.apply(cfg, params, tokens_BT, attention="reference").hidden_BTD
    logits_BTV = model.unembed(cfg, params, hidden_BTD)
    return jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)


def backend(generator: generate.Generator, *, num_open: int = 8) -> ServiceBackend:
    service = Service(Engine(generator), tokenizer=generator.tokenizer, defaults=generator.defaults)
    limit = model.max_length(generator.cfg)
    return ServiceBackend(service, max_length=limit, num_open=num_open)


class Fake:
    """A backend without a model: what it says is made of the question alone."""

    def __init__(self, tokenizer: Tokenizer, *, max_length: int = 256) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.prefix_id = tokenizer.eos_ids[0]
        self.num_asked = 0

    def loglikelihood(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Score]]:
        for index, pair in enumerate(pairs):
            self.num_asked += 1
            yield index, Score(-float(zlib.crc32(repr(pair).encode()) % 997), False)

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, str]]:
        for index, prompt in enumerate(prompts):
            assert len(prompt.tokens) + prompt.sampling.max_tokens <= self.max_length
            self.num_asked += 1
            yield index, f"#### {zlib.crc32(repr(prompt).encode()) % 10}"
