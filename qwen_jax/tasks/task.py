"""The `Task` base class: a benchmark's items, its prompts as text, its grades and its rewards."""

import abc
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qwen_jax.tasks.backend import Score

Style = Literal["plain", "chat"]

_BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark.

    With `choices`, the model scores each choice; without, it writes an answer. `answer_prefix` is
    the given beginning of the answer: part of the prompt, not of the answer that is graded.
    """

    id: str
    question: str
    record: Mapping[str, Any]  # the published fields that grading needs
    texts: tuple[str, ...]  # question and reference as published, without the prompt's template
    shots: tuple[tuple[str, str], ...] = ()  # worked examples: (question, answer)
    header: str = ""  # precedes the shots; the system message of a conversation
    answer_prefix: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""  # metrics are also estimated for each group, such as a subject of MMLU


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads for one item: a text to continue, or messages of a conversation.

    `continuations` are the choices as they follow the prompt; empty where an answer is written.
    """

    text: str = ""  # style "plain"
    messages: tuple[Mapping[str, str], ...] = ()  # style "chat", in the chat template's form
    answer_prefix: str = ""  # style "chat": the given beginning of the assistant's next message
    continuations: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to one item: the texts it wrote, or one score for each choice."""

    texts: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The grade of one answer: the values of each metric, in [0, 1].

    A metric has several values where one item holds several, which are not independent of each
    other. `reasons` tell a reader what was extracted from the answer and what failed.
    """

    metrics: dict[str, tuple[float, ...]]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A benchmark, read from its files. A subclass says how an answer is graded."""

    reward_metric: ClassVar[str]  # the metric that `reward` averages

    name: str
    items: tuple[Item, ...]
    style: Style
    separator: str = ""  # style "plain": between a question and its answer
    stop: tuple[str, ...] = ()
    max_tokens: int = 0  # of an answer; 0 where choices are scored
    num_answers: int = 1
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # kept with results

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError(f"{self.name}: no items; check the path and the limit")
        ids = [item.id for item in self.items]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{self.name}: two items share an id; ids must tell items apart")

    def prompts(self, items: Iterable[Item] | None = None) -> Iterator[Prompt]:
        """The prompt of each of `items`, by default of all, in their order.

        plain: header, shots, question and answer prefix as one text. chat: the header as the
        system message, each shot as a user and an assistant message, the question as the last.
        """
        for item in self.items if items is None else items:
            yield self._chat_prompt(item) if self.style == "chat" else self._plain_prompt(item)

    @abc.abstractmethod
    def grade(self, item: Item, answer: Answer) -> Verdict:
        """The values of the task's metrics for an answer to the item."""

    def reward(self, item: Item, answer: Answer) -> float:
        """The reward of an answer for reinforcement learning: the mean of `reward_metric`, [0, 1].

        1 is a right answer, 0 a wrong one, a number between them a share of what was asked.
        """
        values = self.grade(item, answer).metrics[self.reward_metric]
        return math.fsum(values) / len(values)

    def texts(self) -> Iterator[tuple[str, str]]:
        """(item id, text) of every question and reference that training data must not contain."""
        for item in self.items:
            for text in item.texts:
                yield item.id, text

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that determines the prompts and the length of the answers.

        Answers with another fingerprint must not be mixed with this task's.
        """
        asked = [
            self.name, self.style, self.separator, self.stop, self.max_tokens, self.num_answers,
            [_fingerprint_fields(item) for item in self.items],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _plain_prompt(self, item: Item) -> Prompt:
        shots = [
            f"{question}{self.separator}{answer}{_BETWEEN_SHOTS}" for question, answer in item.shots
        ]
        return Prompt(
            text="".join([item.header, *shots, item.question, item.answer_prefix]),
            continuations=tuple(f"{self.separator}{choice}" for choice in item.choices),
        )

    def _chat_prompt(self, item: Item) -> Prompt:
        messages = [{"role": "system", "content": item.header.strip()}] if item.header else []
        for question, answer in item.shots:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": item.question})
        return Prompt(
            messages=tuple(messages),
            answer_prefix=item.answer_prefix,
            continuations=item.choices,
        )


def _fingerprint_fields(item: Item) -> dict[str, Any]:
    """The item's fields under the names that published fingerprints were computed with."""
    return {
        "id": item.id, "question": item.question, "record": item.record, "shots": item.shots,
        "header": item.header, "lead": item.answer_prefix, "choices": item.choices,
        "group": item.group,
    }  # fmt: skip
