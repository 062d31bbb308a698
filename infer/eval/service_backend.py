"""The batch engine as an evaluation backend: generation by its service, scores by the engine."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from configs import sampling as sampling_config
from configs.sampling import SamplingParams
from infer.engine.request import Request, TokenLogprobs
from infer.text.service import Service, TextRequest
from qwen_jax.tasks.backend import GenerationRequest, Score, ScoringRequest, prefix_id
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

_Numbered = tuple[int, ScoringRequest]  # a request with its index


class ServiceBackend:
    """A backend over a service that serves nothing else; one call at a time.

    `max_length` is the largest number of tokens that the engine holds for a request. `num_open` is
    the number of requests that the engine has at a time: twice its slots keep it full.
    """

    def __init__(self, service: Service, *, max_length: int, num_open: int) -> None:
        self._service = service
        self._max_length, self._num_open = max_length, num_open

    @property
    def tokenizer(self) -> Tokenizer:
        return self._service.tokenizer

    @property
    def prefix_id(self) -> int:
        return prefix_id(self.tokenizer)

    @property
    def max_length(self) -> int:
        return self._max_length

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[tuple[int, str]]:
        """Pairs (index, text) of the requests, each when it is complete.

        Raises `ValueError` for a request that the engine cannot serve.
        """
        waiting, texts = enumerate(requests), {}
        while True:
            for index, request in itertools.islice(waiting, self._num_open - len(texts)):
                texts[str(index)] = ""
                self._service.submit(
                    TextRequest(
                        id=str(index),
                        prompt=request.tokens,
                        sampling=request.sampling,
                        stop=request.stop,
                    )
                )
            if not texts and self._service.idle:  # an answer cut at its stop string leaves later
                return
            for update in self._service.step():
                texts[update.id] += update.text
                if update.usage is not None:
                    yield int(update.id), texts.pop(update.id)

    def loglikelihood(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[int, Score]]:
        """Pairs (index, score) of the requests, each when it is ready.

        Neighbours that differ only in their last token share one prefill, which reports the
        likeliest tokens of every position; a last token that is not among them is scored by a
        request of its own. Raises `ValueError` for a request that the engine cannot serve.
        """
        groups = _groups(requests)
        again: list[_Numbered] = []  # their last token was not among the likeliest
        running: dict[str, list[_Numbered]] = {}
        while True:
            fresh = itertools.chain(([single] for single in _drain(again)), groups)
            for group in itertools.islice(fresh, self._num_open - len(running)):
                self._submit(group)
                running[str(group[0][0])] = group
            if not running:
                return
            for event in self._service.engine.step():
                if event.finish_reason is None:
                    raise AssertionError(f"a scoring request drew tokens: {event}")
                for index, request in (group := running.pop(event.id)):
                    score = _score(event.prompt_logprobs, request)
                    if score is None:
                        again.append((index, request))
                    else:
                        yield index, score

    def _submit(self, group: Sequence[_Numbered]) -> None:
        index, request = group[0]
        top = 1 if len(group) == 1 else sampling_config.MOST_LOGPROBS
        sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=top)
        tokens = (*request.context, *request.continuation)
        self._service.engine.submit(Request(id=str(index), tokens=tokens, sampling=sampling))


def _groups(requests: Iterable[ScoringRequest]) -> Iterator[list[_Numbered]]:
    """Runs of neighbouring requests that differ only in the last token of their continuation."""
    key = lambda numbered: (numbered[1].context, numbered[1].continuation[:-1])  # noqa: E731
    for _, group in itertools.groupby(enumerate(requests), key=key):
        yield list(group)


def _drain(items: list) -> Iterator:
    """The items of a list, which is empty afterwards; items appended meanwhile come too."""
    while items:
        yield items.pop()


def _score(logprobs: Sequence[TokenLogprobs], request: ScoringRequest) -> Score | None:
    """The request's score, None where its last token is not among the reported ones.

    `logprobs` belong to a sequence that may differ from the request's in the last token.
    """
    *inner, last = logprobs[-len(request.continuation) :]
    known = {**dict(last.top), last.token: last.raw}
    token = request.continuation[-1]
    if token not in known:
        return None
    likeliest = [entry.top[0][0] for entry in (*inner, last)]
    total = sum(entry.raw for entry in inner) + known[token]
    return Score(total, likeliest == list(request.continuation))
