"""Options of strategies, drafters and rules, checked where a user gives them."""

from __future__ import annotations

import math
from typing import Any

from arsd.errors import StrategyError


def whole(name: str, value: Any, least: int, otherwise: str = "") -> int:
    """A whole option of at least ``least``; ``otherwise`` names what else it might be, for the message.

    Raises:
        StrategyError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StrategyError(f"{name} must be a whole number >= {least}{otherwise}, not {value!r}")
    return value


def number(name: str, value: Any, least: float, open_end: bool = False, otherwise: str = "") -> float:
    """A finite option of at least ``least``, or above it when ``open_end``; ``otherwise`` as for :func:`whole`.

    Raises:
        StrategyError: for anything else.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least or (open_end and value == least):
        wanted = "a number" if least == -math.inf else f"a number {'>' if open_end else '>='} {least:g}"
        raise StrategyError(f"{name} must be {wanted}{otherwise}, not {value!r}")
    return float(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of the given words.

    Raises:
        StrategyError: for any other.
    """
    if value not in choices:
        raise StrategyError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    return str(value)
