"""Tasks whose answers are programs: an answer is right if the benchmark's tests pass with it."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_jax.tasks import estimates
from qwen_jax.tasks.sandbox import sandbox
from qwen_jax.tasks.task import Answer, Item, Task, Verdict

FENCE = "```"  # of a code block in a conversation
_KS = (1, 10, 100)  # pass@k is reported for those up to the number of answers; arXiv 2107.03374


@dataclass(frozen=True, kw_only=True)
class ProgramTask(Task):
    """A task that runs each answer with the item's tests, in the sandbox, within `limits`."""

    limits: sandbox.Limits
    ks: tuple[int, ...]  # the values of k for which pass@k is estimated

    def __post_init__(self) -> None:
        super().__post_init__()
        for k in self.ks:
            estimates.pass_at_k(self.num_answers, 0, k=k)  # raises where k > num_answers

    @abc.abstractmethod
    def program(self, record: Mapping[str, Any], answer: str) -> str:
        """The Python source that ends without an exception if the answer is right."""

    def grade(self, item: Item, answer: Answer) -> Verdict:
        """pass@k for each k, estimated from the answers, with the outcome of each as a reason."""
        outcomes = self._run(item, answer)
        passed = sum(outcome.status == "passed" for outcome in outcomes)
        metrics = {f"pass@{k}": (estimates.pass_at_k(len(outcomes), passed, k=k),) for k in self.ks}
        return Verdict(metrics, tuple(f"{o.status} {o.detail}".strip() for o in outcomes))

    def reward(self, item: Item, answer: Answer) -> float:
        """The share of the answers that pass, which needs no k."""
        outcomes = self._run(item, answer)
        return sum(outcome.status == "passed" for outcome in outcomes) / len(outcomes)

    def _run(self, item: Item, answer: Answer) -> list[sandbox.Outcome]:
        return [
            sandbox.run(self.program(item.record, text), limits=self.limits)
            for text in answer.texts
        ]


def default_ks(num_answers: int, ks: Sequence[int] | None) -> tuple[int, ...]:
    """`ks`, or where it is None those of 1, 10 and 100 that `num_answers` answers allow."""
    return tuple(k for k in _KS if k <= num_answers) if ks is None else tuple(ks)
