"""COOL-SD gives exactly the laws that its formulas predict, costs what it reports, and never spends more than its budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction as F
from functools import partial

import pytest
import torch
from chain_reference import Judge, Means, Omegas, Virtual, fractions, predicted, world_of
from tiny_pipeline import one_clear_line

import arsd
from arsd.decoding import SJD, CounterNoise, Grammar, LawConfig, Setting, Verdict, build_parts
from arsd.decoding.relaxed import CoolSDRule, MarginRule
from arsd.decoding.rules import ChainRule, RejectionSampling, Slots
from arsd.errors import NonFiniteLogitsError, StrategyError
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.tables import HashTarget, World, chi_square_z, law_z, run, sample, total_variation
from arsd.exactness.tape import push_forward
from arsd.exactness.worlds import picture, picture_grammar, plain_picture

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
    return lambda: CoolSDRule(delta=omega, nu=0)


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
    law, means = measured(lambda: rule(delta=float(F(omega)), nu=0), ONE, ONE_Q, 2)
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
    schedule = CoolSDRule(delta).schedule(length)
    assert [f"{x:.4f}" for x in schedule.tolist()] == SCHEDULES[length, delta].split()
    assert abs(float(schedule.mean()) - delta) < 1e-14
    clamped = CoolSDRule(delta, floor=1.0).schedule(length)
    assert torch.equal(clamped, schedule.clamp_min(1))


def test_schedules_without_normalisation_without_decay_of_no_length_and_very_long():
    assert torch.equal(
        CoolSDRule(2, normalize="none").schedule(3), 2 * (-0.7 * torch.arange(3.0, dtype=torch.float64)).exp()
    )
    assert CoolSDRule(1.3, nu=0).schedule(4).tolist() == [1.3] * 4 and CoolSDRule(1, nu=0).schedule(3).tolist() == [1] * 3
    assert CoolSDRule().schedule(0).shape == (0,)
    steep = CoolSDRule(1.1, nu=50).schedule(3000)
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
    "cool-sd": (lambda: CoolSDRule(1.5), lambda world: exponential(1.5, 0.7)),
    "clamped": (lambda: CoolSDRule(1.5, 1.0, floor=1), lambda world: exponential(1.5, 1.0, 1)),
    "as it is": (lambda: CoolSDRule(3, 0.5, "none"), lambda world: exponential(3, 0.5, mean=False)),
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
        if world == "right guesses" and rule not in ("uniform below 1", "cool-sd"):
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


# ---------------------------------------------------------------- the budget


@pytest.mark.parametrize("budget", [0, 0.01, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("world", ["three ids", "sharp", "two ids", "one-hot guesses"])
def test_no_path_spends_more_than_the_budget_and_the_law_stays_within_it(world: str, budget: float):
    target, draft = WORLDS[world]
    for window in (2, 4):
        law, means = measured(lambda: CoolSDRule(budget=budget), target, draft, window)
        assert means.most <= budget and total_variation(law, target.law()) <= means.changed + 1e-12
    if budget == 0.1:
        assert means.most > 0.09, "and it is used"


class LooksAtTheGuess(CoolSDRule):
    """Spends only where the guess needs it: the slot's cost is then another one than it says."""

    def allowances(self, step, slots):
        p, q = (x[..., 0] for x in slots.masses(slots.guesses[..., None]))
        return torch.where(p < q, super().allowances(step, slots), 0.0)


class LooksAhead(CoolSDRule):
    """Relaxes the first guess where the second is a likely one."""

    def allowances(self, step, slots):
        p, q = (x[..., 0] for x in slots.masses(slots.guesses[..., None]))
        return super().allowances(step, slots) * (p > q).roll(-1, 1)


@pytest.mark.parametrize("mutant", [LooksAtTheGuess, LooksAhead])
def test_an_allowance_that_looks_at_the_guess_or_beyond_is_caught(mutant: type):
    target, draft = WORLDS["sharp"]
    wanted = predicted(target, draft, 3, Affordable(0.3, target.num_tokens))
    law, means = measured(lambda: mutant(budget=0.3), target, draft, 3)
    right, _ = measured(lambda: CoolSDRule(budget=0.3), target, draft, 3)
    assert total_variation(law, wanted) > 1e-6 and total_variation(right, wanted) < 1e-12


