"""UCBSpec and EXP3Spec on their own: the paper's formulas by hand, and their regret in worlds whose means are known."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from arsd.decoding import bandits
from arsd.decoding.bandits import (
    EXP3,
    UCB,
    ArmFacts,
    Bandit,
    Tally,
    confidence_radius,
    exponential_weights,
    learning_rate,
)
from arsd.decoding.costs import expected_tokens

ARMS = [(0.0, 0, 1.0), (0.5, 6, 1.05), (0.7, 6, 1.1), (0.8, 3, 1.9), (0.75, 9, 3.7)]  # chance of a guess, guesses, cost


class Uniform(Bandit):
    """What a user who knows nothing does."""

    def choose(self, draw: float = 0.0) -> int:
        return int(draw * len(self.facts))


def accepted(rng: random.Random, p: float, length: int) -> int:
    """Tokens of a round."""
    taken = 0
    while taken < length and rng.random() < p:
        taken += 1
    return taken + 1


def regret(make: Callable[[list[ArmFacts]], Bandit], rounds: int, seed: int, worlds: Sequence = (ARMS,)) -> list[float]:
    """Tokens lost against the best arm of the whole run in the seconds taken, after each round.

    The worlds follow one another, each for an equal share of the rounds.
    """
    rng = random.Random(seed)
    rates = [[expected_tokens(p, length) / cost for p, length, cost in world] for world in worlds]
    best = max(range(len(rates[0])), key=lambda arm: sum(rate[arm] for rate in rates))
    bandit, lost, out = make([ArmFacts(length, cost) for _, length, cost in worlds[0]]), 0.0, []
    for t in range(rounds):
        world = t * len(worlds) // rounds
        arm = bandit.choose(rng.random())
        p, length, cost = worlds[world][arm]
        bandit.learn(arm, [accepted(rng, p, length)], cost, max(0.0, cost - 1.0))
        lost += cost * (rates[world][best] - rates[world][arm])
        out.append(lost)
    return out


def mean_regret(make: Callable[[list[ArmFacts]], Bandit], rounds: int, worlds: Sequence = (ARMS,), runs: int = 24):
    return np.mean([regret(make, rounds, seed, worlds) for seed in range(runs)], axis=0)


# ---------------------------------------------------------------- formulas


def test_the_confidence_radius_by_hand():
    """L = 6, n = 4, t = 10, K = 3, delta = 0.5: 3 sqrt(5/16 (1 + 2 ln(3 * 100 * sqrt 5 / 0.5)))."""
    inside = 1 + 2 * (math.log(3) + math.log(100) + 0.5 * math.log(5) + math.log(2))
    assert confidence_radius(4, 10, 3, 6, delta=0.5) == pytest.approx(3 * math.sqrt(5 / 16 * inside))
    assert confidence_radius(4, 10, 3, 6, delta=0.5) == pytest.approx(6.5819, abs=1e-4)


def test_more_rounds_of_an_arm_narrow_its_own_radius_only():
    assert confidence_radius(8, 20, 3, 6) < confidence_radius(4, 20, 3, 6) < confidence_radius(4, 200, 3, 6)
    bandit = UCB([ArmFacts(6), ArmFacts(6)])
    for arm in (0, 1):
        bandit.learn(arm, [2], 1.0)
    before = [bandit.bound(arm, bandit.rounds) for arm in (0, 1)]
    for _ in range(30):
        bandit.learn(0, [2], 1.0)
    after = [bandit.bound(arm, bandit.rounds) for arm in (0, 1)]
    assert after[0] < before[0] and after[1] >= before[1], "each arm has its own count"


def test_exponential_weights_by_hand():
    assert learning_rate(4, 3) == pytest.approx(math.sqrt(math.log(3) / 12))
    assert exponential_weights([1.0, 1.0 + math.log(3)], 1.0) == pytest.approx([0.75, 0.25])
    assert exponential_weights([4000.0, 4000.0], 1.0) == [0.5, 0.5], "no overflow"


def test_with_equal_costs_the_algorithms_are_the_papers():
    """UCB's index is mean Y + cr; the loss of EXP3 is (L + 1 - Y) / (L p), added to the arm that had the round."""
    ucb = UCB([ArmFacts(9), ArmFacts(9)], clock=False)
    for y in (3, 4):
        ucb.learn(0, [y])
    ucb.learn(1, [9])
    assert ucb.bound(0, ucb.rounds) == pytest.approx(min(10, 3.5 + confidence_radius(2, 4, 2, 9)))
    narrow = UCB(ucb.facts, ucb.tally, scale=0.1, clock=False)
    assert narrow.bound(0, narrow.rounds) == pytest.approx(3.5 + 0.1 * confidence_radius(2, 4, 2, 9))
    exp3 = EXP3([ArmFacts(4)] * 3, clock=False)
    assert exp3.probabilities() == pytest.approx([1 / 3] * 3)
    arm = exp3.choose(0.5)
    exp3.learn(arm, [2])
    assert arm == 1 and exp3.tally.losses == pytest.approx([0, (5 - 2) / 4 * 3, 0])
    rate = math.sqrt(math.log(3) / (2 * 3))
    weight = math.exp(-rate * 2.25)
    assert exp3.probabilities() == pytest.approx([1 / (2 + weight), weight / (2 + weight), 1 / (2 + weight)])


