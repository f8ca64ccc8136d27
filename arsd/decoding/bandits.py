"""Which arm decodes the next round: UCBSpec and EXP3Spec (BanditSpec, arXiv 2505.15141). Numbers only: no model, no clock.

An arm is a whole way to decode a round. Y tokens come of it, 1 .. L + 1, where L is the most guesses that it can have
accepted. The paper counts rounds until the text ends, which is the same as tokens per round; arms of different cost are
compared by tokens per second here, as the ratio of sums (renewal reward). With equal costs that is the paper's reward.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from arsd.decoding.costs import expected_tokens

DELTA = 0.05  # of the confidence bound; ``scale`` is what to turn
CHANCE = 0.6  # that a guess is taken, before anything is known
TRUST = 1.0  # timed rounds that the cost model is worth
FORGOTTEN = 1e-6  # rounds of which nothing is left
SETTLED = 8  # timed rounds of plain AR before anything is compared with it
SHARE = 0.05  # of all seconds that are plain AR's, so that it is compared with what it takes now
ALLOWANCE = 20.0  # passes of plain AR that may be lost at first, or those of the dearest round
SPIKE = 4.0  # a round that takes this many times the mean of its arm was disturbed


def confidence_radius(pulls: float, rounds: float, arms: int, length: float, delta: float = DELTA) -> float:
    """cr = L/2 sqrt((1 + n) / n^2 (1 + 2 log(K t^2 sqrt(1 + n) / delta))) of UCBSpec, in tokens.

    Args:
        pulls: n, rounds seen of the arm.
        rounds: t, of all arms and the next one.
        arms: K.
        length: L.
        delta: chance that the bound fails.
    """
    inside = 1 + 2 * math.log(arms * rounds**2 * math.sqrt(1 + pulls) / delta)
    return length / 2 * math.sqrt((1 + pulls) / pulls**2 * max(0.0, inside))


def learning_rate(rounds: float, arms: int) -> float:
    """eta_t = sqrt(log K / (t K)) of EXP3Spec."""
    return math.sqrt(math.log(arms) / (rounds * arms))


def exponential_weights(losses: Sequence[float], rate: float) -> list[float]:
    """p_i in proportion to exp(-eta sum of the estimated losses of arm i)."""
    least = min(losses)
    weights = [math.exp(-rate * (loss - least)) for loss in losses]
    total = sum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class ArmFacts:
    """What is known of an arm before its first round.

    Args:
        length: L; 0 of plain AR.
        cost: of a round, by the cost model, in passes of plain AR.
        drafter: arms of one number (0 or more) guess by one drafter, one after another: the guesses of the shorter arm are
            the first ones of the longer arm. -1: a drafter of its own.
    """

    length: int
    cost: float = 1.0
    drafter: int = -1


class Tally:
    """What the rounds have shown, as sums of each arm that :meth:`discount` lets fade. It may outlive a call.

    Args:
        arms: how many.
        warm: to begin with.

    Attributes:
        pulls: rounds that the arm has decoded.
        seen: rounds whose Y is known for the arm, its own or those of a longer arm of its drafter.
        tokens: their Y.
        squares: their Y squared.
        timed: rounds behind ``seconds``.
        seconds: of the arm's rounds, its own or inferred.
        losses: summed loss estimates of EXP3.
        purse: what guesses may still lose against plain AR, in its passes; ``None`` before there is a bandit. Never fades.
        compared: timed rounds of plain AR so far, which does not fade either, nor
        drawn: random choices so far.
        warm: arms whose first round was seen. It is not timed: kernels of a new pass shape are still being chosen.
        lock: held while the sums are read or changed.
    """

    def __init__(self, arms: int, warm: set[int] | None = None) -> None:
        self.pulls, self.seen, self.tokens, self.squares, self.timed = ([0.0] * arms for _ in range(5))
        self.seconds, self.losses = [0.0] * arms, [0.0] * arms
        self.purse: float | None = None
        self.compared = 0
        self.drawn, self.warm, self.lock = 0, set[int]() if warm is None else warm, threading.Lock()

    def discount(self, factor: float) -> None:
        """Let all sums count for ``factor`` of what they did."""
        for sums in (self.pulls, self.seen, self.tokens, self.squares, self.timed, self.seconds, self.losses):
            sums[:] = [factor * value for value in sums]


class Bandit:
    """Base: what both algorithms count. A subclass chooses.

    Args:
        facts: of every arm.
        tally: sums to go on from; fresh ones by default.
        scale: see the subclass.
        fade: what all that was seen counts for after one more token: arms get better and worse along a text.
        clock: whether measured seconds count; else the costs are those of ``facts``.
        risk: what may be lost against the cheapest arm without guesses, as a share of what that would have cost; ``None``:
            anything.

    Attributes:
        draws: whether it chooses at random.
    """

    draws = False

    def __init__(
        self,
        facts: Sequence[ArmFacts],
        tally: Tally | None = None,
        scale: float = 1.0,
        fade: float = 1.0,
        clock: bool = True,
        risk: float | None = None,
    ) -> None:
        self.facts, self.scale, self.fade, self.clock, self.risk = list(facts), scale, fade, clock, risk
        self.tally = Tally(len(self.facts)) if tally is None else tally
        guessless = [arm for arm, fact in enumerate(self.facts) if not fact.length]
        self.plain = min(guessless, key=lambda arm: self.facts[arm].cost) if guessless else None
        unit = 1.0 if self.plain is None else self.facts[self.plain].cost
        self.full = max([ALLOWANCE, *(fact.cost / unit - 1 for fact in self.facts)])
        if self.tally.purse is None:
            self.tally.purse = self.full

    def choose(self, draw: float) -> int:
        """The arm of the next round; ``draw`` is uniform on (0, 1), for those that need it."""
        raise NotImplementedError

    def learn(self, arm: int, counts: Sequence[int], seconds: float = 0.0, drafting: float = 0.0) -> None:
        """A round is over.

        Of a longer arm's block with m guesses accepted, a shorter one of the same drafter is known as well: it would have
        got Y = min(m, L') + 1, and saved its share of the drafting.

        Args:
            arm: that decoded it.
            counts: tokens that each row got.
            seconds: that it took.
            drafting: how many of them were drafting.
        """
        if not counts:
            return
        tally, length = self.tally, self.facts[arm].length
        if self.fade < 1:
            tally.discount(self.fade ** (sum(counts) / len(counts)))
        tally.pulls[arm] += 1
        timed = self.clock and arm in tally.warm
        tally.warm.add(arm)
        tally.compared += timed and arm == self.plain
        self._pay(arm, sum(counts) / len(counts), seconds if timed else None)
        for other in self._shown_by(arm):
            most = self.facts[other].length
            tokens = sum(min(count, most + 1) for count in counts) / len(counts)
            tally.seen[other] += 1
            tally.tokens[other] += tokens
            tally.squares[other] += tokens**2
            if timed:
                self._time(other, seconds - drafting * (1 - most / max(1, length)) if other != arm else seconds)
            self._weigh(other, tokens)

    def allowed(self, costs: Sequence[float]) -> list[bool]:
        """Arms whose next round is not expected to lose more than the purse holds.

        Plain AR always is. What is refused waits until the purse has filled again, so of N tokens no more than
        ``risk`` N + ``full`` passes of plain AR are lost (conservative bandits, Wu et al. 2016, arXiv 1602.04282), but for
        errors of the mean costs, the first round of each arm, which is not timed, and the bad luck of arms that are expected
        to gain. While plain AR itself was timed too seldom, it has the round.
        """
        if self.risk is None or self.plain is None:
            return [True] * len(self.facts)
        if self.clock and self._plain_is_due(costs):
            return [arm == self.plain for arm in range(len(self.facts))]
        unit, purse, tally = costs[self.plain], self.tally.purse or 0.0, self.tally
        worth = [tokens / seen if seen else 1.0 for tokens, seen in zip(tally.tokens, tally.seen, strict=True)]
        loses = [cost / unit - tokens for cost, tokens in zip(costs, worth, strict=True)]
        return [arm == self.plain or loss <= max(0.0, purse) for arm, loss in enumerate(loses)]

    def _plain_is_due(self, costs: Sequence[float]) -> bool:
        """Whether plain AR was timed too seldom, of late, to compare anything with it: machines are not always as fast."""
        assert self.plain is not None
        tally, plain = self.tally, self.plain
        spent = sum(n * cost for n, cost in zip(tally.pulls, costs, strict=True))
        return tally.compared < SETTLED or tally.pulls[plain] * costs[plain] < SHARE * spent

    def _pay(self, arm: int, tokens: float, seconds: float | None) -> None:
        """Into the purse: a share of what the tokens would have cost, and what the round gained or lost."""
        if self.risk is None or self.plain is None:
            return
        gain = 0.0
        if arm != self.plain and (seconds is not None or not self.clock):
            costs = self.costs()
            cost = costs[arm] if seconds is None else min(seconds, SPIKE * costs[arm])
            gain = tokens - cost / costs[self.plain]
        self.tally.purse = min(self.full, (self.tally.purse or 0.0) + self.risk * tokens + gain)

    @property
    def rounds(self) -> float:
        """t: rounds so far and the next one."""
        return sum(self.tally.pulls) + 1

    def mean_tokens(self, arm: int) -> float:
        """Y of an arm that was seen."""
        return self.tally.tokens[arm] / self.tally.seen[arm]

    def costs(self) -> list[float]:
        """Of a round of each arm: its mean seconds, which begin at what the cost model makes of those of all arms."""
        if not self.clock:
            return [fact.cost for fact in self.facts]
        tally = self.tally
        model = sum(n * fact.cost for n, fact in zip(tally.timed, self.facts, strict=True))
        unit = TRUST * (sum(tally.seconds) / model if model else 1.0)
        parts = zip(tally.seconds, tally.timed, self.facts, strict=True)
        return [(seconds + unit * fact.cost) / (timed + TRUST) for seconds, timed, fact in parts]

    def _shown_by(self, arm: int) -> Iterator[int]:
        """The arms whose Y a round of ``arm`` shows."""
        fact = self.facts[arm]
        for other, theirs in enumerate(self.facts):
            if other == arm or (theirs.drafter == fact.drafter >= 0 and theirs.length <= fact.length):
                yield other

    def _time(self, arm: int, seconds: float) -> None:
        tally = self.tally
        if tally.timed[arm] >= 2:
            seconds = min(seconds, SPIKE * tally.seconds[arm] / tally.timed[arm])
        tally.timed[arm] += 1
        tally.seconds[arm] += max(0.0, seconds)

    def _weigh(self, arm: int, tokens: float) -> None:
        """A round showed Y = ``tokens`` of the arm."""


class UCB(Bandit):
    """UCBSpec (arXiv 2505.15141): the arm with the highest upper bound of its tokens per second.

    The bound is (mean Y + scale cr) / mean cost, and Y + scale cr is no more than L + 1. Every arm that is allowed is seen
    and timed before, the most promising by the cost model first. L is the arm's own, and at least 1: plain AR's Y is known,
    its cost is not.

    Args:
        facts: of every arm.
        tally: sums to go on from.
        scale: of the confidence radius; 1 is the paper's.
        fade: as for :class:`Bandit`.
        clock: whether measured seconds count.
        risk: as for :class:`Bandit`.
    """

    def choose(self, draw: float = 0.0) -> int:
        """See :class:`Bandit`; nothing is drawn."""
        tally, costs = self.tally, self.costs()
        arms = [arm for arm, may in enumerate(self.allowed(costs)) if may]
        fresh = [arm for arm in arms if not tally.seen[arm]]
        if not fresh and self.clock:  # a first round is not timed
            fresh = [arm for arm in arms if not tally.timed[arm]]
        if fresh:
            return max(fresh, key=self._promise)
        rounds = self.rounds
        return max(arms, key=lambda arm: self.bound(arm, rounds) / costs[arm])

    def bound(self, arm: int, rounds: float) -> float:
        """The upper bound of the tokens in a round of an arm that was seen, by the ``rounds`` so far and the next one."""
        longest, seen = max(1, self.facts[arm].length), max(self.tally.seen[arm], FORGOTTEN)
        radius = confidence_radius(seen, rounds, len(self.facts), self.range(arm))
        return min(self.mean_tokens(arm) + self.scale * radius, longest + 1.0)

    def range(self, arm: int) -> float:
        """L of the confidence radius."""
        return max(1, self.facts[arm].length)

    def _promise(self, arm: int) -> float:
        return expected_tokens(CHANCE, self.facts[arm].length) / self.facts[arm].cost


class UCBV(UCB):
    """UCB with the standard deviation of Y that was seen in the place of L / 2, which is the most that it can be.

    Y of an arm that is always wrong, or always right, hardly varies, so few rounds tell (as in UCB-V, Audibert et al. 2009).
    L / 2 counts as one round.
    """

    def range(self, arm: int) -> float:
        """See :class:`UCB`."""
        tally, widest = self.tally, super().range(arm) / 2
        squares = max(0.0, tally.squares[arm] - tally.tokens[arm] * self.mean_tokens(arm))
        return 2 * min(widest, math.sqrt((squares + widest**2) / (tally.seen[arm] + 1)))


class EXP3(Bandit):
    """EXP3Spec (arXiv 2505.15141): an arm is drawn by exponential weights of importance-weighted losses, in any world.

    The loss is (best - rate) / (best - worst), where rate = Y / mean cost of the arm, best the highest (L + 1) / cost of all
    arms and worst the lowest 1 / cost: the paper's (L + 1 - Y) / L where costs and lengths are equal. It is divided by the
    probability that the arm's Y was to be seen, which is p_i unless a longer arm shows it too (Alon et al. 2013).

    Args:
        facts: of every arm.
        tally: sums to go on from.
        scale: of the learning rate; 1 is the paper's.
        fade: as for :class:`Bandit`.
        clock: whether measured seconds count.
        risk: as for :class:`Bandit`.
    """

    draws = True
    _refused: Sequence[int] = ()

    def probabilities(self) -> list[float]:
        """p_t of every arm; what falls to arms that are not allowed falls to plain AR."""
        arms = len(self.facts)
        weights = exponential_weights(self.tally.losses, self.scale * learning_rate(self.rounds, arms))
        allowed = self.allowed(self.costs())
        self._refused = [arm for arm, may in enumerate(allowed) if not may]
        if self.plain is not None and self._refused:
            weights = [p if may else 0.0 for p, may in zip(weights, allowed, strict=True)]
            weights[self.plain] += 1 - sum(weights)
        return weights

    def learn(self, arm: int, counts: Sequence[int], seconds: float = 0.0, drafting: float = 0.0) -> None:
        """See :class:`Bandit`. An arm that was refused loses what its mean round does, not nothing."""
        super().learn(arm, counts, seconds, drafting)
        for other in self._refused if counts else ():
            self.tally.losses[other] += self.loss(other, self.mean_tokens(other) if self.tally.seen[other] else 1.0)

    def choose(self, draw: float) -> int:
        """See :class:`Bandit`."""
        self._drawn_from = self.probabilities()
        total = 0.0
        for arm, p in enumerate(self._drawn_from):
            total += p
            if draw < total:
                return arm
        return len(self.facts) - 1

    def loss(self, arm: int, tokens: float) -> float:
        """Of a round with Y = ``tokens``, in [0, 1] while the mean costs hold."""
        costs = self.costs()
        best = max((fact.length + 1) / cost for fact, cost in zip(self.facts, costs, strict=True))
        worst = min(1 / cost for cost in costs)
        return (best - tokens / costs[arm]) / (best - worst) if best > worst else 0.0

    def _weigh(self, arm: int, tokens: float) -> None:
        if arm in self._refused:
            return
        seen = sum(p for other, p in enumerate(self._drawn_from) if arm in self._shown_by(other))
        self.tally.losses[arm] += self.loss(arm, tokens) / seen