def test_each_picture_has_a_budget_of_its_own_in_batches_queues_and_mixed_batches():
    def build(setting: Setting):
        return SJD(window=6, acceptance="cool-sd:budget=1.5").build(setting)

    def mixed(setting: Setting):
        names = ["cool-sd:budget=1.5", "cool-sd:budget=0.2", "rejection"]
        decoders = [SJD(window=4 + i, acceptance=name) for i, name in enumerate(names)]
        return build_parts([decoders[i % 3] for i in range(5)], setting)

    together, grammar = picture(build, "top-k", grammar=picture_grammar()), picture_grammar()
    assert torch.equal(picture(build, "top-k", grammar=grammar, batch=2), together)
    assert torch.equal(torch.cat([picture(build, "top-k", [row], grammar) for row in range(5)]), together)
    apart, queued = picture(mixed), picture(mixed, batch=2)
    assert torch.equal(apart, queued)
    keys = {"seeds": [1] * 5, "images": list(range(5)), "pictures": 5, "row_length": 9}
    for batch in (5, 2):
        spent = run(HashTarget(12, 45, batch), parts=mixed, **keys).stats.expected_changed_tokens
        for i, cost in enumerate(spent):
            assert 0.9 * (1.5, 0.2, 0)[i % 3] <= cost <= (1.5, 0.2, 0)[i % 3]


