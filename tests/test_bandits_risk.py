"""What bandits may lose against plain AR: the purse, the first rounds, machines that slow down."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from test_bandits import Uniform, accepted

from arsd.decoding import bandits
from arsd.decoding.bandits import EXP3, UCB, UCBV, ArmFacts, Bandit


def spent(bandit: Bandit, world: Sequence[tuple[float, int, float]], rounds: int, seed: int) -> tuple[int, float]:
    """Tokens of so many rounds and what they cost; ``world``: chance, length and cost of each arm."""
    rng, tokens, cost = random.Random(seed), 0, 0.0
    for _ in range(rounds):
        arm = bandit.choose(rng.random())
        p, length, seconds = world[arm]
        got = accepted(rng, p, length)
        bandit.learn(arm, [got], seconds)
        tokens, cost = tokens + got, cost + seconds
    return tokens, cost


WORTHLESS = ((0.0, 0, 1.0), (0.1, 4, 3.0), (0.3, 8, 9.0), (0.2, 2, 1.6))


@pytest.mark.parametrize("make", [UCB, UCBV, EXP3, Uniform])
@pytest.mark.parametrize("clock", [True, False])
@pytest.mark.parametrize("risk", [0.0, 0.01, 0.05])
def test_no_more_than_the_risk_is_lost_to_plain_ar(make: type[Bandit], clock: bool, risk: float):
    """Where every guess is worse than plain AR: allowance, share, rounds that are not timed, one round's bad luck."""
    facts = [ArmFacts(length, cost) for _, length, cost in WORTHLESS]
    if make is Uniform:  # whatever chooses, as long as it asks what is allowed
        make = type("Careful", (Uniform,), {"choose": lambda self, draw: draw_allowed(self, draw)})
    for rounds in (30, 300, 3000):
        bandit = make(facts, scale=1.0, clock=clock, risk=risk)
        tokens, cost = spent(bandit, WORTHLESS, rounds, rounds)
        cold = sum(c - 1 for _, _, c in WORTHLESS) if clock else 0.0
        assert cost - tokens <= bandit.full + risk * tokens + cold + 1
        assert cost - tokens > 0.3 * (bandit.full if rounds > 30 else 1), "and the purse is there to be used"
    free = make(facts, scale=1.0, clock=clock)
    if make in (UCB, EXP3):
        tokens, cost = spent(free, WORTHLESS, 3000, 1)
        assert cost - tokens > 2 * (free.full + 0.01 * tokens), "without it more is lost"


def draw_allowed(bandit: Bandit, draw: float) -> int:
    arms = [arm for arm, may in enumerate(bandit.allowed(bandit.costs())) if may]
    return arms[int(draw * len(arms))]


@pytest.mark.parametrize("make", [UCB, UCBV, EXP3])
def test_gains_pay_for_what_is_tried(make: type[Bandit]):
    """A good arm among worthless ones is found although its first rounds are bad luck, and the purse never overflows."""
    world = (*WORTHLESS[:3], (0.8, 4, 1.5))
    facts = [ArmFacts(length, cost) for _, length, cost in world]
    bandit = make(facts, scale=1.0 if make is EXP3 else 0.2, risk=0.01)
    for _ in range(2):
        bandit.choose(0.999)
        bandit.learn(3, [1], 1.5)
    tokens, cost = spent(bandit, world, 2000, 3)
    assert tokens > (1.2 if make is EXP3 else 1.9) * cost and 0 < bandit.tally.purse <= bandit.full


def test_the_purse_by_hand():
    bandit = UCB([ArmFacts(0, 1.0), ArmFacts(4, 2.0), ArmFacts(8, 24.0)], risk=0.1, clock=False)
    assert bandit.full == bandit.tally.purse == 23, "the dearest round"
    assert bandit.allowed(bandit.costs()) == [True, True, True]
    bandit.learn(2, [1])
    assert bandit.tally.purse == pytest.approx(23 - 23 + 0.1)
    assert bandit.allowed(bandit.costs()) == [True, False, False]
    bandit.learn(0, [1, 1])
    assert bandit.tally.purse == pytest.approx(0.2)
    bandit.learn(1, [3, 4])
    assert bandit.tally.purse == pytest.approx(0.2 + 0.35 + 1.5)
    assert bandit.allowed(bandit.costs()) == [True, True, False]
    carried = UCB(bandit.facts, bandit.tally, risk=0.1)
    bandit.tally.discount(0.5)
    assert carried.tally.purse == pytest.approx(2.05), "it belongs to what is carried over, and does not fade"
    assert UCB([ArmFacts(0), ArmFacts(3)]).full == bandits.ALLOWANCE and UCB([ArmFacts(3)], risk=0.1).allowed([1.0]) == [
        True
    ]


def test_an_arm_is_compared_with_plain_ar_once_that_was_timed():
    for fade in (1.0, 0.999):
        bandit = UCBV([ArmFacts(0), ArmFacts(4, 2.0)], risk=0.01, fade=fade)
        arms = []
        for _ in range(12):
            arms.append(bandit.choose())
            bandit.learn(arms[-1], [1], 1.0)
        assert arms.index(1) == 9, (fade, arms)


