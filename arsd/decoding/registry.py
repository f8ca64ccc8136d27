"""Drafters and rules by name, so that a method in a file of its own works in every command (see docs/extending.md)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from arsd.errors import StrategyError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Registered:
    """A drafter or rule under its name.

    Args:
        kind: ``drafter`` or ``rule``.
        name: what strategies call it.
        factory: a drafter is made by ``factory(setting, **options)``, a rule by ``factory(**options)``.
        lossless: of a rule: the output has exactly the law of plain AR.
        seed_exact: of a rule: the tokens are plain AR's own.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    lossless: bool = True
    seed_exact: bool = False

    def check_options(self, options: dict[str, Any]) -> None:
        """Hold options against the factory's signature, without making anything.

        Raises:
            StrategyError: for an option that the factory does not take, or one that it cannot do without.
        """
        setting = (None,) if self.kind == "drafter" else ()
        try:
            signature = inspect.signature(self.factory)
        except ValueError:  # made in C: it says itself what is wrong
            return
        try:
            signature.bind(*setting, **options)
        except TypeError as error:
            names = ", ".join(list(signature.parameters)[len(setting) :]) or "none"
            raise StrategyError(f"{self.kind} {self.name!r}: {error}; its options are: {names}") from None

    def make(self, *setting: Any, **options: Any) -> Any:
        """The drafter of one call (``setting`` is its :class:`arsd.decoding.Setting`), or the rule.

        Raises:
            StrategyError: for options that do not fit.
        """
        self.check_options(options)
        return self.factory(*setting, **options)


DRAFTERS: dict[str, Registered] = {}
RULES: dict[str, Registered] = {}


def register_drafter(name: str) -> Callable[[F], F]:
    """Decorator: strategies may name this drafter, as in ``speculative:drafter=NAME``.

    What is decorated is called as ``factory(setting, **options)`` once per call and returns a
    :class:`arsd.decoding.types.Drafter`. A class attribute ``needs_law = True`` says that it can give the law q of its
    guesses, ``False`` that it cannot.

    Args:
        name: letters, digits, dots, dashes and underscores.

    Raises:
        StrategyError: for a name that cannot be used, or that another drafter has.
    """
    return lambda factory: _add(DRAFTERS, Registered("drafter", name, factory))


def register_rule(name: str, lossless: bool = True, seed_exact: bool = False) -> Callable[[F], F]:
    """Decorator: strategies may name this rule, as in ``speculative:rule=NAME``.

    What is decorated is called as ``factory(**options)`` and returns a :class:`arsd.decoding.types.Rule`. An attribute
    ``needs_law = True`` says that it reads the law q of the guesses; ``every_slot = True`` that its tokens behind the first
    refusal have the law p too, given q, so that a drafter may go on from them.

    Args:
        name: letters, digits, dots, dashes and underscores.
        lossless: whether the output has exactly the law of plain AR; ``arsd check-rule`` holds it to that.
        seed_exact: whether the tokens are exactly plain AR's for the same seed.

    Raises:
        StrategyError: for a name that cannot be used or that another rule has, or a promise that contradicts itself.
    """
    if seed_exact and not lossless:
        raise StrategyError(f"rule {name!r} cannot be seed-exact and not lossless: plain AR's own tokens have its law")
    return lambda factory: _add(RULES, Registered("rule", name, factory, lossless, seed_exact))


def find_drafter(name: Any) -> Registered:
    """The drafter of this name.

    Raises:
        StrategyError: when there is none.
    """
    return _find(DRAFTERS, "drafter", name)


def find_rule(name: Any) -> Registered:
    """The rule of this name.

    Raises:
        StrategyError: when there is none.
    """
    return _find(RULES, "rule", name)


def _add(table: dict[str, Registered], entry: Registered) -> Any:
    if not isinstance(entry.name, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", entry.name):
        raise StrategyError(
            f"a {entry.kind} cannot be called {entry.name!r}: use letters, digits, dots, dashes, underscores"
        )
    if not callable(entry.factory):
        raise StrategyError(f"{entry.kind} {entry.name!r} must be a class or a function, not {entry.factory!r}")
    there = table.get(entry.name)
    if there is not None and _origin(there.factory) != _origin(entry.factory):
        known = ".".join(map(str, _origin(there.factory)))
        raise StrategyError(f"there is a {entry.kind} {entry.name!r} already ({known}): choose another name")
    table[entry.name] = entry  # the same definition once more (a notebook cell, a reloaded module) replaces the old one
    return entry.factory


def _origin(factory: Callable[..., Any]) -> tuple[Any, Any]:
    return getattr(factory, "__module__", None), getattr(factory, "__qualname__", id(factory))


def _find(table: dict[str, Registered], kind: str, name: Any) -> Registered:
    if not isinstance(name, str) or name not in table:
        raise StrategyError(f"unknown {kind} {name!r}: choose from {', '.join(table)}, or import the file that registers it")
    return table[name]


def parse_value(text: str) -> Any:
    """The value of an option: a number, ``none``, ``true``, ``false``, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def split_part(text: Any) -> tuple[Any, dict[str, Any]]:
    """``name`` or ``name:key=value:key=value`` to the name and its options.

    Raises:
        StrategyError: for an option without a value.
    """
    name, *items = text.split(":") if isinstance(text, str) else (text,)
    options = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise StrategyError(f"{item!r} in {text!r} is no option: write name:key=value:key=value")
        options[key] = parse_value(value)
    return name, options


def made_rule(found: Registered, options: dict[str, Any]) -> Any:
    """A rule with its options; a value that the rule itself refuses is the user's mistake as well.

    Raises:
        StrategyError: for options that do not fit.
    """
    try:
        return found.make(**options)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, StrategyError) else StrategyError(f"rule {found.name!r}: {error}") from error


def bound(rule: Any, setting: Any) -> Any:
    """The rule, told of the call that it is for, if it asks: see ``bind`` of :class:`arsd.decoding.types.Rule`."""
    if hasattr(rule, "bind"):
        rule.bind(setting)
    return rule