# ---------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("law", ["plain", "guidance", "top-k", "cold"])
def test_no_relaxation_is_speculative_sampling_bit_for_bit(law: str):
    plain = picture(arsd.parse_strategy("sjd:window=7,coupling=independent").build, law)
    for rule in ("cool-sd:delta=1:nu=0", "cool-sd:budget=0", "rejection"):
        assert torch.equal(picture(SJD(window=7, acceptance=rule).build, law), plain), rule
    assert not torch.equal(picture(SJD(window=7, acceptance="cool-sd:delta=3").build, "plain"), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_omega_is_at_least_one_the_residual_is_that_of_speculative_sampling(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(3 * torch.randn(5, 4, 50, generator=generator), -1).to(dtype) for _ in range(2))
    slots = Slots(p, q, torch.zeros(5, 4, dtype=torch.int64), torch.ones(5, 4, dtype=torch.bool))
    vanilla = RejectionSampling().residual(slots)
    for omega in (1.0, 1.7, 1e30):
        slots.omega = torch.full((5, 4), omega, dtype=torch.float64)
        assert torch.equal(CoolSDRule().residual(slots), vanilla)
    slots.omega = torch.full((5, 4), 0.5, dtype=torch.float64)
    assert not torch.equal(CoolSDRule().residual(slots), vanilla)


RELAXED = ["cool-sd", "cool-sd:budget=0.5", "lantern:k=3", "lantern-plus-plus:k=3", "grouped", "margin"]


@pytest.mark.parametrize("rule", RELAXED)
def test_broken_logits_are_an_error_and_no_picture(rule: str):
    target = HashTarget(12, 45, 2)
    target.table[:, ::3] = torch.nan
    with pytest.raises(NonFiniteLogitsError):
        run(target, SJD(window=6, acceptance=rule))


@pytest.mark.parametrize("rule", RELAXED)
@pytest.mark.parametrize("law", ["temperature 0", "top-k"])
def test_relaxed_rules_never_leave_the_support(rule: str, law: str):
    tokens = picture(SJD(window=6, acceptance=rule).build, law, grammar=picture_grammar())
    if law == "temperature 0":
        assert torch.equal(tokens, plain_picture(law, grammar=picture_grammar()))
    assert bool((tokens[:, 8::9] == 11).all()) and not bool((tokens[:, :8] % 2 == 0).any())


def test_float32_laws_give_the_same_picture_as_float64_ones_here():
    class Single(HashTarget):
        def forward(self, *args):
            return super().forward(*args).float()

    for rule in ("cool-sd:delta=2", "cool-sd:budget=3", "cool-sd:delta=1e25"):
        keys = {"seeds": [1, 2], "images": [0, 0]}
        single, double = (run(kind(12, 45, 2), SJD(window=6, acceptance=rule), **keys) for kind in (Single, HashTarget))
        assert torch.equal(single.tokens, double.tokens)
        costs = zip(single.stats.expected_changed_tokens, double.stats.expected_changed_tokens, strict=True)
        assert all(abs(a - b) < 1e-4 for a, b in costs)


# ---------------------------------------------------------------- the Gumbel margin


class Margin(Judge):
    """Of a guess d that is independent of G: d with omega p(d) / Z, any other x with p(x) / Z."""

    def __init__(self, omega: float) -> None:
        self.omega = omega

    def accept(self, p, q, i, length, n, spent):
        return [self.omega * a / (1 + (self.omega - 1) * a) for a in p]

    def residual(self, p, q, f, d):
        return [0 if x == d else a / (1 - p[d]) for x, a in enumerate(p)]


def test_margin_law_of_one_slot_in_fractions():
    judge, point = Margin(F(3)), [F(0), F(0), F(1), F(0)]
    f = judge.accept(P, point, 0, 1, 0, 0)
    z = 1 + 2 * P[2]
    assert judge.slot_law(P, point, f) == [P[0] / z, P[1] / z, 3 * P[2] / z, P[3] / z]


@pytest.mark.parametrize("omega", [1.5, 4.0])
def test_margin_samples_have_the_predicted_law_under_independent_guesses(omega: float):
    """100,000 sequences, alarm at z > 5; the same samples against plain AR's law are far beyond it."""
    target, draft = World(3, 3, 1), World(3, 3, 2)
    tokens = sample(target, rule_under_table(lambda: MarginRule(omega), draft, 3), 100_000)
    wanted = predicted(target, draft, 3, Margin(omega))
    assert abs(chi_square_z(target.number(tokens), wanted)) < 5 and law_z(target, tokens) > 20
    count = 20_000
    noise = CounterNoise(list(range(count)), [0] * count)
    changed = target.decode(count, rule_under_table(lambda: MarginRule(omega), draft, 3), noise).stats
    mean = sum(changed.expected_changed_tokens) / count
    assert mean > total_variation(wanted, target.law()) - 0.01


def test_a_picture_in_which_the_margin_changed_nothing_is_plain_ars():
    keys = {"seeds": list(range(40)), "images": [0] * 40}
    plain = run(HashTarget(12, 30, 40), arsd.Autoregressive(), **keys).tokens
    for strategy in (SJD(window=6, acceptance="margin:omega=1.2"), SJD(6, "independent", acceptance="margin:omega=1.2")):
        result = run(HashTarget(12, 30, 40), strategy, **keys)
        unchanged = torch.tensor(result.stats.expected_changed_tokens) == 0
        assert 0 < int(unchanged.sum()) < 40
        assert torch.equal((result.tokens == plain).all(1), unchanged)
    for omega in (1, 0.3):
        assert torch.equal(
            run(HashTarget(12, 30, 40), SJD(window=6, acceptance=f"margin:omega={omega}"), **keys).tokens, plain
        )


def test_margin_law_is_another_one_under_coupled_guesses():
    target, draft = World(3, 3, 1), World(3, 3, 2)
    tokens = sample(target, SJD(window=3, acceptance="margin:omega=4").build, 50_000)
    assert law_z(target, tokens) > 20 and chi_square_z(target.number(tokens), predicted(target, draft, 3, Margin(4))) > 20


# ---------------------------------------------------------------- SJD with another acceptance


def test_sjd_promises_what_its_rule_does_and_goes_through_text_and_json(tmp_path):
    for text, promises in {
        "sjd:window=8,acceptance=cool-sd:delta=2:nu=0.5": (False, False),
        "sjd:acceptance=seed-exact": (True, True),
        "sjd:coupling=maximal,acceptance=rejection:every_slot=true": (True, False),
    }.items():
        strategy = arsd.parse_strategy(text)
        assert str(strategy) == text and (strategy.lossless, strategy.seed_exact) == promises
        strategy.save_pretrained(tmp_path)
        again = SJD.from_pretrained(tmp_path)
        assert str(again) == text and json.loads((tmp_path / "decoder_config.json").read_text())["acceptance"] in text
    named = SJD(window=8, acceptance=arsd.Speculative(rule="cool-sd:delta=2"))
    assert str(named) == "sjd:window=8,acceptance=cool-sd:delta=2" and not named.lossless


def test_sjd_picks_a_coupling_that_knows_its_law():
    same_as = {
        SJD(window=6, acceptance="rejection"): "sjd:window=6,coupling=independent",
        SJD(6, "gumbel-rejection", acceptance="rejection"): "sjd:window=6,coupling=gumbel-rejection",
        SJD(6, "maximal", acceptance="rejection:every_slot=true"): "sjd:window=6,coupling=maximal",
        SJD(window=6, acceptance="seed-exact"): "sjd:window=6",
    }
    for ours, theirs in same_as.items():
        assert torch.equal(picture(ours.build), picture(arsd.parse_strategy(theirs).build)), theirs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("warp", "unknown rule 'warp'"),
        ("3", "unknown rule 3"),
        ("cool-sd:speed=1", "unexpected keyword argument 'speed'"),
        ("cool-sd:delta=0", "delta must be a number > 0, not 0"),
        ("cool-sd:delta=-1", "delta must be a number > 0"),
        ("cool-sd:delta=inf", "delta must be a number > 0"),
        ("cool-sd:delta=fast", "delta must be a number > 0, not 'fast'"),
        ("cool-sd:nu=nan", "nu must be a number"),
        ("cool-sd:floor=-1", "floor must be a number >= 0"),
        ("cool-sd:normalize=max", "unknown normalize 'max': choose from mean, none"),
        ("cool-sd:budget=-0.5", "budget must be a number >= 0"),
        ("margin:omega=0", "omega must be a number > 0"),
        ("margin:omega=true", "omega must be a number > 0"),
        ("lantern:k=0", "k must be a whole number >= 1"),
        ("lantern:k=2.5", "k must be a whole number >= 1"),
        ("lantern:delta=-0.1", "delta must be a number >= 0"),
        ("lantern:residual=vanilla", "unknown residual 'vanilla': choose from own, optimal"),
        ("lantern-plus-plus:lam=0.5", "lam must be a number >= 1"),
        ("grouped:group=0", "group must be a whole number >= 1"),
        ("grouped:radius=-1", "radius must be a number >= 0"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_in_one_line(text: str, says: str):
    for strategy in ("sjd:acceptance=", "speculative:rule="):
        with pytest.raises(StrategyError) as error:
            arsd.parse_strategy(strategy + text)
        one_clear_line(error.value, says)


def test_acceptances_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(StrategyError) as error:
        SJD(coupling="maximal", acceptance="cool-sd")
    one_clear_line(error.value, "coupling=maximal needs a rule that judges every slot, which 'cool-sd' does not")
    with pytest.raises(StrategyError) as error:
        SJD(acceptance=arsd.Autoregressive())
    one_clear_line(error.value, "acceptance must name a rule, and 'ar' has none")
    setting = Setting(1, 4, 2, Grammar(4, 3), CounterNoise([0], [0]), torch.device("cpu"))
    for rule, codes, says in (
        ("lantern:k=2", None, "rule 'lantern' compares code vectors, and this model gives no codebook"),
        ("lantern-plus-plus:k=2", torch.zeros(5, 2), "needs a code for each of 3 ids, not 5 codes"),
        ("lantern:k=3", torch.zeros(3, 2), "k must be less than the 3 codes, not 3"),
        ("grouped", None, "rule 'grouped' compares code vectors"),
    ):
        setting.codebook = codes
        with pytest.raises(StrategyError) as error:
            SJD(acceptance=rule).build(setting)
        one_clear_line(error.value, says)


def test_a_rule_of_ones_own_needs_only_the_mass_that_it_delivers():
    class Half(ChainRule):
        """Takes half of what speculative sampling takes: slower, and lossless."""

        def delivered(self, slots, ids=None):
            return super().delivered(slots, ids) / 2

    target, draft = WORLDS["three ids"]
    law, means = measured(Half, target, draft, 3)
    assert total_variation(law, target.law()) < 1e-12 and means.changed < 1e-12
