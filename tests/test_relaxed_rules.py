"""Budgets hold on every path; relaxed rules respect support, noise and promises; the margin; SJD with another acceptance."""

from __future__ import annotations

import json
from fractions import Fraction as F

import pytest
import torch
from chain_reference import Judge, predicted
from test_relaxed import WORLDS, Affordable, P, measured
from tiny_pipeline import one_clear_line

import arsd
from arsd.decoding import SJD, CounterNoise, Grammar, Setting, build_parts
from arsd.decoding.relaxed import CoolSDRule, MarginRule
from arsd.decoding.rules import ChainRule, RejectionSampling, Slots
from arsd.errors import NonFiniteLogitsError, StrategyError
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.tables import HashTarget, World, chi_square_z, law_z, run, sample, total_variation
from arsd.exactness.worlds import picture, picture_grammar, plain_picture

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


RELAXED = ["cool-sd", "cool-sd-published", "cool-sd:budget=0.5", "lantern:k=3", "lantern-plus-plus:k=3", "grouped", "margin"]


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
