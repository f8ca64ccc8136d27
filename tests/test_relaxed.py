"""COOL-SD gives exactly the laws that its formulas predict, costs what it reports, and never spends more than its budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction as F
from functools import partial

import pytest
import torch
from chain_reference import Judge, Means, Omegas, Virtual, fractions, predicted, world_of

from arsd.decoding import LawConfig, Verdict
from arsd.decoding.relaxed import CoolSDRule, PublishedCoolSDRule
from arsd.decoding.rules import RejectionSampling, Slots
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.tables import World, total_variation
from arsd.exactness.tape import push_forward

P, Q = fractions("1/2 3/10 3/20 1/20"), fractions("1/5 1/5 3/10 3/10")
ONE, ONE_Q = world_of([P]), world_of([Q])


def measured(make, target: World, draft: World, window: int, virtual: bool = False):
    """The exact law of the production sampler, and expectations over its paths."""
    means = Means()
    controller = partial(Virtual, window) if virtual else None
    law, _ = push_forward(target, rule_under_table(make, draft, window, controller), each=means, trace=True)
    assert abs(float(law.sum()) - 1) < 1e-12
    return law, means


def same(law: torch.Tensor, numbers) -> bool:
    return bool((law - torch.tensor([float(x) for x in numbers], dtype=torch.float64)).abs().max() < 1e-15)


def uniform(omega: float) -> Callable[[], CoolSDRule]:
    return lambda: CoolSDRule(delta=omega, nu=0, floor=0)


# ---------------------------------------------------------------- one slot, in rational numbers

STEPS = {  # omega: accepted, residual, output, total variation
    "1/2": ("9/20", "6/11 3/11 3/22 1/22", "1/2 3/10 3/20 1/20", "0"),
    "1": ("3/5", "3/4 1/4 0 0", "1/2 3/10 3/20 1/20", "0"),
    "3/2": ("7/10", "3/4 1/4 0 0", "17/40 11/40 9/40 3/40", "1/10"),
    "2": ("4/5", "3/4 1/4 0 0", "7/20 1/4 3/10 1/10", "1/5"),
    "4": ("9/10", "3/4 1/4 0 0", "11/40 9/40 3/10 1/5", "3/10"),
    "10": ("1", "3/4 1/4 0 0", "1/5 1/5 3/10 3/10", "2/5"),
}


@pytest.mark.parametrize("omega", STEPS)
def test_one_slot_accepts_resamples_and_costs_what_the_fractions_say(omega: str):
    accepted, residual, output, cost = STEPS[omega]
    law, means = measured(uniform(float(F(omega))), ONE, ONE_Q, 2)
    assert same(law, fractions(output)) and abs(means.accepted - F(accepted)) < 1e-15
    assert abs(total_variation(law, ONE.law()) - F(cost)) < 1e-15 and abs(means.changed - F(cost)) < 1e-15
    judge = Omegas(lambda i, length: F(omega))
    f = judge.accept(P, Q, 0, 1, 0, 0)
    assert judge.slot_law(P, Q, f) == fractions(output) and judge.cost(P, Q, f) == F(cost)
    if F(accepted) < 1:
        assert judge.residual(P, Q, f, 0) == fractions(residual)
        rule, slots = CoolSDRule(), slots_of(P, Q, float(F(omega)))
        weights = rule.residual(slots)[0, 0]
        assert same(weights / weights.sum(), fractions(residual))


def slots_of(p, q, omega: float | None = None) -> Slots:
    p, q = (torch.tensor([[[float(x) for x in law]]], dtype=torch.float64) for law in (p, q))
    factor = None if omega is None else torch.full((1, 1), omega, dtype=torch.float64)
    return Slots(p, q, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool), factor)


class VanillaResidual(CoolSDRule):
    """max(p - q, 0) whatever omega is."""

    def residual(self, slots):
        return (slots.p - slots.q).clamp_min(0)


class ResampleFromP(CoolSDRule):
    def residual(self, slots):
        return slots.p


class Spike(CoolSDRule):
    """Another optimal residual: the minimiser is not unique where the rule is lossy."""

    def residual(self, slots):
        return torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand_as(slots.p)


@pytest.mark.parametrize(
    ("rule", "omega", "output", "cost"),
    [
        (VanillaResidual, "1/2", "49/80 23/80 3/40 1/40", "9/80"),
        (ResampleFromP, "2", "3/10 13/50 33/100 11/100", "6/25"),
        (Spike, "2", "2/5 1/5 3/10 1/10", "1/5"),
    ],
)
def test_other_residuals_give_what_the_fractions_say_and_only_optimal_ones_cost_what_is_reported(rule, omega, output, cost):
    law, means = measured(lambda: rule(delta=float(F(omega)), nu=0, floor=0), ONE, ONE_Q, 2)
    assert same(law, fractions(output)) and abs(total_variation(law, ONE.law()) - F(cost)) < 1e-15
    assert (total_variation(law, ONE.law()) - means.changed > 0.01) == (rule is not Spike), "the meter shows the mutants"


# ---------------------------------------------------------------- a chain of two, in rational numbers

P2 = [fractions("3/5 2/5")], [fractions("1/2 1/2"), fractions("4/5 1/5")]
Q2 = [fractions("3/10 7/10")], [fractions("1/4 3/4"), fractions("2/5 3/5")]
CHAINS = {  # omegas: joint law, accepted guesses A, bound B, total variation
    "1 1": ("3/10 3/10 8/25 2/25", "233/200", "0", "0"),
    "3/2 3/2": ("1/8 11/40 21/50 9/50", "81/50", "67/200", "1/5"),
    "2 1": ("3/20 3/20 14/25 7/50", "329/200", "3/10", "3/10"),
    "1 2": ("9/40 3/8 6/25 4/25", "33/25", "31/200", "31/200"),
    "2 1/2": ("3/20 3/20 14/25 7/50", "3/2", "3/10", "3/10"),
}


class Listed(CoolSDRule):
    """Factors as listed."""

    def __init__(self, omegas: list[F]) -> None:
        super().__init__()
        self.listed = omegas

    def schedule(self, length: int) -> torch.Tensor:
        return torch.tensor([float(x) for x in self.listed[:length]], dtype=torch.float64)


@pytest.mark.parametrize("omegas", CHAINS)
def test_a_chain_of_two_has_the_joint_law_accepted_length_and_bound_of_the_fractions(omegas: str):
    joint, accepted, bound, cost = CHAINS[omegas]
    target, draft = world_of(*P2), world_of(*Q2)
    law, means = measured(lambda: Listed(fractions(omegas)), target, draft, 3, virtual=True)
    assert same(law, fractions(joint)) and abs(means.accepted - F(accepted)) < 1e-14
    assert abs(means.changed - F(bound)) < 1e-15 and abs(total_variation(law, target.law()) - F(cost)) < 1e-15


def test_the_bound_is_not_the_truth_and_the_tail_below_one_buys_nothing():
    numbers = {omegas: [F(x) for x in row[1:]] for omegas, row in CHAINS.items()}
    uniform, annealed, tail = numbers["3/2 3/2"], numbers["2 1"], numbers["2 1/2"]
    assert annealed[0] > uniform[0] and annealed[1] < uniform[1] and annealed[2] > uniform[2]
    assert annealed[1:] == tail[1:] and annealed[0] > tail[0]


# ---------------------------------------------------------------- the schedule

SCHEDULES = {
    (2, 1.1): "1.4700 0.7300",
    (3, 1.1): "1.8931 0.9401 0.4668",
    (4, 1.1): "2.3584 1.1712 0.5816 0.2888",
    (5, 1.1): "2.8550 1.4177 0.7040 0.3496 0.1736",
    (5, 2.0): "5.1909 2.5777 1.2801 0.6357 0.3157",
    (6, 1.1): "3.3731 1.6750 0.8318 0.4131 0.2051 0.1019",
    (8, 1.1): "4.4465 2.2081 1.0965 0.5445 0.2704 0.1343 0.0667 0.0331",
    (10, 1.1): "5.5426 2.7524 1.3668 0.6787 0.3370 0.1674 0.0831 0.0413 0.0205 0.0102",
}


@pytest.mark.parametrize(("length", "delta"), SCHEDULES)
def test_schedule_is_the_table_and_its_mean_is_delta(length: int, delta: float):
    schedule = PublishedCoolSDRule(delta).schedule(length)
    assert [f"{x:.4f}" for x in schedule.tolist()] == SCHEDULES[length, delta].split()
    assert abs(float(schedule.mean()) - delta) < 1e-14
    clamped = CoolSDRule(delta).schedule(length)
    assert torch.equal(clamped, schedule.clamp_min(1))


def test_schedules_without_normalisation_without_decay_of_no_length_and_very_long():
    assert torch.equal(
        CoolSDRule(2, normalize="none", floor=0).schedule(3), 2 * (-0.7 * torch.arange(3.0, dtype=torch.float64)).exp()
    )
    assert CoolSDRule(1.3, nu=0).schedule(4).tolist() == [1.3] * 4 and CoolSDRule(1, nu=0).schedule(3).tolist() == [1] * 3
    assert CoolSDRule().schedule(0).shape == (0,)
    steep = PublishedCoolSDRule(1.1, nu=50).schedule(3000)
    assert bool(steep.isfinite().all()) and abs(float(steep.mean()) - 1.1) < 1e-12


# ---------------------------------------------------------------- every path


class Affordable(Judge):
    """The budget in a few lines: what accrued less what was spent; the largest omega by bisection."""

    def __init__(self, budget: float, num_tokens: int) -> None:
        self.budget, self.num_tokens = budget, num_tokens

    def accept(self, p, q, i, length, n, spent):
        left = max(self.budget * (n + 1) / self.num_tokens - spent, 0)
        low, high = 1.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            cost = sum(max(min(b, middle * a) - a, 0) for a, b in zip(p, q, strict=True))
            low, high = (middle, high) if cost <= left else (low, middle)
        return [min(1, low * a / b) if b else 0 for a, b in zip(p, q, strict=True)]


def exponential(delta: float, nu: float, floor: float = 0, mean: bool = True) -> Omegas:
    def omega(i: int, length: int) -> float:
        share = [math.exp(-nu * j) for j in range(length)]
        return max(delta * share[i] * (length / sum(share) if mean else 1), floor)

    return Omegas(omega)


WORLDS = {
    "three ids": (World(3, 3, 1), World(3, 3, 2)),
    "sharp": (World(3, 3, 3, sharpness=3.0), World(3, 3, 4, sharpness=3.0)),
    "two ids": (World(2, 3, 1), World(2, 3, 2)),
    "top-k of 3, one forced": (
        World(3, 3, 1, LawConfig(guidance_scale=2.0, top_k=2), forced={1: 2}),
        World(3, 3, 2, forced={1: 2}),
    ),
    "one-hot guesses": (World(3, 3, 1), World(3, 3, 2, LawConfig(temperature=0.0))),
    "forbidden ids": (World(3, 3, 1, forbidden={0: 1, 2: 0}), World(3, 3, 2, forbidden={1: 1})),
    "right guesses": (World(3, 3, 1), World(3, 3, 1)),
    "one id": (World(1, 3, 1), World(1, 3, 1)),
}
RULES = {
    "rejection": (RejectionSampling, lambda world: Omegas(lambda i, length: 1)),
    "rejection, every slot": (lambda: RejectionSampling(True), lambda world: Omegas(lambda i, length: 1)),
    "uniform below 1": (uniform(0.6), lambda world: Omegas(lambda i, length: 0.6)),
    "published": (lambda: PublishedCoolSDRule(1.5), lambda world: exponential(1.5, 0.7)),
    "clamped": (lambda: CoolSDRule(1.5, 1.0), lambda world: exponential(1.5, 1.0, 1)),
    "as it is": (lambda: CoolSDRule(3, 0.5, "none", floor=0), lambda world: exponential(3, 0.5, mean=False)),
    "budget": (lambda: CoolSDRule(budget=0.15), lambda world: Affordable(0.15, world.num_tokens)),
    "large budget": (lambda: CoolSDRule(budget=9), lambda world: Affordable(9, world.num_tokens)),
}
LOSSLESS = ("rejection", "rejection, every slot", "uniform below 1")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_path_together_gives_the_law_that_a_plain_recursion_predicts_and_the_meter_bounds_its_distance(world, rule):
    target, draft = WORLDS[world]
    make, judge = RULES[rule]
    for window in (3,) if rule in LOSSLESS else (2, 4):
        law, means = measured(make, target, draft, window)
        # a budget leaves 1e-13 of every slot's allowance
        assert total_variation(law, predicted(target, draft, window, judge(target))) < 1e-12
        cost = total_variation(law, target.law())
        assert cost <= means.changed + 1e-12
        if rule in LOSSLESS or world in ("right guesses", "one id"):
            assert cost < 1e-12 and means.changed < 1e-12
        assert bool((law[target.law() == 0] == 0).all()), "an id that the target excludes is never emitted"
        if world == "right guesses" and rule not in ("uniform below 1", "published"):
            assert abs(means.accepted - min(window - 1, 3)) < 1e-12, "p = q: every guess is taken"


def test_a_window_of_one_has_no_guess_to_relax():
    target, draft = WORLDS["three ids"]
    law, means = measured(lambda: CoolSDRule(5), target, draft, 1)
    assert total_variation(law, target.law()) < 1e-14 and means.changed == 0


class LongestRun(CoolSDRule):
    """Judges on behind the first refusal, and commits up to the last guess that was accepted."""

    every_slot = True

    def verify(self, step, law, draft) -> Verdict:
        verdict = super().verify(step, law, draft)
        slots = torch.arange(1, step.positions.shape[1])
        last = torch.where(verdict.outcome[:, :-1] == 0, slots, 0).amax(1)
        verdict.count = torch.minimum(torch.maximum(verdict.count, last), step.width)
        return verdict


@pytest.mark.parametrize("omega", [1, 1.5])
def test_a_rule_that_commits_the_longest_accepted_run_is_caught(omega: float):
    target, draft = WORLDS["sharp"]
    wanted = predicted(target, draft, 3, Omegas(lambda i, length: omega))
    wrong, _ = measured(lambda: LongestRun(omega, 0), target, draft, 3)
    right, _ = measured(uniform(omega), target, draft, 3)
    assert total_variation(wrong, wanted) > 1e-3 and total_variation(right, wanted) < 1e-12
