"""Where guesses of the next tokens come from, which the model then checks in one pass. No jax.

Guesses are rows of tokens, -1 where there is none. They never change an answer: see
`paged_decode.verify`. An engine asks for them where few enough requests decode at one time, and
none of them is bound by a grammar.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from configs.engine import EngineConfig
from infer.engine import scheduler
from infer.engine.live import Live
from infer.speculation.prompt_lookup import PromptLookup


class Guesser(Protocol):
    """A way to guess."""

    def must_see(self, rows: Sequence[Live]) -> bool:
        """Whether it needs the tokens of all dispatches to guess for these."""
        ...

    def guess(self, rows: Sequence[Live], *, num_rows: int, sampler: str) -> Any:
        """Tokens [num_rows, guesses], here or on the device; None where no row has any."""
        ...

    def passed(self, rows: Sequence[Live]) -> None:
        """These draw tokens now that nobody guessed."""
        ...


class Lookups:
    """Guesses copied from what the request has read or written already (`prompt_lookup.py`)."""

    def __init__(self, settings: EngineConfig) -> None:
        self._count = settings.guesses

    def must_see(self, rows: Sequence[Live]) -> bool:
        return True

    def guess(self, rows: Sequence[Live], *, num_rows: int, sampler: str) -> np.ndarray | None:
        guesses_RT = np.full((num_rows, self._count), -1, np.int32)
        for row, live in enumerate(rows):
            if live.lookup is None:
                live.lookup = PromptLookup(live.request.tokens)
            known = len(live.lookup) - len(live.request.tokens)
            live.lookup.extend(live.answer[known:])
            some = live.lookup.propose(self._count)
            guesses_RT[row, : len(some)] = some
        return guesses_RT if np.any(guesses_RT >= 0) else None

    def passed(self, rows: Sequence[Live]) -> None:
        """They are in the answer when it is read."""


class DraftSide(Protocol):
    """What is used of `infer.engine.device.Device`."""

    def read_draft(self, work: scheduler.Prefill) -> None: ...
    def propose(self, slots: Sequence[int], *, rows: int, sampler: str) -> Any: ...


class Drafts:
    """Guesses of a draft model, which reads prompts and guesses with the model, on its device.

    Between rounds nothing comes to the host. Tokens that were drawn without the draft, because too
    many requests ran or a grammar did, it reads when it is asked again.
    """

    def __init__(self, settings: EngineConfig, device: DraftSide) -> None:
        self._settings, self._device = settings, device
        self._shapes = scheduler.shapes(settings).prefill

    def must_see(self, rows: Sequence[Live]) -> bool:
        return any(live.drafted is not None for live in rows)

    def guess(self, rows: Sequence[Live], *, num_rows: int, sampler: str) -> Any:
        for work in self._missed(rows):
            self._device.read_draft(work)
        return self._device.propose([live.slot for live in rows], rows=num_rows, sampler=sampler)

    def passed(self, rows: Sequence[Live]) -> None:
        for live in rows:
            if live.drafted is None:
                # It may have read what dispatches under way have drawn: reading again is right.
                live.drafted = len(live.request.tokens) + max(0, len(live.answer) - 1)

    def _missed(self, rows: Sequence[Live]) -> Iterator[scheduler.Prefill]:
        """Chunks of all that the draft has not read but for the last token, which it reads next."""
        behind = {live: live.tokens[:-1] for live in rows if live.drafted is not None}
        while behind:
            longest = max(len(tokens) - live.drafted for live, tokens in behind.items())
            length, num_rows = self._shape(min(longest, self._settings.prefill_chunk), len(behind))
            chunks = []
            for live, tokens in list(behind.items())[:num_rows]:
                piece = tokens[live.drafted : live.drafted + length]
                chunks.append(
                    scheduler.Chunk(
                        slot=live.slot,
                        request=live.request,
                        pages=live.pages,
                        start=live.drafted,
                        tokens=piece,
                        is_last=False,
                        num_cached=0,
                    )
                )
                live.drafted += len(piece)
                if live.drafted == len(tokens):
                    live.drafted = None
                    del behind[live]
            yield scheduler.Prefill(chunks=tuple(chunks), num_rows=num_rows, length=length)

    def _shape(self, length: int, num_rows: int) -> tuple[int, int]:
        """The shortest prefill of this length, with rows for so many or as many as there are."""
        least = min(size for _, size in self._shapes if size >= length)
        rows = [rows for rows, size in self._shapes if size == least]
        return least, min((n for n in rows if n >= num_rows), default=max(rows))