def test_draws_follow_the_probabilities():
    exp3 = EXP3([ArmFacts(4)] * 3)
    exp3.tally.losses[:] = [0.0, 3.0, 1.0]
    expected = exp3.probabilities()
    shares = np.bincount([exp3.choose((i + 0.5) / 1000) for i in range(1000)], minlength=3) / 1000
    assert shares == pytest.approx(expected, abs=2e-3) and exp3.choose(1.0) == 2


def test_a_longer_block_shows_what_a_shorter_one_would_have_got():
    """Y(g) = min(m, g) + 1, and the time of the guesses that were not made. A longer arm learns nothing."""
    facts = [ArmFacts(0), ArmFacts(3, 2.0, 7), ArmFacts(5, 2.5, 7), ArmFacts(9, 4.0, 7), ArmFacts(5, 2.0, 8)]
    bandit = UCB(facts)
    for counts in ([8, 2, 5], [8, 2, 5]):  # the first round of an arm is not timed
        bandit.learn(2, counts, seconds=12.0, drafting=10.0)
    tally = bandit.tally
    assert tally.seen == [0, 2, 2, 0, 0] and tally.pulls == [0, 0, 2, 0, 0]
    assert tally.tokens == pytest.approx([0, 2 * (4 + 2 + 4) / 3, 2 * (6 + 2 + 5) / 3, 0, 0])
    assert tally.seconds == pytest.approx([0, 10.0 * 3 / 5 + 2.0, 12.0, 0, 0]) and tally.timed == [0, 1, 1, 0, 0]
    exp3 = EXP3(facts, clock=False)
    exp3._drawn_from = [0.1, 0.2, 0.3, 0.4, 0.0]
    exp3.learn(3, [10])
    shown = [exp3.loss(arm, tokens) for arm, tokens in ((1, 4), (2, 6), (3, 10))]
    assert exp3.tally.losses[1:4] == pytest.approx([shown[0] / 0.9, shown[1] / 0.7, shown[2] / 0.4])


def test_rates_are_ratios_of_sums_and_begin_at_the_cost_model():
    bandit = UCB([ArmFacts(4, 1.0), ArmFacts(4, 3.0)])
    assert bandit.costs()[1] == 3 * bandit.costs()[0]
    bandit.learn(0, [1], 99.0)  # a cold start
    for seconds in (0.5, 0.7, 0.6):
        bandit.learn(0, [2], seconds)
    assert bandit.costs()[0] == pytest.approx((1.8 + 0.6) / 4) and bandit.costs()[1] == pytest.approx(1.8)
    assert bandit.mean_tokens(0) == 7 / 4
    bandit.learn(0, [2], 500.0)  # another program had the machine
    assert bandit.costs()[0] == pytest.approx((1.8 + 4 * 0.6 + bandit.costs()[1] / 3) / 5, rel=0.2)
    fixed = UCB(bandit.facts, clock=False)
    fixed.learn(1, [2], 1e9)
    fixed.learn(1, [2], 1e9)
    assert fixed.costs()[1] == 3.0, "without a clock the costs are the model's"


