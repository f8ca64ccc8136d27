"""LANTERN, LANTERN++ and grouped acceptance give exactly the laws that their definitions predict, and a meter that holds."""

from __future__ import annotations

import math
from fractions import Fraction as F

import pytest
import torch
from chain_reference import Judge, Means, forecast, fractions, normalised, world_of

from arsd.decoding import SJD, Grammar, LawConfig, Setting
from arsd.decoding.grouped import GroupedRule
from arsd.decoding.lantern import LanternPlusPlusRule, LanternRule, neighbour_table
from arsd.decoding.relaxed import CoolSDRule
from arsd.decoding.rules import RejectionSampling, Slots
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.tables import World, random_codebook, total_variation
from arsd.exactness.tape import push_forward
from arsd.exactness.worlds import picture

P, Q = fractions("1/2 3/10 3/20 1/20"), fractions("1/5 1/5 3/10 3/10")
ONE, ONE_Q = world_of([P]), world_of([Q])
LINE = torch.tensor([[0.0], [1.0], [2.2], [3.5]])
PAIRS = torch.tensor([[0.0], [0.1], [10.0], [10.1]])


def measured(make, target: World, draft: World, window: int, codes: torch.Tensor | None = None):
    means = Means()
    given = {} if codes is None else {"draft": {"codebook": codes}}
    law, _ = push_forward(target, rule_under_table(make, draft, window), each=means, trace=True, **given)
    assert abs(float(law.sum()) - 1) < 1e-12
    return law, means


def same(law: torch.Tensor, numbers) -> bool:
    return bool((law - torch.tensor([float(x) for x in numbers], dtype=torch.float64)).abs().max() < 1e-15)


# ---------------------------------------------------------------- the definitions, in plain numbers


class Lantern(Judge):
    """``neighbours`` of every id, nearest first, of which k are used; ``bound(p(x))`` on their mass."""

    def __init__(self, neighbours, k: int, bound, own: bool = True) -> None:
        self.neighbours, self.k, self.bound, self.own = neighbours, k, bound, own

    def run(self, p, x: int) -> list[int]:
        taken: list[int] = []
        for y in self.neighbours[x][: self.k]:
            if p[x] == 0 or sum(p[z] for z in (*taken, y)) > self.bound(p[x]):
                break
            taken.append(y)
        return taken

    def accept(self, p, q, i, length, n, spent):
        whole = [p[x] + sum(p[y] for y in self.run(p, x)) for x in range(len(p))]
        return [min(1, s / b) if b else 0 for s, b in zip(whole, q, strict=True)]

    def residual(self, p, q, f, d):
        if not self.own:
            return super().residual(p, q, f, d)
        run = self.run(p, d)
        surrogate = [0 if x in run else a for x, a in enumerate(p)]
        surrogate[d] = p[d] + sum(p[y] for y in run)
        return normalised([max(a - b, 0) for a, b in zip(surrogate, q, strict=True)], p)


