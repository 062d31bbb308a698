"""Numbers from answers: pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH_95 = 1.959963984540054  # standard errors on either side of a mean: 95% of a normal law


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, None where one sample says nothing about it."""

    value: float
    stderr: float | None
    count: int  # samples

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval, by the normal law."""
        if self.stderr is None:
            return None
        return self.value - _WIDTH_95 * self.stderr, self.value + _WIDTH_95 * self.stderr


def estimate(samples: Sequence[Sequence[float]]) -> Estimate:
    """The mean over all values of all samples; values of one sample are not independent.

    stderr = sqrt(C / (C - 1) sum_c (sum_{i in c} x_i - mean)^2) / N for C samples and N values: the
    cluster-robust one (arXiv 2411.00640, section 2.2), with the usual sd / sqrt(N) for one value a
    sample. Raises `ValueError` where there is no value.
    """
    values = [value for sample in samples for value in sample]
    if not values:
        raise ValueError("no samples, so there is no mean; check the task's data and limit")
    mean = math.fsum(values) / len(values)
    if len(samples) < 2:
        return Estimate(mean, None, len(samples))
    spread = math.fsum(math.fsum(value - mean for value in sample) ** 2 for sample in samples)
    correction = len(samples) / (len(samples) - 1)
    return Estimate(mean, math.sqrt(correction * spread) / len(values), len(samples))


def accuracy(logprobs: Sequence[float], *, gold: int) -> float:
    """1 where the gold choice is the likeliest; of equal ones the first is taken."""
    return float(_argmax(logprobs) == gold)


def pass_at_k(num_answers: int, num_correct: int, *, k: int) -> float:
    """The chance that k answers drawn from these hold a correct one.

    1 - C(n - c, k) / C(n, k), as a product that does not overflow: the unbiased estimator of
    arXiv 2107.03374, equation 1. Raises `ValueError` where k answers are not there.
    """
    if not 1 <= k <= num_answers:
        raise ValueError(f"pass@{k} needs at least {k} answers to a problem, not {num_answers}")
    if not 0 <= num_correct <= num_answers:
        raise ValueError(f"num_correct={num_correct} must be in [0, num_answers={num_answers}]")
    if num_answers - num_correct < k:
        return 1.0
    wrong = range(num_answers - num_correct + 1, num_answers + 1)
    return 1.0 - math.prod(1.0 - k / i for i in wrong)


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))