def test_sums_fade():
    tally = Tally(2)
    bandit = UCB([ArmFacts(4), ArmFacts(4)], tally)
    for _ in range(10):
        bandit.learn(0, [5], 1.0)
    tally.discount(0.5)
    assert (tally.seen[0], tally.tokens[0], tally.pulls[0], tally.timed[0]) == (5, 25, 5, 4.5) and bandit.mean_tokens(0) == 5
    bandit.learn(0, [1], 1.0)
    assert bandit.mean_tokens(0) == 26 / 6
    fading = UCB([ArmFacts(4), ArmFacts(4)], fade=0.9)
    fading.learn(0, [3, 5])
    fading.learn(1, [2])
    assert fading.tally.seen == pytest.approx([0.9**2, 1.0]), "with every token"


def test_a_leader_that_turns_bad_is_left_soon_when_rounds_fade():
    """The best arm of 300 rounds is worthless afterwards."""

    def stays(fade: float) -> int:
        rng, bandit, pulls = random.Random(0), UCB([ArmFacts(0), ArmFacts(5), ArmFacts(5)], None, 0.1, fade), 0
        for t in range(600):
            arm = bandit.choose()
            p = (0.0, 0.4, 0.9 if t < 300 else 0.0)[arm]
            bandit.learn(arm, [accepted(rng, p, (0, 5, 5)[arm])], 1.0)
            pulls += arm == 2 and t >= 300
        return pulls

    assert stays(0.98) < 120 and stays(1.0) > 200


def test_rounds_that_have_faded_altogether_are_no_error():
    bandit = UCB([ArmFacts(4), ArmFacts(4)], None, 0.1, 0.5)
    for arm in (0, 1, 0, 1, *[0] * 3000):
        bandit.learn(arm, [2], 1.0)
        bandit.choose()
    assert bandit.choose() == 1


def test_a_pass_that_committed_nothing_teaches_nothing():
    bandit = UCB([ArmFacts(4)])
    bandit.learn(0, [], 1.0)
    assert bandit.tally.seen == [0] and bandit.rounds == 1


def test_the_first_arm_is_the_most_promising_by_the_cost_model():
    facts = [ArmFacts(0), ArmFacts(6, 9.0), ArmFacts(6, 1.5), ArmFacts(2, 1.0)]
    for clock, expected in ((False, [3, 2, 0, 1]), (True, [3, 2, 0, 1, 3, 2, 0, 1])):
        bandit, order = UCB(facts, clock=clock), []
        for _ in expected:
            order.append(bandit.choose())
            bandit.learn(order[-1], [1], 1.0)
        assert order == expected


# ---------------------------------------------------------------- regret


@pytest.mark.parametrize(("scale", "share"), [(0.2, 0.02), (1.0, 0.08)])
def test_the_regret_of_ucb_grows_like_a_logarithm(scale: float, share: float):
    """Equal factors of time add equally much, where uniform choice loses four times as much; a line in log t fits."""
    lost = mean_regret(lambda facts: UCB(facts, scale=scale), 6400)
    first, second, third = (lost[4 * t - 1] - lost[t - 1] for t in (100, 400, 1600))
    assert 0 < third < 2 * second and second < 2 * first + 3
    assert lost[1599] < share * mean_regret(Uniform, 1600, runs=4)[-1]
    times = np.arange(400, 6400)
    slope, start = np.polyfit(np.log(times), lost[400:], 1)
    assert np.abs(lost[400:] - (slope * np.log(times) + start)).max() < 0.06 * lost[-1]


