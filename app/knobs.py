"""Knobs to strategies and back, and what a strategy promises, in words."""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass
from typing import Any

from arsd.app.service import Limits
from arsd.decoding import DecodingStrategy, parse_strategy
from arsd.errors import InputError, StrategyError

LARGEST_SEED = 2**53 - 1  # a browser's numbers are exact up to here
LONGEST_STRATEGY, DIGITS = 200, 6
NEEDS_DRAFTER = ("eagle", "hybrid", "cool-sd", "cool-sd-published", "lantern", "lantern-plus-plus", "grouped")
OF_TEXT = ("std", "prompt-lookup", "token-recycling", "layer-skip", "ucb-spec", "exp3-spec")

# what the presets of the page are called, and the strategy that each stands for
PICTURES = {
    "SJD": "sjd",
    "SJD, window 16": "sjd:window=16",
    "SJD, window 16, maximal coupling": "sjd:window=16,coupling=maximal",
    "SJD as published": "sjd:window=16,coupling=independent",
    "EAGLE drafter": "eagle",
    "Drafter and SJD": "hybrid:window=16",
    "COOL-SD, at most 2 changed tokens": "cool-sd:budget=2.0",
    "COOL-SD, delta 2": "cool-sd:delta=2.0",
    "LANTERN++": "lantern-plus-plus",
    "Grouped": "grouped",
    "Plain AR": "ar",
}
TEXTS = {
    "Sparse-to-Dense": "std",
    "Token recycling": "token-recycling",
    "Prompt lookup": "prompt-lookup",
    "SJD, window 8": "sjd:window=8",
    "Chosen while decoding": "ucb-spec",
    "Plain AR": "ar",
}
KNOBS = {  # of a family of strategies: the knobs that it has
    "ar": (),
    "sjd": ("window", "coupling"),
    "eagle": ("draft_length",),
    "hybrid": ("window", "draft_length"),
    "cool-sd": ("draft_length", "delta", "nu", "budget"),
    "cool-sd-published": ("draft_length", "delta", "nu"),
    "lantern-plus-plus": ("draft_length",),
    "grouped": ("draft_length",),
}
COUPLINGS = ("gumbel", "maximal", "gumbel-rejection", "independent")


def has_drafter(pipe: Any) -> bool:
    """Whether an image pipeline has a draft model."""
    return getattr(pipe, "drafter", None) is not None


def presets(pipe: Any) -> dict[str, str]:
    """The presets that a model can run: a name and a strategy each."""
    return {
        label: decoder
        for label, decoder in PICTURES.items()
        if has_drafter(pipe) or decoder.partition(":")[0] not in NEEDS_DRAFTER
    }


def strategy(words: Any, limits: Limits | None = None) -> DecodingStrategy:
    """The strategy that a user named.

    Raises:
        StrategyError: when there is none, or it asks for more than the ``limits`` allow.
    """
    if not isinstance(words, str) or not words.strip():
        raise StrategyError("choose a strategy, such as sjd or sjd:window=16")
    if limits is not None:
        _bearable(words, limits)
    return parse_strategy(words)


def _bearable(words: str, limits: Limits) -> None:
    """Raise StrategyError for numbers that would take a machine for minutes; nested rules and arms are words here, too."""
    if len(words) > LONGEST_STRATEGY:
        raise StrategyError(f"a strategy has at most {LONGEST_STRATEGY} characters here")
    for name, value in re.findall(r"(window|pass_tokens|draft_length|length)\s*=\s*(\d+)", words):
        if int(value[:12]) > limits.pass_tokens:
            raise StrategyError(f"{name} may be at most {limits.pass_tokens} here, not {value[:12]}")
    for tree in re.findall(r"\d+(?:x\d+)+", words):
        level = columns = 1
        for children in tree.split("x"):
            level = min(level * int(children[:6]), 2**40)
            columns += level
        if columns > limits.pass_tokens:
            raise StrategyError(f"the tree {tree[:40]} has more than {limits.pass_tokens} columns")
    for number in re.findall(r"(?<![\d.])\d+", words):
        if len(number) > DIGITS:
            raise StrategyError(f"{number[:12]} is more than a strategy may ask for here")


def promise(decoder: DecodingStrategy) -> str:
    """What a strategy says of its output."""
    if decoder.seed_exact:
        return "lossless: plain AR's own tokens"
    if decoder.lossless:
        return "lossless: plain AR's law, other tokens"
    budget = dict(decoder.config).get("budget")
    if budget is not None:
        return f"relaxed: at most {budget:g} changed tokens expected"
    return "relaxed: changes the law, and says by how much"


