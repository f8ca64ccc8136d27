"""``arsd check-rule``: the exactness suite, pointed at a rule or drafter of your own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from arsd.cli.common import add_import_option, table
from arsd.errors import InputError, StrategyError

if TYPE_CHECKING:
    from arsd.decoding.registry import Registered
    from arsd.exactness.suite import Report


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check-rule",
        help="prove or refute that a rule or drafter is lossless, or costs what it reports",
        description=__doc__,
        epilog="exit status: 0 as good as its promise as far as the suite can tell, 1 refuted, 2 the command cannot run",
    )
    parser.add_argument("target", help="FILE.py:Class, module:Class or a registered name; options follow as :key=value")
    parser.add_argument("--quick", action="store_true", help="20,000 sequences per chi-square instead of 100,000")
    parser.add_argument("--json", action="store_true")
    add_import_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and print."""
    from arsd.exactness.suite import QUICK_SEQUENCES, SEQUENCES, check_drafter, check_rule

    entry, options = find_target(arguments.target)
    entry.check_options(options)
    count = QUICK_SEQUENCES if arguments.quick else SEQUENCES

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def make(*setting: Any) -> Any:
        return entry.make(*setting, **options)

    if entry.kind == "rule":
        report = check_rule(make, entry.lossless, entry.seed_exact, count, progress)
    else:
        report = check_drafter(make, count, progress)
    progress("")
    if arguments.json:
        print(json.dumps({"target": arguments.target, **report.as_dict()}))
    else:
        print(f"{report.kind} {arguments.target}: {_claim(report)}")
        header = ["check", "figure", "bar", "verdict", "seconds"]
        print(table(header, [[c.check, c.figure, c.bar, c.verdict, f"{c.seconds:.1f}"] for c in report.checks]))
        print(_summary(report))
    return 1 if report.refuted else 0


def find_target(text: str) -> tuple[Registered, dict[str, Any]]:
    """What to check, with its claims and options.

    A class that a file registers keeps the claims that it was registered with; any other is held to its attributes
    ``lossless`` (default: yes) and ``seed_exact`` (default: no).

    Raises:
        InputError: when it names neither a rule nor a drafter.
        StrategyError: for an option that is none.
    """
    from arsd.decoding.registry import DRAFTERS, RULES, split_part
    from arsd.plugins import find_object

    words = text.split(":")
    options = len(words) - next((i for i, word in enumerate(words) if "=" in word), len(words))
    place = ":".join(words[: len(words) - options])
    values = split_part(":".join(["", *words[len(words) - options :]]))[1]
    named = [entries[place] for entries in (RULES, DRAFTERS) if place in entries]
    if len(named) == 2:
        raise InputError(f"{place!r} is the name of a rule and of a drafter: give FILE.py:Class")
    if named:
        return named[0], values
    if ":" not in place:
        names = ", ".join([*RULES, *DRAFTERS])
        raise InputError(f"no rule or drafter is called {place!r}: choose from {names}, or give FILE.py:Class")
    found = find_object(place)
    for entry in (*RULES.values(), *DRAFTERS.values()):
        if entry.factory is found:
            return entry, values
    return _described(place, found), values


def _described(place: str, found: Callable[..., Any]) -> Registered:
    from arsd.decoding.registry import Registered

    kinds = [kind for kind, method in (("rule", "verify"), ("drafter", "propose")) if callable(getattr(found, method, None))]
    if not isinstance(found, type) or len(kinds) != 1:
        raise InputError(f"{place} must be a class with either verify (a rule) or propose (a drafter), or be registered")
    lossless, seed_exact = bool(getattr(found, "lossless", True)), bool(getattr(found, "seed_exact", False))
    if seed_exact and not lossless:
        raise StrategyError(f"{place} cannot be seed-exact and not lossless: plain AR's own tokens have its law")
    return Registered(kinds[0], found.__name__, found, lossless, seed_exact)


def _claim(report: Report) -> str:
    if report.kind == "drafter":
        return "its guesses must not show in the output"
    if not report.lossless:
        return "relaxed: may leave plain AR's law, by no more than it reports"
    return "claims plain AR's own tokens" if report.seed_exact else "claims plain AR's law"


def _summary(report: Report) -> str:
    failed = [check.check for check in report.checks if check.verdict == "FAIL"]
    if failed:
        return f"refuted by {len(failed)} of {len(report.checks)} checks, first: {failed[0]}"
    passed = f"{sum(check.verdict == 'pass' for check in report.checks)} checks pass"
    skipped = sum(check.verdict == "skipped" for check in report.checks)
    passed += f", {skipped} do not apply" if skipped else ""
    if report.verdict == "proven" and not report.lossless:
        return f"relaxed, and it reports what it costs: {passed}"
    if report.verdict == "proven":
        return f"lossless: {passed}"
    return f"not refuted: {passed}, but none of them is exact, and a small bias may hide in the samples"
