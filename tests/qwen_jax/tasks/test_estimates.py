"""Estimates against formulas written out, and against published worked examples."""

import math
import statistics

import pytest

from qwen_jax.tasks import estimates


def test_a_standard_error_is_that_of_a_mean():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    got = estimates.estimate([[v] for v in values])
    assert got.value == 0.6
    assert got.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    low, high = got.interval
    assert (low, high) == pytest.approx((0.6 - 1.96 * got.stderr, 0.6 + 1.96 * got.stderr), 1e-4)


def test_values_of_one_sample_are_not_independent():
    # Each sample's values are copies: they say no more than one of them.
    once = estimates.estimate([[v] for v in (1.0, 0.0, 1.0)])
    copied = estimates.estimate([[v] * 4 for v in (1.0, 0.0, 1.0)])
    assert copied.stderr == pytest.approx(once.stderr)
    assert estimates.estimate([[1.0, 0.0, 0.0]]) == estimates.Estimate(1 / 3, None, 1)
    assert estimates.estimate([[1.0]]).interval is None
    with pytest.raises(ValueError, match="no samples"):
        estimates.estimate([[], []])


@pytest.mark.parametrize("n", [1, 5, 20])
def test_pass_at_k_is_the_chance_of_a_draw(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            want = 1 - math.comb(n - c, k) / math.comb(n, k)
            assert estimates.pass_at_k(n, c, k=k) == pytest.approx(want, abs=1e-12)


def test_pass_at_k_of_a_few_known_cases():
    assert estimates.pass_at_k(1, 1, k=1) == 1.0
    assert estimates.pass_at_k(2, 1, k=1) == 0.5
    assert estimates.pass_at_k(200, 3, k=100) == pytest.approx(0.87690, abs=5e-4)
    assert 0 < estimates.pass_at_k(10_000, 1, k=1) < 1.1e-4  # no overflow
    with pytest.raises(ValueError, match="pass@3 needs at least 3 answers"):
        estimates.pass_at_k(2, 1, k=3)
    with pytest.raises(ValueError, match="num_correct=3"):
        estimates.pass_at_k(2, 3, k=1)


def test_accuracy_takes_the_likeliest():
    assert estimates.accuracy([-3.0, -1.0, -2.0], gold=1) == 1.0
    assert estimates.accuracy([-1.0, -1.0], gold=1) == 0.0, "of equal ones the first"
