"""What the benchmarks say of relaxed acceptance: the arithmetic, and the law behind it, exactly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from acceptance import Figures, at_equal_cost, expected_tokens, refusals_say
from chain_reference import fractions, world_of

from arsd.decoding import Outcome
from arsd.decoding.lantern import LanternPlusPlusRule
from arsd.decoding.relaxed import CoolSDRule
from arsd.decoding.rules import RejectionSampling
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.tape import push_forward

P, Q = fractions("1/2 3/10 3/20 1/20"), fractions("1/5 1/5 3/10 3/10")  # alpha0 = 3/5
SAME = world_of([P], [P] * 4, [P] * 16), world_of([Q], [Q] * 4, [Q] * 16)  # one law everywhere


def bound_lantern() -> LanternPlusPlusRule:
    rule = LanternPlusPlusRule(k=2, lam=5, residual="optimal")
    rule.bind(SimpleNamespace(codebook=torch.arange(4.0)[:, None], grammar=SAME[0].grammar(), device=torch.device("cpu")))
    rule.bind = lambda setting: None
    return rule


RULES = {
    "lossless": RejectionSampling,
    "clamped": lambda: CoolSDRule(1.5),
    "uniform": lambda: CoolSDRule(2, nu=0),
    "budget": lambda: CoolSDRule(budget=0.3),
    "lantern++": bound_lantern,
}


@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_every_unit_of_total_variation_spares_exactly_one_refusal_whatever_the_rule(rule: str, window: int):
    """E[refusals] = (1 - alpha0) E[judged guesses] - E[changed], over every path of the production sampler."""
    totals = {"refused": 0.0, "judged": 0.0, "changed": 0.0}

    def add(result, weight) -> None:
        for seen in result.trace:
            taken = torch.arange(seen.outcome.shape[1]) < torch.tensor(seen.counts)[:, None]
            judged = taken & (seen.outcome != int(Outcome.BONUS))
            totals["judged"] += float((judged.sum(1) * weight).sum())
            totals["refused"] += float(((judged & (seen.outcome == int(Outcome.RESAMPLED))).sum(1) * weight).sum())
        totals["changed"] += float((torch.tensor(result.stats.expected_changed_tokens, dtype=torch.float64) * weight).sum())

    push_forward(SAME[0], rule_under_table(RULES[rule], SAME[1], window), each=add, trace=True)
    assert totals["refused"] == pytest.approx(0.4 * totals["judged"] - totals["changed"], abs=1e-12)
    assert (totals["changed"] > 0.05) == (rule != "lossless") and totals["judged"] > 1


def figures(passes, changed, full: int = 0, length: int = 2) -> Figures:
    return Figures(np.full(len(passes), 100), np.array(passes), np.array(changed, dtype=float), {length + 1: full, 1: 1})


def test_the_lossless_chain_predicts_itself_and_a_changed_token_a_pass():
    lossless = figures([40, 60], [0, 0], full=10)
    assert refusals_say(lossless, lossless, 2) == pytest.approx(lossless.tokens_per_pass)
    relaxed = figures([35, 55], [5, 5], full=10)
    assert refusals_say(lossless, relaxed, 2) == pytest.approx(relaxed.tokens_per_pass)
    assert expected_tokens(np.array([0.5, 0.5])) == 1.75


def test_at_equal_cost_the_rival_is_held_against_the_curve_between_its_points():
    rng = np.random.default_rng(1)
    base = rng.integers(40, 60, size=50)
    curve = [figures(base - 2 * step, np.full(50, 3.0 * step)) for step in (0, 2, 1)]  # in any order
    on_it = figures(base - 3, np.full(50, 4.5))
    assert at_equal_cost(curve, on_it) == pytest.approx((1, 1, 1))
    ratio, low, high = at_equal_cost(curve, figures(base - rng.integers(0, 4, size=50), np.full(50, 4.5)))
    assert 1 < low < ratio < high < 1.1
    assert at_equal_cost(curve, figures(base - 4, np.full(50, 99.0)))[0] == pytest.approx(1)
