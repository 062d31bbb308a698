"""Stands in for the batch engine: whole forward passes, slow and plain."""

import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from infer.engine.request import Event, Request, TokenLogprobs
from infer.eval.service_backend import ServiceBackend
from infer.text.loading import Loaded
from infer.text.service import Service
from qwen_jax.model import transformer
from qwen_jax.tasks.backend import GenerationRequest, Score, ScoringRequest
from qwen_jax.text.tokenizer.tokenizer import Tokenizer
from tests.infer import whole_forward


class Engine:
    """All that is waiting is answered by one step."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._waiting: dict[str, Request] = {}
        self.num_scored = self.most_open = 0

    @property
    def idle(self) -> bool:
        return not self._waiting

    def submit(self, request: Request) -> None:
        transformer.check_length(
            self._loaded.cfg, len(request.tokens) + request.sampling.max_tokens
        )
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
        return [*reversed(events), *map(self._draw, drawing)]

    def _draw(self, request: Request) -> Event:
        settings = request.sampling
        tokens = whole_forward.answer(self._loaded, request.tokens, settings=settings)
        reason = "length" if len(tokens) == settings.max_tokens else "stop"
        return Event(id=request.id, tokens=tuple(tokens), finish_reason=reason)

    def _score(self, request: Request) -> Event:
        self.num_scored += 1
        rows = logprobs(self._loaded, request.tokens)
        found = []
        for row, token in zip(rows, request.tokens[1:], strict=False):
            best = np.argsort(-row, kind="stable")[: request.sampling.prompt_logprobs]
            top = tuple((int(i), float(row[i])) for i in best)
            found.append(TokenLogprobs(token, float(row[token]), float(row[token]), top))
        return Event(id=request.id, tokens=(), prompt_logprobs=tuple(found), finish_reason="length")


def logprobs(loaded: Loaded, tokens: Sequence[int]) -> np.ndarray:
    """[T, V]: of what follows each token."""
    rows = whole_forward.logits(loaded.cfg, loaded.params, tokens)
    return np.asarray(jax.nn.log_softmax(rows, axis=-1))


def backend(loaded: Loaded, *, num_open: int = 8) -> ServiceBackend:
    service = Service(Engine(loaded), tokenizer=loaded.tokenizer, defaults=loaded.defaults)
    limit = transformer.max_length(loaded.cfg)
    return ServiceBackend(service, max_length=limit, num_open=num_open)


class Fake:
    """A backend without a model: what it says is made of the question alone."""

    def __init__(self, tokenizer: Tokenizer, *, max_length: int = 256) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.prefix_id = tokenizer.eos_ids[0]
        self.num_asked = 0

    def loglikelihood(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[int, Score]]:
        for index, request in enumerate(requests):
            self.num_asked += 1
            yield index, Score(-float(zlib.crc32(repr(request).encode()) % 997), False)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[tuple[int, str]]:
        for index, request in enumerate(requests):
            assert len(request.tokens) + request.sampling.max_tokens <= self.max_length
            self.num_asked += 1
            yield index, f"#### {zlib.crc32(repr(request).encode()) % 10}"