class Grouped(Judge):
    def __init__(self, codes, group: int, spread, radius, own: bool) -> None:
        self.codes, self.group, self.spread, self.radius, self.own = codes, group, spread, radius, own

    def cluster(self, p, d: int) -> list[int]:
        ranked = sorted(range(len(p)), key=lambda x: (-p[x], x))
        size = min(self.group, len(p))
        first = min(max(ranked.index(d) - size // 2, 0), len(p) - size)

        def far(x: int) -> float:
            return sum((a - b) ** 2 for a, b in zip(self.codes[x], self.codes[d], strict=True))

        near = [x for x in ranked[first : first + size] if abs(p[x] - p[d]) < self.spread and far(x) < self.radius]
        return sorted({d, *near})

    def accept(self, p, q, i, length, n, spent):
        f = []
        for d in range(len(p)):
            cluster = self.cluster(p, d)
            mass = sum(q[x] for x in cluster)
            f.append(min(1, sum(p[x] for x in cluster) / mass) if mass and p[d] else 0)
        return f

    def residual(self, p, q, f, d):
        return (
            normalised([max(a - b, 0) for a, b in zip(p, q, strict=True)], p) if self.own else super().residual(p, q, f, d)
        )


# ---------------------------------------------------------------- the toys, in rational numbers

TOYS = {  # rule: neighbours' bound, accepted, output, total variation
    "lantern 1/5": (lambda: LanternRule(2, 0.2), lambda p: F(1, 5), "3/4", "31/80 21/80 3/20 1/5", "3/20"),
    "lantern 2/5": (lambda: LanternRule(2, 0.4), lambda p: F(2, 5), "9/10", "11/40 9/40 3/10 1/5", "3/10"),
    "lantern++ 2": (lambda: LanternPlusPlusRule(2, 2), lambda p: p, "3/5", "1/2 3/10 3/20 1/20", "0"),
    "lantern++ 5": (lambda: LanternPlusPlusRule(2, 5), lambda p: 4 * p, "9/10", "11/40 9/40 3/10 1/5", "3/10"),
}


@pytest.mark.parametrize("toy", TOYS)
def test_lantern_toys_accept_and_emit_what_the_fractions_say(toy: str):
    make, bound, accepted, output, cost = TOYS[toy]
    law, means = measured(make, ONE, ONE_Q, 2, LINE)
    assert same(law, fractions(output)) and abs(means.accepted - F(accepted)) < 1e-15
    assert abs(total_variation(law, ONE.law()) - F(cost)) < 1e-15 and abs(means.changed - F(cost)) < 1e-15
    judge = Lantern([[1, 2, 3], [0, 2, 3], [1, 3, 0], [2, 1, 0]], 2, bound)
    f = judge.accept(P, Q, 0, 1, 0, 0)
    assert judge.slot_law(P, Q, f) == fractions(output) and judge.cost(P, Q, f) == F(cost)


@pytest.mark.parametrize("residual", ["own", "optimal"])
def test_group_toy_accepts_and_emits_what_the_fractions_say(residual: str):
    law, means = measured(lambda: GroupedRule(3, 1, 0.5, residual), ONE, ONE_Q, 2, PAIRS)
    output = {"own": "1/2 3/10 1/10 1/10", "optimal": "7/15 13/45 13/90 1/10"}[residual]
    assert same(law, fractions(output)) and abs(means.accepted - 0.6) < 1e-15
    assert abs(total_variation(law, ONE.law()) - 0.05) < 1e-15 and means.changed > 0.05 - 1e-15
    if residual == "optimal":
        assert abs(means.changed - 0.05) < 1e-15


# ---------------------------------------------------------------- every path

CODES = random_codebook(4).tolist()
NEAR = [sorted({0, 1, 2, 3} - {x}, key=lambda y, x=x: math.dist(CODES[x], CODES[y])) for x in range(4)]
RULES = {
    f"{name}, {residual}": (make(residual), judge(residual == "own"))
    for residual in ("own", "optimal")
    for name, make, judge in (
        (
            "lantern",
            lambda r: lambda: LanternRule(2, 0.25, r),
            lambda own: Lantern(NEAR, 2, lambda p: 0.25, own),
        ),
        (
            "lantern++",
            lambda r: lambda: LanternPlusPlusRule(3, 2.5, r),
            lambda own: Lantern(NEAR, 3, lambda p: 1.5 * p, own),
        ),
        (
            "grouped",
            lambda r: lambda: GroupedRule(3, 0.3, 3.0, r),
            lambda own: Grouped(CODES, 3, 0.3, 3.0, own),
        ),
    )
}
WORLDS = {
    "four ids": (World(4, 2, 1), World(4, 2, 2)),
    "sharp": (World(4, 2, 3, sharpness=3.0), World(4, 2, 4, sharpness=3.0)),
    "top-k of 4": (World(4, 2, 1, LawConfig(top_k=2)), World(4, 2, 2)),
    "one-hot guesses": (World(4, 2, 1), World(4, 2, 2, LawConfig(temperature=0.0))),
    "right guesses": (World(4, 2, 1), World(4, 2, 1)),
    "forced and forbidden": (World(4, 2, 1, forced={0: 2}, forbidden={1: 1}), World(4, 2, 2)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_path_together_gives_the_law_of_the_definition_and_the_meter_holds(world: str, rule: str):
    target, draft = WORLDS[world]
    make, judge = RULES[rule]
    for window in (2, 3):
        law, means = measured(make, target, draft, window)
        wanted, bill = forecast(target, draft, window, judge)
        assert total_variation(law, wanted) < 1e-12
        assert total_variation(law, target.law()) <= bill + 1e-12 and means.changed >= bill - 1e-12
        if rule.endswith("optimal"):
            assert abs(means.changed - bill) < 1e-12, "read off the guess, and yet unbiased"
        if world == "right guesses":
            assert total_variation(law, target.law()) < 1e-12 and means.changed < 1e-12
        assert bool((law[target.law() == 0] == 0).all()), "an id that the target excludes is never emitted"


def test_the_worlds_tell_the_rules_and_their_residuals_apart():
    worlds = [WORLDS[name] for name in ("four ids", "sharp")]
    laws = [[forecast(*world, 2, judge)[0] for world in worlds] for _, judge in RULES.values()]
    for i, one in enumerate(laws):
        assert all(max(map(total_variation, one, other)) > 1e-3 for other in laws[:i])


def slots(batch: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Slots:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.softmax(2 * torch.randn(batch, 3, vocab, generator=generator, dtype=dtype), -1) for _ in range(2))
    guesses = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(batch, 3)
    return Slots(p, q, guesses, torch.ones(batch, 3, dtype=torch.bool))


def bound_rule(rule, vocab: int):
    rule.bind(Setting(1, 4, 2, Grammar(4, vocab), None, torch.device("cpu"), codebook=random_codebook(vocab)))
    return rule


LARGE = {
    "lantern": LanternRule(20, 0.2, "optimal"),
    "lantern++": LanternPlusPlusRule(10, 5, "optimal"),
    "grouped": GroupedRule(10, 0.15, 1.0),
    "lantern, own": LanternRule(20, 0.2),
    "lantern++, own": LanternPlusPlusRule(10, 5),
    "grouped, own": GroupedRule(10, 0.15, 1.0, "own"),
}


@pytest.mark.parametrize("rule", LARGE)
def test_of_many_guesses_the_mean_of_the_meter_is_the_total_variation_or_above_it(rule: str):
    """4,000 guesses of one slot over 60 ids against the law itself, alarm at 5 standard errors."""
    made, one = bound_rule(LARGE[rule], 60), slots(1, 60)
    exact = (made.slot_law(one) - one.p).clamp_min(0).sum(-1)
    many = Slots(one.p.expand(4000, -1, -1), one.q.expand(4000, -1, -1), one.guesses, one.guessed.expand(4000, -1))
    flat = torch.multinomial(many.q.flatten(0, 1), 1, generator=torch.Generator().manual_seed(1))
    many.guesses = flat.view(4000, 3)
    meter = made.local_tv(many)
    error = meter.std(0) / 4000**0.5
    assert bool((meter.mean(0) > exact - 5 * error).all())
    if not made.own:
        assert bool((meter.mean(0) < exact + 5 * error).all())
    assert bool((exact > 0.01).any()) and abs(float(made.slot_law(one).sum()) - 3) < 1e-12


def test_optimal_residual_of_lantern_is_that_of_speculative_sampling():
    one = slots(4, 60)
    for rule in (LanternRule(20, 0.2, "optimal"), LanternPlusPlusRule(10, 5, "optimal")):
        made = bound_rule(rule, 60)
        assert torch.equal(made.residual(one), RejectionSampling().residual(one))
        theorem = (one.p - made.delivered(one)).clamp_min(0)
        assert torch.allclose(theorem, made.residual(one), atol=1e-15)


def test_cool_sd_with_a_uniform_omega_accepts_whatever_lantern_plus_plus_does():
    one = slots(50, 60)
    one.omega = torch.full((50, 3), 5.0, dtype=torch.float64)
    envelope = CoolSDRule().acceptance(one)
    accepted = bound_rule(LanternPlusPlusRule(10, 5), 60).acceptance(one)
    assert bool((accepted <= envelope + 1e-15).all()) and bool((accepted < envelope - 0.01).any())
    assert bool((accepted >= RejectionSampling().acceptance(slots(50, 60)) - 1e-15).all())


@pytest.mark.parametrize("rule", ["lantern:k=3:delta=0", "lantern-plus-plus:k=3:lam=1", "grouped:group=1"])
@pytest.mark.parametrize("law", ["plain", "top-k"])
def test_without_neighbours_all_of_them_are_speculative_sampling_bit_for_bit(rule: str, law: str):
    plain = picture(SJD(window=6, acceptance="rejection").build, law)
    assert torch.equal(picture(SJD(window=6, acceptance=rule).build, law), plain)


@pytest.mark.parametrize(
    "rule", ["lantern:k=4:delta=0.3", "lantern:k=4:residual=optimal", "lantern-plus-plus:k=4", "grouped"]
)
def test_pictures_depend_on_their_seed_only(rule: str):
    build = SJD(window=6, acceptance=rule).build
    together = picture(build)
    assert torch.equal(torch.cat([picture(build, rows=[row]) for row in range(5)]), together)
    assert torch.equal(picture(build, batch=2), together)
    assert not torch.equal(together, picture(SJD(window=6, acceptance="rejection").build))


# ---------------------------------------------------------------- the neighbour table


def test_neighbours_are_the_nearest_codes_without_the_code_itself_and_ties_go_by_id():
    assert neighbour_table(LINE, 3).tolist() == [[1, 2, 3], [0, 2, 3], [1, 3, 0], [2, 1, 0]]
    same_place = torch.zeros(5, 3)
    assert neighbour_table(same_place, 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    for codes, k in ((grid, 7), (torch.nn.functional.normalize(torch.randn(300, 8), dim=1), 40)):
        distance = (codes[:, None].double() - codes.double()).square().sum(-1).fill_diagonal_(torch.inf)
        assert torch.equal(neighbour_table(codes, k), distance.argsort(dim=1, stable=True)[:, :k].int())


def test_a_table_is_made_once_for_a_codebook_whoever_holds_it():
    codes = torch.randn(50, 4)
    assert neighbour_table(codes, 5) is neighbour_table(codes.clone(), 5)
    assert neighbour_table(codes, 6) is not neighbour_table(codes, 5)
    assert not torch.equal(neighbour_table(codes * torch.tensor([1, 1, 1, 9]), 5), neighbour_table(codes, 5))
