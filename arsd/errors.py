"""One exception type per kind of user mistake; every message says what was wrong and what to do."""

from __future__ import annotations

import sys
import warnings
from typing import Any


class ArsdError(ValueError):
    """Base of every error that a caller can cause; the command line prints it as one line and exits with 2."""


class InputError(ArsdError):
    """A prompt, shape or option that the call cannot work with."""


class StrategyError(ArsdError):
    """An unknown decoding strategy, or an option that the strategy does not have or cannot take."""


class CheckpointError(ArsdError):
    """A weight file that is missing, truncated, of another layout, or whose shapes do not fit."""


class NonFiniteLogitsError(ArsdError):
    """The model returned NaN or +inf logits, so no token can be drawn from them.

    Attributes:
        tokens: [B, N] tokens committed before, zeros behind them.
        lengths: how many tokens of each row were committed.
    """

    def __init__(self, message: str, tokens: Any = None, lengths: list[int] | None = None) -> None:
        super().__init__(message)
        self.tokens, self.lengths = tokens, lengths or []


class DataError(ArsdError):
    """Training or evaluation data that is missing or not what it should be."""


def warn_caller(message: str) -> None:
    """Warn at the line of the user's code that led here, however many frames of this package and of torch lie between."""
    frame, level = sys._getframe(1), 3
    while frame.f_back is not None and frame.f_back.f_globals.get("__name__", "").partition(".")[0] in ("arsd", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
