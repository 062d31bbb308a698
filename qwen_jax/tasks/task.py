"""What a benchmark is: items to ask, and a judge of the answers."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen_jax.tasks.backend import Score

Style = Literal["plain", "chat"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. With `choices` their probabilities are compared, else an answer is written.

    plain: the shots, each question with its answer, then the question. chat: the same as turns of
    a conversation. `lead` is how the answer begins; it is given, and not part of the answer.
    """

    id: str
    question: str
    record: Mapping[str, Any]  # what the judge needs
    shots: tuple[tuple[str, str], ...] = ()  # questions and answers
    header: str = ""  # before everything; the system message of a conversation
    lead: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said: texts, or a score for each choice."""

    texts: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A metric's name -> its values: one, or several that are not independent of each other.

    `reasons` go into the item's record, for people: what was read out of an answer, what failed.
    """

    metrics: dict[str, tuple[float, ...]]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark, read and ready. The functions that read it say how answers are judged."""

    name: str
    items: tuple[Item, ...]
    judge: Callable[[Item, Answer], Verdict]
    style: Style
    gap: str = ""  # plain: between a shot's question and its answer
    stop: tuple[str, ...] = ()
    max_tokens: int = 0
    num_answers: int = 1
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # kept with the results

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError(f"{self.name}: no items; check the path and the limit")
        ids = [item.id for item in self.items]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{self.name}: two items share an id; ids must tell items apart")

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that is asked: other answers must not be mixed in."""
        asked = [
            self.name, self.style, self.gap, self.stop, self.max_tokens, self.num_answers,
            [dataclasses.asdict(item) for item in self.items],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
