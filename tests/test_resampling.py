"""Intervals: they hold what they should as often as they say, also far out in the tails, and can be corrected."""

from __future__ import annotations

import numpy as np
import pytest

from arsd.errors import InputError
from arsd.metrics.resampling import Interval, bootstrap_mean, corrected


def test_corrected_intervals_hold_together():
    assert corrected(0.95, 1) == pytest.approx(0.95) and corrected(0.95, 10) == pytest.approx(0.995)


@pytest.mark.parametrize("confidence,law", [(0.95, "normal"), (0.95, "skewed"), (0.99375, "skewed")])
def test_coverage(confidence, law):
    """500 sets of 200: standard error of the coverage 0.01 at 95 %, 0.0035 at 99.4 %."""
    rng, inside = np.random.default_rng(1), 0
    for k in range(500):
        x = rng.normal(size=200) if law == "normal" else rng.gamma(0.7, size=200) - 0.7
        interval = bootstrap_mean(x, confidence, draws=2000, seed=k)
        inside += interval.has_zero
    slack = 3 * (confidence * (1 - confidence) / 500) ** 0.5
    assert abs(inside / 500 - confidence) < slack + 0.012  # the second term: skewness at N = 200


def test_beyond_the_reach_of_the_resamples_the_normal_law_counts():
    values = np.random.default_rng(0).normal(size=200)
    wide = bootstrap_mean(values, 1 - 1e-6, draws=2000)
    assert wide.low < values.mean() - 4.8 * values.std(ddof=1) / 200**0.5


def test_what_does_not_vary_has_no_width():
    assert bootstrap_mean(np.zeros(20)) == Interval(0.0, 0.0, 0.0)
    assert bootstrap_mean(np.full(20, 0.3)).low == pytest.approx(0.3)


@pytest.mark.parametrize("values", [np.zeros(7), np.array([1.0] * 9 + [np.nan]), np.zeros((3, 9))])
def test_too_few_or_broken_values_are_refused(values):
    with pytest.raises(InputError):
        bootstrap_mean(values)
