"""Estimates of a metric from graded answers: means, standard errors, pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_HALF_WIDTH_95 = 1.959963984540054  # of a normal mean's 95% interval, in standard errors


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, which is None where there is only one sample."""

    value: float
    stderr: float | None
    count: int  # samples

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval (low, high) of a normally distributed mean."""
        if self.stderr is None:
            return None
        return (
            self.value - _HALF_WIDTH_95 * self.stderr,
            self.value + _HALF_WIDTH_95 * self.stderr,
        )


def estimate(samples: Sequence[Sequence[float]]) -> Estimate:
    """The mean over all values of all samples, with a cluster-robust standard error.

    Values of one sample (a cluster) need not be independent of each other. For C samples and N
    values stderr = sqrt(C / (C - 1) sum_c (sum_{i in c} x_i - mean)^2) / N (arXiv 2411.00640,
    section 2.2), which is sd / sqrt(N) where every sample has one value. Raises `ValueError`
    without any value.
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
    """1.0 where the gold choice is the likeliest, else 0.0. The first of equal choices counts."""
    return float(_argmax(logprobs) == gold)


def pass_at_k(num_answers: int, num_correct: int, *, k: int) -> float:
    """The probability that k answers, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k) for n answers of which c are correct, the unbiased estimator of arXiv
    2107.03374, equation 1, as a product that does not overflow. Raises `ValueError` for k > n.
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
    """The index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=lambda i: (values[i], -i))
