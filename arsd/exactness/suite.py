"""The exactness suite for any rule or drafter, under the production loop (``arsd check-rule``; see docs/extending.md).

Three kinds of proof: enumeration of every path of the sampler (exact), chi-square of samples drawn with the production
noise, and equality with plain AR's tokens. Each is a :class:`Check`; together they are a :class:`Report`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import Grammar, Parts, Setting
from arsd.decoding.drafters import NoDraft, Redraft, redraft_by_gumbel, redraft_by_rule, redraft_independently
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.decoding.types import FixedWindow
from arsd.errors import StrategyError
from arsd.exactness.guard import (
    MakeDrafter,
    MakeRule,
    drafter_under,
    rule_under_jacobi,
    rule_under_replay,
    rule_under_trees,
)
from arsd.exactness.tables import Build, TableTarget, World, law_z, pairs_z, run, sample, total_variation
from arsd.exactness.tape import NotEnumerable, push_forward
from arsd.exactness.worlds import INITS, LAWS, SAMPLED, VOCAB, WORLDS, picture, picture_grammar, plain_picture
from arsd.plugins import one_line

SEQUENCES, QUICK_SEQUENCES = 100_000, 20_000
PATHS = 300_000  # per check: enough for every sampler of this package, and a few seconds
WINDOWS = range(1, 25)
TREES = ("2x1", "3x2.1", "chain2", "2x2x1")  # as TreeShape.parse takes them
TV_BAR, Z_BAR = 1e-12, 5.0
PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"


@dataclass(frozen=True)
class Check:
    """One claim, what was measured, and what would have been allowed.

    Args:
        check: the claim.
        figure: the measurement, or why there is none.
        bar: what the figure must keep to.
        verdict: ``pass``, ``FAIL`` or ``skipped``.
        exact: whether passing it is a proof, and not only the absence of a contradiction.
        seconds: what it cost.
    """

    check: str
    figure: str
    bar: str
    verdict: str
    exact: bool
    seconds: float


@dataclass
class Report:
    """The checks of one rule or drafter.

    Args:
        kind: ``rule`` or ``drafter``.
        lossless: whether it claims to be.
        seed_exact: whether it claims to be.
        checks: in the order they ran.
    """

    kind: str
    lossless: bool
    seed_exact: bool
    checks: list[Check] = field(default_factory=list)

    @property
    def refuted(self) -> bool:
        """Whether a check failed."""
        return any(check.verdict == FAIL for check in self.checks)

    @property
    def verdict(self) -> str:
        """``refuted``, ``proven``, or ``not refuted`` when no exact proof applies and the samples show nothing."""
        exact = any(check.verdict == PASS and check.exact for check in self.checks)
        return "refuted" if self.refuted else "proven" if exact else "not refuted"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": self.verdict}


_TV, _Z, _SAME = f"TV < {TV_BAR:g}", f"|z| < {Z_BAR:g}", "0 tokens differ"


class _Suite:
    """Runs checks one by one; after one that raised, the others are left out: they would raise the same."""

    def __init__(self, report: Report, progress: Callable[[str], None]) -> None:
        self.report, self.progress, self.broken = report, progress, False

    def run(self, name: str, bar: str, measure: Callable[[], tuple[str, bool]], exact: bool = False) -> None:
        if self.broken:
            return
        self.progress(name)
        began = time.perf_counter()
        try:
            figure, good = measure()
            verdict = PASS if good else FAIL
        except NotEnumerable as reason:
            figure, verdict = str(reason), SKIPPED
        except StrategyError:  # an option that it does not take: a mistake of the caller, no verdict on the method
            raise
        except Exception as error:  # somebody else's code may fail in any way
            figure, verdict, self.broken = one_line(error), FAIL, True
        self.report.checks.append(Check(name, figure, bar, verdict, exact, time.perf_counter() - began))


def check_rule(
    make: MakeRule,
    lossless: bool = True,
    seed_exact: bool = False,
    sequences: int = SEQUENCES,
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Hold a rule to its promises, under Jacobi guesses of every kind that it has to stand.

    A rule that reads q gets guesses whose recorded q is true: independent and Gumbel-coupled draws, and its own tokens where
    it says that it judges ``every_slot``. To a rule that does not read q every guess is fair.

    Args:
        make: makes the rule; called anew for every decode.
        lossless: its claim. A relaxed rule is held to what it reports instead (:mod:`arsd.exactness.relaxed`).
        seed_exact: its claim; adds the comparison with plain AR token by token.
        sequences: samples per chi-square; four times as many show half the bias.
        progress: called with the name of each check as it begins.

    Raises:
        StrategyError: when the rule itself refuses an option. Everything else that it raises is a failed check.
    """
    suite = _Suite(Report("rule", lossless, seed_exact), progress)
    if not lossless:
        from arsd.exactness.relaxed import check_relaxed_rule

        check_relaxed_rule(suite, make, sequences)
        return suite.report
    redrafts: dict[str, Redraft] = {"independent": redraft_independently}
    trees: list[bool] = []
    one = rule_under_jacobi(make, redraft_independently, "uniform", 8)

    def protocol() -> tuple[str, bool]:
        rule = make()
        if not getattr(rule, "needs_law", False) or getattr(rule, "every_slot", False):
            redrafts["coupled"] = redraft_by_rule
        trees.append(bool(getattr(rule, "trees", False)))
        picture(one, "top-k", grammar=picture_grammar())
        return "no error", True

    suite.run("keeps the protocol", "no error", protocol)
    kinds = list(itertools.product(INITS, redrafts.values()))
    _run_rows(suite, one)
    if any(trees):
        _run_trees(suite, make, seed_exact)
    _run_paths(suite, "", lambda window: [rule_under_jacobi(make, redraft, init, window) for init, redraft in kinds])
    for name, redraft in {**redrafts, "Gumbel-coupled": redraft_by_gumbel}.items():
        _run_samples(suite, f"{name} guesses", partial(rule_under_jacobi, make, redraft, "uniform"), sequences)
    if seed_exact:
        redraft = redrafts.get("coupled", redraft_independently)
        _run_equality(suite, partial(rule_under_jacobi, make, redraft), exact=True)
        suite.run("plain AR's tokens: all guesses right, 4 in 5 right", _SAME, lambda: _replayed(make), exact=True)
    return suite.report


