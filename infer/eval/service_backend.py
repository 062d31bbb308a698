"""The batch engine as a backend: text by its service, scores by the engine itself."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from configs import sampling as sampling_config
from configs.sampling import SamplingParams
from infer.engine.request import Request, TokenLogprobs
from infer.text.service import Service, TextRequest
from qwen_jax.tasks.backend import Pair, Prompt, Score, prefix_id
from qwen_jax.text.tokenizer.tokenizer import Tokenizer


class ServiceBackend:
    """One call at a time, over a service with nothing else open.

    `max_length` is the most tokens that the engine holds for a request, `num_open` how many are
    handed to it before the first is answered: twice its slots keeps it full.
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

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, str]]:
        """Texts as they end. Raises `ValueError` for a prompt that the engine cannot serve."""
        waiting, texts = enumerate(prompts), {}
        while True:
            for index, prompt in itertools.islice(waiting, self._num_open - len(texts)):
                texts[str(index)] = ""
                self._service.submit(
                    TextRequest(
                        id=str(index),
                        prompt=prompt.tokens,
                        sampling=prompt.sampling,
                        stop=prompt.stop,
                    )
                )
            if not texts and self._service.idle:  # an answer cut at its stop string leaves later
                return
            for update in self._service.step():
                texts[update.id] += update.text
                if update.usage is not None:
                    yield int(update.id), texts.pop(update.id)

    def loglikelihood(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Score]]:
        """Scores as they are ready.

        Neighbours that differ in their last token alone are read once, with the likeliest tokens
        of every place; one that is not among them is asked for by itself. Raises `ValueError` for
        a pair that the engine cannot serve.
        """
        groups = _groups(pairs)
        again: list[tuple[int, Pair]] = []  # their last token was not among the likeliest
        running: dict[str, list[tuple[int, Pair]]] = {}
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
                for index, pair in (group := running.pop(event.id)):
                    score = _score(event.prompt_logprobs, pair)
                    if score is None:
                        again.append((index, pair))
                    else:
                        yield index, score

    def _submit(self, group: Sequence[tuple[int, Pair]]) -> None:
        index, pair = group[0]
        top = 1 if len(group) == 1 else sampling_config.MOST_LOGPROBS
        sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=top)
        tokens = (*pair.context, *pair.continuation)
        self._service.engine.submit(Request(id=str(index), tokens=tokens, sampling=sampling))


def _groups(pairs: Iterable[Pair]) -> Iterator[list[tuple[int, Pair]]]:
    """Neighbours with the same context and the same continuation but its last token."""
    key = lambda numbered: (numbered[1].context, numbered[1].continuation[:-1])  # noqa: E731
    for _, group in itertools.groupby(enumerate(pairs), key=key):
        yield list(group)


def _drain(items: list) -> Iterator:
    while items:
        yield items.pop()


def _score(logprobs: Sequence[TokenLogprobs], pair: Pair) -> Score | None:
    """From the logprobs of a sequence that may differ from the pair's in its last token."""
    *inner, last = logprobs[-len(pair.continuation) :]
    known = {**dict(last.top), last.token: last.raw}
    token = pair.continuation[-1]
    if token not in known:
        return None
    likeliest = [entry.top[0][0] for entry in (*inner, last)]
    total = sum(entry.raw for entry in inner) + known[token]
    return Score(total, likeliest == list(pair.continuation))