def compose(family: str, **knobs: Any) -> str:
    """The strategy of these knobs, as text; what is at its default is left out.

    Args:
        family: a name in ``KNOBS``.
        knobs: values of all knobs, of which the family's count; ``None`` is the default. A ``budget`` of 0 is none, and with
            one the schedule (``delta``, ``nu``) is not used.

    Raises:
        StrategyError: for values that do not fit.
    """
    if family not in KNOBS:
        raise StrategyError(f"unknown strategy {family!r}: choose from {', '.join(KNOBS)}")
    given = {name: knobs[name] for name in KNOBS[family] if knobs.get(name) is not None}
    if not given.get("budget"):
        given.pop("budget", None)
    else:
        given.pop("delta", None), given.pop("nu", None)
    whole = {name: int(value) for name, value in given.items() if name in ("window", "draft_length")}
    options = ",".join(f"{name}={value}" for name, value in {**given, **whole}.items())
    return str(parse_strategy(f"{family}:{options}" if options else family))


def knob_values(words: str) -> tuple[str | None, dict[str, Any]]:
    """The family and its knobs of a strategy in words; ``None`` for a family that has no knobs here."""
    decoder = strategy(words)
    if decoder.name not in KNOBS:
        return None, {}
    config = dict(decoder.config)
    return decoder.name, {name: config.get(name) for name in KNOBS[decoder.name]}


@dataclass(frozen=True)
class Asked:
    """What a user asked for, checked.

    Args:
        inputs: ``{"prompt": text}`` or ``{"class_labels": number}``.
        decoder: the strategy.
        seed: of the first picture.
        sampling: options that were given.
    """

    inputs: dict[str, Any]
    decoder: DecodingStrategy
    seed: int
    sampling: dict[str, Any]

    @property
    def subject(self) -> str:
        """What is painted, in words."""
        return str(next(iter(self.inputs.values())))


def asked(pipe: Any, subject: Any, decoder: Any, seed: Any, limits: Limits, **sampling: Any) -> Asked:
    """Check what a user filled in.

    Args:
        pipe: the image pipeline.
        subject: a prompt, or the number of a class.
        decoder: a strategy in words.
        seed: a whole number.
        limits: of users.
        sampling: guidance_scale, temperature, top_k; ``None`` is the model's own.

    Raises:
        InputError: for what the model cannot work with.
        StrategyError: for a strategy that there is not.
    """
    chosen = strategy(decoder, limits)
    if chosen.name in OF_TEXT:
        raise StrategyError(f"{chosen.name} decodes text: choose a strategy for pictures, such as sjd")
    if chosen.name in NEEDS_DRAFTER and not has_drafter(pipe):
        raise StrategyError(f"{chosen.name} needs a draft model, and this model has none: choose sjd")
    if pipe.takes_classes:
        inputs: dict[str, Any] = {"class_labels": whole("the class", subject, 0)}
    else:
        inputs = {"prompt": words("the prompt", subject, limits.prompt)}
    given = {name: value for name, value in sampling.items() if value is not None}
    for name in ("guidance_scale", "temperature"):
        if name in given:
            given[name] = real(name, given[name])
    if "top_k" in given:
        given["top_k"] = whole("top_k", given["top_k"], 0, 2**31 - 1)
    pipe.law_config(given)  # raises for what is out of range
    return Asked(inputs, chosen, whole("the seed", seed, 0, LARGEST_SEED), given)


def words(name: str, value: Any, most: int) -> str:
    """Text that is not empty and not too long.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} is empty: write a few words")
    if len(value) > most:
        raise InputError(f"{name} has {len(value)} characters: at most {most} are taken")
    return value.strip()


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number in a range; a browser sends 7 as 7.0.

    Raises:
        InputError: for anything else.
    """
    upper = f"..{most}" if most is not None else " or more"
    good = _is_number(value) and value == int(value)
    if not good or value < least or (most is not None and value > most):
        raise InputError(f"{name} must be a whole number, {least}{upper}, not {str(value)[:40]}")
    return int(value)


def real(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        InputError: for anything else.
    """
    if not _is_number(value):
        raise InputError(f"{name} must be a number, not {str(value)[:40]}")
    return float(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def fresh_seed() -> int:
    """A seed that is short enough to be read out."""
    return secrets.randbelow(1_000_000)