def test_rounds_that_hardly_vary_narrow_the_bound():
    """Of two arms with as many rounds and one mean the steady one has the lower bound; neither has the paper's."""
    bandit = UCBV([ArmFacts(8), ArmFacts(8)])
    for steady, wild in ((2, 1), (2, 3), (2, 1), (2, 3)) * 5:
        bandit.learn(0, [steady])
        bandit.learn(1, [wild])
    paper = UCB(bandit.facts, bandit.tally)
    assert bandit.bound(0, 41) < bandit.bound(1, 41) < paper.bound(0, 41) == paper.bound(1, 41)
    assert bandit.range(0) == pytest.approx(2 * math.sqrt(16 / 21)) and bandit.range(1) == pytest.approx(
        2 * math.sqrt(36 / 21)
    )


def test_a_round_that_was_disturbed_does_not_empty_the_purse():
    bandit = UCB([ArmFacts(0, 1.0), ArmFacts(4, 2.0)], risk=0.0)
    for arm in (0, 1) * 4:
        bandit.learn(arm, [1 + arm], 1.0 + arm)
    before = bandit.tally.purse
    bandit.learn(1, [2], 500.0)
    assert before - bandit.tally.purse < 10


def test_what_is_not_allowed_loses_its_mean_loss():
    """Nothing is seen of it, and it must not gain on plain AR by that; an arm that is allowed goes on learning."""
    bandit = EXP3([ArmFacts(0, 1.0), ArmFacts(4, 6.0), ArmFacts(4, 1.0)], risk=0.0, clock=False)
    bandit.tally.purse = 0.0
    for _ in range(50):
        arm = bandit.choose(0.99)
        assert bandit.probabilities()[1] == 0 and arm != 1
        bandit.learn(arm, [1])
    losses = bandit.tally.losses
    assert losses[1] == pytest.approx(50 * bandit.loss(1, 1.0)) and min(losses) > 0 and losses[1] >= max(losses) * 0.5
    bandit.learn(2, [5])
    bandit.learn(1, [5])
    bandit.tally.purse, before = 0.0, bandit.tally.losses[1]
    assert bandit.choose(0.0) == 0 and bandit.allowed(bandit.costs()) == [True, False, True]
    bandit.learn(0, [1])
    assert bandit.tally.losses[1] - before == pytest.approx(bandit.loss(1, 5.0))


def test_an_empty_purse_does_not_stop_what_gains():
    bandit = UCBV([ArmFacts(0, 1.0), ArmFacts(4, 2.0), ArmFacts(4, 2.0)], risk=0.0, clock=False)
    for arm, tokens in ((0, 1), (1, 3), (2, 1)):
        bandit.learn(arm, [tokens])
    bandit.tally.purse = -7.0
    assert bandit.allowed(bandit.costs()) == [True, True, False] and bandit.choose() == 1
    for _ in range(9):
        bandit.learn(1, [3])
    assert bandit.tally.purse == 2.0 and all(bandit.allowed(bandit.costs()))


def test_what_is_lost_is_lost_against_the_cheapest_arm_without_guesses():
    bandit = UCB([ArmFacts(0, 4.0), ArmFacts(4, 200.0), ArmFacts(0, 2.0)], risk=0.0, clock=False)
    assert bandit.plain == 2 and bandit.full == 99
    bandit.tally.purse = 0.0
    assert bandit.allowed(bandit.costs()) == [False, False, True]


@pytest.mark.parametrize("fade", [0.8, 0.95, 0.99, 0.999, 1.0])
def test_plain_ar_is_timed_again_and_again_but_seldom(fade: float):
    """Where another arm is far better, plain AR keeps a twentieth of the seconds, whatever fades: that is judged by it."""
    bandit, spent = UCBV([ArmFacts(0), ArmFacts(4, 2.0)], risk=0.005, fade=fade, scale=0.0), [0.0, 0.0]
    for round_ in range(1100):
        arm = bandit.choose()
        bandit.learn(arm, [5 if arm else 1], 1.0 + arm)
        spent[arm] += (1.0 + arm) * (round_ >= 100)
    assert 0.03 < spent[0] / sum(spent) < (0.09 if fade > 0.95 else 0.25), spent


def test_a_machine_that_slows_down_does_not_make_guesses_look_good_or_bad():
    """All rounds take twice as long from some round on; the arm gains 4 %, so it is to have most rounds before and after."""
    bandit, rng = UCBV([ArmFacts(0), ArmFacts(4, 2.4)], risk=0.005, fade=0.999, scale=0.4), random.Random(1)
    late = [0, 0]
    for round_ in range(3000):
        arm = bandit.choose()
        late[arm] += round_ >= 1500
        slow = 2.0 if round_ >= 1000 else 1.0
        bandit.learn(arm, [2 + (rng.random() < 0.5) if arm else 1], slow * rng.uniform(0.9, 1.1) * (2.4 if arm else 1.0))
    assert late[1] > late[0], late
    assert bandit.costs()[0] == pytest.approx(2.0, rel=0.1)
