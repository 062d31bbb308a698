"""An engine without a model: its tokens are made of the request alone, a few at each step."""

import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from configs.sampling import SamplingParams
from infer.engine.request import Event, Request, TokenLogprobs
from infer.text import service as service_lib
from qwen_jax.text import tokenizer_training
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

SETTINGS = SamplingParams(max_tokens=40, temperature=0.0)


@functools.cache
def words() -> Tokenizer:
    """Bytes, a few merges, and Qwen's control tokens."""
    return tokenizer_training.train_bpe(["a few words, to have a corpus of words"], vocab_size=283)


def service(
    *, text: str | None = None, kind: "type[FakeEngine] | None" = None, **options
) -> service_lib.Service:
    """A service whose engine answers everything with `text` and the end token, or at random."""
    vocabulary, answer = words(), None
    if text is not None:
        answer = lambda request: [*vocabulary.encode(text), vocabulary.eos_ids[0]]  # noqa: E731
    of_service = {k: options.pop(k) for k in ("bos_id", "compile_constraint") if k in options}
    engine = (kind or FakeEngine)(
        answer=answer, vocab_size=vocabulary.vocab_size, eos_ids=vocabulary.eos_ids, **options
    )
    return service_lib.Service(engine, tokenizer=vocabulary, defaults=SETTINGS, **of_service)


def drawn(request: Request, *, vocab_size: int) -> list[int]:
    """As many tokens as asked for, made of prompt, seed and temperature."""
    sampling = request.sampling
    base = f"{request.tokens}:{sampling.seed if sampling.temperature else 0}:{sampling.temperature}"
    return [zlib.crc32(f"{base}:{i}".encode()) % vocab_size for i in range(sampling.max_tokens)]


def logprob(context: Sequence[int], token: int) -> float:
    """Of any token after any others."""
    return -(zlib.crc32(f"{tuple(context)}:{token}".encode()) % 1000 + 1) / 100


class FakeEngine:
    """`answer` gives a request's tokens; at `eos_ids` it ends, or after max_tokens.

    `cuts` are the numbers of tokens that successive steps bring, over and over.
    """

    def __init__(
        self,
        *,
        answer: Callable[[Request], Sequence[int]] | None = None,
        vocab_size: int = 256,
        eos_ids: Sequence[int] = (),
        num_slots: int = 4,
        cuts: Sequence[int] = (3, 1, 8),
        max_length: int = 1024,
    ) -> None:
        self.answer = answer or (lambda request: drawn(request, vocab_size=vocab_size))
        self.vocab_size, self.eos_ids = vocab_size, tuple(eos_ids)
        self.num_slots, self.cuts, self.max_length = num_slots, tuple(cuts), max_length
        self.waiting: list[Request] = []
        self.running: dict[str, tuple[Request, list[int], int]] = {}
        self.cancelled: list[str] = []
        self.num_steps = self.most_held = self.num_submitted = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.cancelled)

    def submit(self, request: Request) -> None:
        if len(request.tokens) + request.sampling.max_tokens > self.max_length:
            raise ValueError(
                f"prompt of {len(request.tokens)} tokens with "
                f"max_tokens={request.sampling.max_tokens} exceeds max_length={self.max_length}"
            )
        if not all(0 <= token < self.vocab_size for token in request.tokens):
            raise ValueError(f"a prompt token is outside the vocabulary of {self.vocab_size} rows")
        assert request.id not in self.running and all(r.id != request.id for r in self.waiting)
        self.waiting.append(request)
        self.num_submitted += 1
        self.most_held = max(self.most_held, len(self.waiting) + len(self.running))

    def cancel(self, id: str) -> None:
        if id in self.running or any(request.id == id for request in self.waiting):
            self.running.pop(id, None)
            self.waiting = [request for request in self.waiting if request.id != id]
            self.cancelled.append(id)

    def step(self) -> list[Event]:
        events = [Event(id=id, tokens=(), finish_reason="cancelled") for id in self.cancelled]
        self.cancelled = []
        while self.waiting and len(self.running) < self.num_slots:
            request = self.waiting.pop(0)
            self.running[request.id] = (request, list(self.answer(request)), 0)
        for id, (request, tokens, done) in list(self.running.items()):
            cut = self.cuts[self.num_steps % len(self.cuts)]
            event = self._event(request, tokens, done, cut)
            events.append(event)
            self.running[id] = (request, tokens, done + len(event.tokens))
            if event.finish_reason is not None:
                del self.running[id]
        self.num_steps += 1
        return events

    def _event(self, request: Request, tokens: list[int], done: int, cut: int) -> Event:
        sampling = request.sampling
        new: list[int] = []
        reason = None if sampling.max_tokens else "length"
        for token in tokens[done : done + cut]:
            new.append(token)
            if request.constraint is not None:
                request.constraint.mask()
                request.constraint.accept(token)
            closes = () if sampling.ignore_eos else self.eos_ids
            if token in (*closes, *sampling.stop_token_ids):
                reason = "stop"
            elif done + len(new) == sampling.max_tokens:
                reason = "length"
            if reason is not None:
                break
        logprobs = prompt_logprobs = None
        context = (*request.tokens, *tokens[:done])
        if sampling.logprobs is not None:
            logprobs = tuple(
                self._logprobs((*context, *new[:i]), token, sampling.logprobs)
                for i, token in enumerate(new)
            )
        if done == 0 and sampling.prompt_logprobs is not None:
            prompt_logprobs = tuple(
                self._logprobs(request.tokens[:i], request.tokens[i], sampling.prompt_logprobs)
                for i in range(1, len(request.tokens))
            )
        return Event(
            id=request.id,
            tokens=tuple(new),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            num_cached=4 if done == 0 and len(request.tokens) > 4 else 0,
        )

    def _logprobs(self, context: Sequence[int], token: int, count: int) -> TokenLogprobs:
        scores = [(other, logprob(context, other)) for other in range(min(self.vocab_size, 40))]
        best = sorted(scores, key=lambda pair: -pair[1])[:count]
        raw = logprob(context, token)
        return TokenLogprobs(token=token, drawn=raw / 2, raw=raw, top=tuple(best))

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        rows = []
        for tokens in prompts:
            if len(tokens) > self.max_length:
                raise ValueError(f"prompt of {len(tokens)} tokens exceeds {self.max_length}")
            rng = np.random.default_rng(zlib.crc32(str(tuple(tokens)).encode()))
            row_D = rng.normal(size=8).astype(np.float32)
            rows.append(row_D / np.linalg.norm(row_D))
        return np.stack(rows)