def test_the_regret_of_exp3_grows_like_a_root():
    lost = mean_regret(EXP3, 3200)
    power = np.polyfit(np.log(np.arange(200, 3200)), np.log(lost[200:]), 1)[0]
    assert 0.3 < power < 0.8, power
    assert lost[-1] < 0.3 * mean_regret(Uniform, 3200, runs=4)[-1]


def test_both_lose_less_than_uniform_choice_in_a_single_answer():
    uniform = mean_regret(Uniform, 40, runs=200)[-1]
    assert mean_regret(lambda facts: UCB(facts, scale=0.2), 40, runs=200)[-1] < 0.4 * uniform
    assert mean_regret(EXP3, 40, runs=200)[-1] < 0.95 * uniform


def test_a_world_that_turns_against_the_leader_is_survived():
    """The best arm of the first third is worthless afterwards; regret is against the best arm of the whole run."""
    before = [(0.0, 0, 1.0), (0.3, 5, 1.0), (0.9, 5, 1.0)]
    after = [(0.0, 0, 1.0), (0.8, 5, 1.0), (0.0, 5, 1.0)]
    worlds = (before, after, after)
    uniform = mean_regret(Uniform, 3000, worlds)
    lost = mean_regret(EXP3, 3000, worlds)
    assert lost[-1] < 0.5 * uniform[-1]
    tail = [lost[-1] - lost[-600], uniform[-1] - uniform[-600]]
    assert tail[0] < 0.5 * tail[1], "it has changed its mind"


def test_the_guarantee_of_exp3_holds():
    """Reg <= 2 L sqrt(len K log K) in rounds; here in tokens per round, with equal costs."""
    world = [(0.2, 4, 1.0), (0.5, 4, 1.0), (0.8, 4, 1.0)]
    rounds = 500
    lost = mean_regret(lambda facts: EXP3(facts, clock=False), rounds, (world,))[-1]
    assert lost < 2 * 4 * math.sqrt(rounds * 3 * math.log(3))


def test_a_shared_drafter_learns_faster():
    """Four lengths of one drafter: the rounds of the longest tell of all."""

    def lost(drafter: int) -> float:
        facts = [ArmFacts(length, drafter=drafter) for length in (1, 2, 4, 8)]
        world = [(0.55, length, 1 + 0.25 * length) for length in (1, 2, 4, 8)]
        return float(mean_regret(lambda _: UCB(facts, scale=0.2), 300, (world,))[-1])

    assert lost(0) < 0.75 * lost(-1)


def test_an_arm_that_is_always_wrong_is_abandoned():
    rng, bandit = random.Random(0), UCB([ArmFacts(0), ArmFacts(6), ArmFacts(6)], scale=0.2)
    pulls = [0, 0, 0]
    for _ in range(400):
        arm = bandit.choose()
        pulls[arm] += 1
        bandit.learn(arm, [accepted(rng, (0, 0.0, 0.7)[arm], (0, 6, 6)[arm])], (1.0, 1.3, 1.3)[arm])
    assert pulls[1] < 25 and pulls[2] > 350, pulls


def test_mutants_of_the_radius_are_seen(monkeypatch):
    """A bonus with the count of all rounds in the place of the arm's own is greedy: it stays with a bad first impression."""

    def total(pulls, rounds, arms, length, delta=bandits.DELTA):
        return confidence_radius(rounds, rounds, arms, length, delta)

    def found(seed: int) -> bool:
        rng, bandit = random.Random(seed), UCB([ArmFacts(4), ArmFacts(4)], scale=0.2, clock=False)
        for _ in range(300):
            arm = bandit.choose()
            bandit.learn(arm, [accepted(rng, (0.45, 0.6)[arm], 4)])
        return bandit.tally.pulls[1] > 150

    good = statistics.mean(found(seed) for seed in range(60))
    monkeypatch.setattr(bandits, "confidence_radius", total)
    assert good > statistics.mean(found(seed) for seed in range(60)) + 0.08 and good > 0.85
