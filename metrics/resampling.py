"""Intervals of means by resampling pictures, corrected for how many are looked at."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from arsd.errors import InputError

FEWEST = 8  # pictures that an interval needs


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds its expectation with the asked probability."""

    mean: float
    low: float
    high: float

    @property
    def has_zero(self) -> bool:
        """Whether zero is a possible expectation."""
        return self.low <= 0 <= self.high


def corrected(confidence: float, looks: int) -> float:
    """The confidence of each of ``looks`` intervals that all hold together with probability ``confidence`` (Bonferroni)."""
    return 1 - (1 - confidence) / max(1, looks)


def bootstrap_mean(values: np.ndarray, confidence: float = 0.95, draws: int = 20_000, seed: int = 0) -> Interval:
    """Studentised bootstrap (bootstrap-t; Efron and Tibshirani 1993, chapter 12) of the mean over independent pictures.

    Args:
        values: [N], one number of each picture, or of each pair.
        confidence: of this one interval.
        draws: resamples; quantiles beyond their reach are the normal law's, so that a confidence near 1 is not cut off.
        seed: of the resamples.

    Raises:
        InputError: for fewer than 8 values, or values that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < FEWEST:
        raise InputError(f"an interval needs at least {FEWEST} pictures, not {values.shape}")
    if not np.isfinite(values).all():
        raise InputError("an interval needs finite numbers")
    count, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / count**0.5
    if error <= 1e-12 * max(1.0, abs(mean)):  # nothing varies
        return Interval(mean, mean, mean)
    rng, ratios = np.random.default_rng(seed), []
    for size in [2000] * (draws // 2000) + ([draws % 2000] if draws % 2000 else []):
        drawn = values[rng.integers(count, size=(size, count))]
        spread = drawn.std(axis=1, ddof=1) / count**0.5
        ratios.append((drawn.mean(axis=1) - mean) / np.where(spread > 0, spread, np.inf))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    if tail * draws < 10:
        z = statistics.NormalDist().inv_cdf(1 - tail)
        low, high = min(low, -z), max(high, z)
    return Interval(mean, float(mean - high * error), float(mean - low * error))