def check_drafter(
    make: MakeDrafter, sequences: int = SEQUENCES, progress: Callable[[str], None] = lambda name: None
) -> Report:
    """Hold a drafter to its promises, under the rules of this package.

    Its guesses must leave plain AR's tokens alone under the seed-exact rule, and plain AR's law under speculative sampling
    that takes them for what any guess is, given the past: a fixed token. A drafter with ``needs_law`` must also give the law
    that its guesses are really drawn from: speculative sampling relies on it.

    Args:
        make: ``make(setting)`` makes the drafter; called anew for every decode.
        sequences: samples per chi-square.
        progress: called with the name of each check as it begins.

    Raises:
        StrategyError: when the drafter itself refuses an option. Everything else that it raises is a failed check.
    """
    suite = _Suite(Report("drafter", True, True), progress)
    ways: dict[str, Callable[[int], Build]] = {
        "guesses as fixed tokens": lambda window: drafter_under(make, RejectionSampling, window, fixed=True)
    }

    def protocol() -> tuple[str, bool]:
        made = _made(make)
        if getattr(made, "needs_law", False):
            ways["its own q"] = lambda window: drafter_under(make, RejectionSampling, window)
            if getattr(made, "tree", None) is None:
                every_slot = partial(RejectionSampling, True)
                ways["its own q, every slot judged"] = lambda window: drafter_under(make, every_slot, window)
        for way in ways.values():
            picture(way(8), "top-k", grammar=picture_grammar())
        return "no error", True

    suite.run("keeps the protocol", "no error", protocol)
    _run_equality(suite, lambda init, window: drafter_under(make, SeedExact, window))
    for name, way in ways.items():
        _run_rows(suite, way(8), f"{name}: ")
        _run_paths(suite, f"{name}, ", partial(_alone, way))
        _run_samples(suite, name, way, sequences)
    return suite.report


def _made(make: MakeDrafter) -> Any:
    """A drafter for a rule that needs q."""
    grammar, made = Grammar(4, 3), []

    def build(setting: Setting) -> Parts:
        made.append(make(replace(setting, window=3, rule=RejectionSampling())))
        return Parts(NoDraft(), SeedExact(), FixedWindow(1), 1)

    run(TableTarget(3, 4, 1), parts=build, grammar=grammar, row_length=2)
    return made[0]


def _alone(way: Callable[[int], Build], window: int) -> list[Build]:
    return [way(window)]


def _run_paths(suite: _Suite, prefix: str, builds: Callable[[int], Sequence[Build]]) -> None:
    """Enumerate every world; ``builds`` gives the samplers of a window."""
    for name, world in WORLDS.items():
        windows = (2, 3, 1, world(0).num_tokens + 2)
        suite.run(f"every path: {prefix}{name}", _TV, partial(_enumerate, world, windows, builds), exact=True)


def _enumerate(
    world: Callable[[int], World], windows: Sequence[Any], builds: Callable[[Any], Sequence[Build]]
) -> tuple[str, bool]:
    """The largest total variation of all samplers, on three seeds of the world in turn."""
    worst, paths, done = 0.0, 0, 0
    samplers = list(itertools.chain(*zip(*map(builds, windows), strict=True)))  # every window before the next kind of guess
    for number, build in enumerate(samplers):
        task = world(number % 3)
        try:
            law, taken = push_forward(task, build, limit=PATHS - paths)
        except NotEnumerable:
            if not done:
                raise
            break
        paths, done, distance = paths + taken, done + 1, total_variation(law, task.law())
        worst = distance if math.isnan(distance) else max(worst, distance)
        if math.isnan(worst):  # a law that holds NaN
            break
    return f"TV {worst:.1e}, {done} of {len(samplers)} samplers, {paths:,} paths", worst < TV_BAR


