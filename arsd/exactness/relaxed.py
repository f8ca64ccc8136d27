"""The part of the suite that relaxed rules face: they may leave plain AR's law, by no more than they report.

A rule reports with ``Verdict.local_tv``. The sum over the committed tokens must have an expectation of at least the total
variation between the law of the output and plain AR's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import CounterNoise, Draft, Law, Parts, Setting, Step, Verdict
from arsd.decoding.drafters import Redraft, redraft_by_gumbel, redraft_by_rule, redraft_independently
from arsd.decoding.rules import ChainRule, Slots
from arsd.exactness import suite as base
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.guard import GuardedRule, MakeRule, rule_under_jacobi
from arsd.exactness.tables import Build, World, total_variation
from arsd.exactness.tape import NotEnumerable, push_forward
from arsd.exactness.worlds import SAMPLED, picture, picture_grammar

_COVERED = "reported >= TV"
SLOTS = [World(4, 1, seed, sharpness=sharpness) for seed, sharpness in ((0, 1.0), (1, 1.5), (2, 3.0))]


class Reported:
    """Expectation over all paths of what a rule reports."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, result: Any, weight: Tensor) -> None:
        """Add the paths of one chunk."""
        changed = torch.tensor(result.stats.expected_changed_tokens, dtype=torch.float64)
        self.mean += float((changed * weight).sum())


class Foretold:
    """A chain rule that says before its first verdict which law the first slot will have."""

    def __init__(self, rule: ChainRule) -> None:
        self.rule, self.guarded = rule, GuardedRule(rule)
        self.law: Tensor | None = None

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """The rule's own verdict."""
        if self.law is None:
            slots = Slots.of(law.probs, draft)
            slots.omega = self.rule.omegas(step, slots)
            self.law = self.rule.slot_law(slots)[0, 0]
        return self.guarded.verify(step, law, draft)


def check_relaxed_rule(suite: Any, make: MakeRule, sequences: int) -> None:
    """Run the checks of a relaxed rule in ``suite``; see :func:`arsd.exactness.suite.check_rule`."""
    redrafts: dict[str, Redraft] = {"independent": redraft_independently}
    one = rule_under_jacobi(make, redraft_independently, "uniform", 8)
    needs_law: list[bool] = []

    def protocol() -> tuple[str, bool]:
        needs_law.append(bool(getattr(make(), "needs_law", False)))
        if not needs_law[0]:
            redrafts["coupled"] = redraft_by_rule
        picture(one, "top-k", grammar=picture_grammar())
        return "no error", True

    suite.run("keeps the protocol", "no error", protocol)
    base._run_rows(suite, one)
    suite.run("one slot, every path", f"{_COVERED}; as predicted", lambda: _one_slot(make, needs_law[0]), exact=True)
    kinds = list(itertools.product(base.INITS, redrafts.values()))

    def builds(window: int, world: World) -> list[Build]:
        under_table = [rule_under_table(make, _drafting(world), window)] if needs_law[0] else []
        return under_table + [rule_under_jacobi(make, redraft, init, window) for init, redraft in kinds]

    for name, world in base.WORLDS.items():
        windows = (2, 3, world(0).num_tokens + 2)
        suite.run(f"every path: {name}", _COVERED, partial(_every_path, world, windows, builds), exact=True)
    for name, redraft in {**redrafts, "Gumbel-coupled": redraft_by_gumbel}.items():
        build = partial(rule_under_jacobi, make, redraft, "uniform")
        suite.run(f"{sequences:,} samples: {name} guesses", "z < 5", partial(_sampled, build, sequences))


def _drafting(world: World) -> World:
    """Another model for the same ids."""
    return World(world.vocab, world.num_tokens, world.seed + 100)


def _one_slot(make: MakeRule, needs_law: bool) -> tuple[str, bool]:
    """Total variation, report and (of a chain rule) the law of single slots."""
    figures, good = [], True
    for world in SLOTS:
        rules: list[Any] = []

        def watched(rules: list[Any] = rules) -> Any:
            rule = make()
            rules.append(rule)
            return rule

        drafted = rule_under_table(watched, _drafting(world), 3) if needs_law else None
        build = _foretelling(drafted or rule_under_jacobi(watched, redraft_independently, "uniform", 3), rules)
        reported = Reported()
        law, _ = push_forward(world, build, limit=base.PATHS, each=reported)
        distance, last = total_variation(law, world.law()), rules[-1]
        good &= reported.mean >= distance - base.TV_BAR
        text = f"TV {distance:.3f}, reported {reported.mean:.3f}"
        if isinstance(last, Foretold):
            assert last.law is not None
            off = total_variation(law, last.law)
            good &= off < base.TV_BAR
            text += f", off by {off:.0e}"
        figures.append(text)
    return "; ".join(figures), good


def _foretelling(build: Build, rules: list[Any]) -> Build:
    """The same parts, with a chain rule made to foretell its law."""

    def built(setting: Setting) -> Parts:
        parts = build(setting)
        if isinstance(rules[-1], ChainRule):
            parts.rule = Foretold(rules[-1])
            rules.append(parts.rule)
        return parts

    return built


def _every_path(
    world: Callable[[int], World], windows: Sequence[int], builds: Callable[[int, World], list[Build]]
) -> tuple[str, bool]:
    """The largest total variation, and the sampler whose report is nearest to it or below it."""
    tasks = [(world(number % 3), window) for number, window in enumerate(windows)]
    rows = [[(task, build) for build in builds(window, task)] for task, window in tasks]
    samplers = list(itertools.chain(*zip(*rows, strict=True)))  # every window before the next kind of guess
    found: list[tuple[float, float]] = []
    paths = 0
    for task, build in samplers:
        reported = Reported()
        try:
            law, taken = push_forward(task, build, limit=base.PATHS - paths, each=reported)
        except NotEnumerable:
            if not found:
                raise
            break
        paths += taken
        found.append((total_variation(law, task.law()), reported.mean))
    tightest = min(found, key=lambda pair: pair[1] - pair[0])
    text = f"TV {max(found)[0]:.4f} at most; tightest report {tightest[1]:.4f} for {tightest[0]:.4f}"
    good = all(report >= distance - base.TV_BAR for distance, report in found)
    return f"{text}, {len(found)} of {len(samplers)} samplers, {paths:,} paths", good


def _sampled(build: Callable[[int], Build], sequences: int) -> tuple[str, bool]:
    """A lower bound of the total variation, from samples, against the mean report.

    Half of the samples choose a set of sequences, the other half say how much more often than plain AR the sampler ends
    there: an unbiased estimate of something that the total variation is at least.
    """
    figures, good = [], True
    for label, (world, window) in SAMPLED.items():
        noise = CounterNoise([1 + row // 250 for row in range(sequences)], [row % 250 for row in range(sequences)])
        noise.AHEAD = 4
        result = world.decode(sequences, build(window), noise)
        number, law = world.number(result.tokens), world.law()
        half = sequences // 2
        often = torch.bincount(number[:half], minlength=len(law)) > half * law
        hit = often[number[half:]].double()
        reported = torch.tensor(result.stats.expected_changed_tokens, dtype=torch.float64)
        least = float(hit.mean() - law[often].sum())
        error = float((hit.var() / len(hit) + reported.var() / sequences) ** 0.5) or 1e-12
        z = (least - float(reported.mean())) / error
        good &= z < base.Z_BAR
        figures.append(f"{label}: TV at least {least:.3f}, reported {float(reported.mean()):.3f}, z {z:.1f}")
    return "; ".join(figures), good