def _run_trees(suite: _Suite, make: MakeRule, seed_exact: bool) -> None:
    """The same of a rule that also judges trees of guesses, with those of a draft model."""
    for name, world in WORLDS.items():
        shapes = partial(_enumerate, world, TREES, lambda shape: [rule_under_trees(make, shape)])
        suite.run(f"every path: trees, {name}", _TV, shapes, exact=True)
    if seed_exact:

        def laws() -> tuple[str, bool]:
            pairs = ((picture(rule_under_trees(make, "3x2x1"), law), plain_picture(law)) for law in LAWS)
            return _differing(pairs)

        suite.run(f"plain AR's tokens: trees, {len(LAWS)} laws", _SAME, laws, exact=True)


def _run_samples(suite: _Suite, name: str, build: Callable[[int], Build], sequences: int) -> None:
    """Chi-square against the exact law, and of pairs of rows against two independent draws; ``build`` takes the window."""

    def measure() -> tuple[str, bool]:
        figures = {}
        for label, (world, window) in SAMPLED.items():
            tokens = sample(world, build(window), sequences)
            figures[f"law, {label}"] = law_z(world, tokens)
            if label == "warm":
                figures["images"] = pairs_z(world, tokens)
                figures["seeds"] = pairs_z(world, sample(world, build(window), sequences, images_per_seed=1))
        text = "; ".join(f"{label} {z:.1f}" for label, z in figures.items())
        return f"z: {text}", all(abs(z) < Z_BAR for z in figures.values())

    suite.run(f"{sequences:,} samples: {name}", _Z, measure)


def _run_rows(suite: _Suite, build: Build, prefix: str = "") -> None:
    """A picture is a function of its seed: not of its neighbours, nor of the one before it in a row that is refilled."""

    def alone() -> tuple[str, bool]:
        grammar = picture_grammar()
        together = picture(build, "top-k", grammar=grammar)
        again = int((picture(build, "top-k", grammar=grammar) != together).sum())
        rows = torch.cat([picture(build, "top-k", [row], grammar) for row in range(len(together))])
        apart = int((rows != together).sum())
        queued = int((picture(build, "top-k", grammar=grammar, batch=2) != together).sum())
        return f"{again} on a second run, {apart} in rows alone, {queued} in a queue", again + apart + queued == 0

    def cold() -> tuple[str, bool]:
        return _differing([(picture(build, "temperature 0"), plain_picture("temperature 0"))])

    suite.run(f"{prefix}a picture depends on its seed only", _SAME, alone)
    suite.run(f"{prefix}temperature 0: the most likely tokens", _SAME, cold)


def _run_equality(suite: _Suite, build: Callable[[str, int], Build], exact: bool = False) -> None:
    """Plain AR's tokens, for every window, law, grammar and batch; ``build`` takes the initialiser and the window."""

    def windows() -> tuple[str, bool]:
        plain = plain_picture()
        return _differing((picture(build(INITS[window % 4], window)), plain) for window in WINDOWS)

    def laws() -> tuple[str, bool]:
        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for law, grammar in itertools.product(LAWS, (None, picture_grammar())):
                plain = plain_picture(law, grammar=grammar)
                for window in (2, 7, 20):
                    yield picture(build(INITS[window % 4], window), law, grammar=grammar), plain

        return _differing(pairs())

    def batches() -> tuple[str, bool]:
        alone = torch.cat([plain_picture(rows=[row]) for row in range(5)])
        return _differing((picture(build("uniform", 8), rows=range(rows)), alone[:rows]) for rows in range(1, 6))

    suite.run(f"plain AR's tokens: windows {WINDOWS[0]} to {WINDOWS[-1]}", _SAME, windows, exact)
    suite.run(f"plain AR's tokens: {len(LAWS)} laws, with and without a grammar", _SAME, laws, exact)
    suite.run("plain AR's tokens: batches of 1 to 5 seeds", _SAME, batches, exact)


def _replayed(make: MakeRule) -> tuple[str, bool]:
    plain = plain_picture()
    tries = itertools.product((0, 5), (2, 7, 20))
    return _differing((picture(rule_under_replay(make, plain, VOCAB, wrong, window)), plain) for wrong, window in tries)


def _differing(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[str, bool]:
    differ, total = 0, 0
    for tokens, plain in pairs:
        differ, total = differ + int((tokens != plain).sum()), total + plain.numel()
    return f"{differ:,} of {total:,} tokens differ", differ == 0
