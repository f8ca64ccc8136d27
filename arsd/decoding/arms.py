"""Several strategies as the arms of one call: in every round one of them guesses and judges, and all of them learn.

Every arm is seed-exact, so whichever arms take turns, the tokens are those of plain AR.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arsd.decoding.backlog import Backlog, hears_late
from arsd.decoding.bandits import ArmFacts, Bandit
from arsd.decoding.chain import ChainDrafter, ModelDrafter
from arsd.decoding.costs import PassCosts
from arsd.decoding.laws import Law
from arsd.decoding.lookup import LookupDrafter
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.strategies import STRATEGIES, Autoregressive, DecodingStrategy, Setting, parse_strategy
from arsd.decoding.types import Draft, Parts, Step, Target, Verdict
from arsd.errors import StrategyError

SAME_HEADS = (ChainDrafter, LookupDrafter)  # fewer guesses of these are the first ones of more
SMALL_MODEL = 0.2  # passes of the target that a guess of a draft model takes, where nothing says more


def parse_arms(text: str) -> list[DecodingStrategy]:
    """``ar+std:budget=512:draft_length=3`` to strategies. A key that a strategy lacks goes on with the value before it.

    Raises:
        StrategyError: for an arm that is no strategy, or is none of these.
    """
    arms = []
    for item in str(text).split("+"):
        name, *options = item.strip().split(":")
        known = STRATEGIES[name]().config if name in STRATEGIES else {}
        given: list[str] = []
        for option in options:
            if given and option.partition("=")[0] not in known:
                given[-1] += f":{option}"  # as in drafter=jacobi:init=left
            else:
                given.append(option)
        arms.append(parse_strategy(f"{name}:{','.join(given)}"))
    return arms


def arms_text(arms: Any) -> str:
    """Arms as :func:`parse_arms` takes them: from such text, a strategy, or a list of strategies and texts.

    Raises:
        StrategyError: for what is no strategy, or one that text cannot say (it is in no registry).
    """
    texts = []
    for arm in arms if isinstance(arms, (list, tuple)) else [arms]:
        if not isinstance(arm, (str, DecodingStrategy)):
            raise StrategyError(f"an arm must be a strategy or its text, such as 'ar+sjd:window=8', not {arm!r}")
        texts.append(str(arm).replace(",", ":"))
        if isinstance(arm, DecodingStrategy) and [str(found) for found in parse_arms(texts[-1])] != [str(arm)]:
            raise StrategyError(f"{arm} cannot be an arm: an arm must be what text can say")
    return "+".join(texts)


def check_arms(arms: Sequence[DecodingStrategy]) -> None:
    """All arms must keep the promise that makes their mixture exact.

    Raises:
        StrategyError: for an arm that is not seed-exact, has arms of its own, or is there twice.
    """
    names = [str(arm) for arm in arms]
    if len(set(names)) < len(names):
        raise StrategyError(f"every arm can be there once only: {'+'.join(names)}")
    for arm in arms:
        if "arms" in arm.config:
            raise StrategyError(f"{arm.name} has arms of its own, and cannot be one")
        if not (arm.lossless and arm.seed_exact):
            raise StrategyError(f"{arm} is not seed-exact, and an arm must be: then any mixture gives plain AR's tokens")


@dataclass
class Arm:
    """One strategy of a call.

    Args:
        name: the strategy's text.
        parts: its parts; arms that share a drafter share them.
        shorter: guesses fewer than the drafter would make.
        pass_tokens: tokens of its passes, at least.
        facts: for the bandit.
    """

    name: str
    parts: Parts
    shorter: int
    pass_tokens: int
    facts: ArmFacts

    def window(self) -> int:
        """Slots of its next round."""
        return max(1, self.parts.controller.window() - self.shorter)

    def width(self) -> int:
        """Tokens of its next pass."""
        return max(self.pass_tokens, self.parts.width() if not self.shorter else 0)


def build_arms(strategies: Sequence[DecodingStrategy], setting: Setting, pass_tokens: int = 1) -> list[Arm]:
    """The arms of a call. Strategies of chains that differ in ``draft_length`` only share the drafter of the longest one.

    Args:
        strategies: one for each arm.
        setting: of the call.
        pass_tokens: the least tokens of every pass.

    Raises:
        StrategyError: when one of them is not possible here.
    """
    costs = setting.costs or PassCosts(1.0, 0.0, setting.batch)
    if setting.profile is not None and not costs.wide:
        costs = replace(costs, wide=_measured(setting))
    kinds: dict[Any, list[DecodingStrategy]] = {}
    for strategy in strategies:
        kinds.setdefault(_kind(strategy), []).append(strategy)
    arms: dict[int, Arm] = {}
    for number, members in enumerate(kinds.values()):
        longest = max(members, key=_length)
        parts = longest.build(setting)
        shared = len(members) == 1 or isinstance(parts.drafter, SAME_HEADS)
        for strategy in members:
            own = parts if shared or strategy is longest else strategy.build(setting)
            shorter = _length(longest) - _length(strategy) if own is parts else 0
            length = max(0, own.controller.window() - shorter - 1)
            width = max(pass_tokens, strategy.config.get("pass_tokens") or 0, length + 1 if shorter else own.pass_tokens)
            guess = _draft_cost(strategy, own, costs)
            facts = ArmFacts(length, length * guess + costs.verify_cost(width), number if shared else -1)
            arms[id(strategy)] = Arm(str(strategy), own, shorter, width, facts)
    return [arms[id(strategy)] for strategy in strategies]


def _kind(strategy: DecodingStrategy) -> Any:
    """What strategies that could share a drafter have in common."""
    config = strategy.config
    if "draft_length" not in config:
        return id(strategy)
    rest = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("draft_length", "pass_tokens")}
    return type(strategy), repr(sorted(rest.items()))


def _length(strategy: DecodingStrategy) -> int:
    return int(strategy.config.get("draft_length") or 0)


def _measured(setting: Setting) -> tuple[tuple[int, float], ...]:
    """The profile's rounds of this batch, against plain AR's."""
    profile = setting.profile
    assert profile is not None
    costs = profile.costs.get(setting.batch) or profile.costs[min(profile.costs, key=lambda b: abs(b - setting.batch))]
    return tuple((tokens, seconds / costs[1]) for tokens, seconds in costs.items()) if 1 in costs else ()


def _draft_cost(strategy: DecodingStrategy, parts: Parts, costs: PassCosts) -> float:
    """c_d of a guess: what the strategy says (``draft_cost(costs)``), else by what the drafter reads."""
    if hasattr(strategy, "draft_cost"):
        return float(strategy.draft_cost(costs))
    if not hasattr(parts.drafter, "model"):
        return 0.0  # n-grams and iterates are looked up
    config = strategy.config
    if "budget" in config:
        return costs.draft_cost(config["budget"] if isinstance(config["budget"], int) else costs.context)
    return 1 - config["skip"] if "skip" in config else SMALL_MODEL


class SteadyNoise:
    """The noise of a step for the longest window: its buffer of Gumbel noise is made anew when its size changes."""

    def __init__(self, noise: Any, window: int) -> None:
        self.noise, self._window = noise, window

    def prepare(self, starts: Sequence[int], window: int, vocab: int, dtype: torch.dtype) -> None:
        """See :class:`arsd.decoding.noise.Noise`."""
        self.noise.prepare(starts, max(window, self._window), vocab, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.noise, name)


class Arms:
    """The arms of a call, and which of them has the round.

    Args:
        arms: at least one.
        num_tokens: tokens per row.
    """

    def __init__(self, arms: list[Arm], num_tokens: int) -> None:
        self.arms, self.now, self.drafting = arms, arms[0], 0.0
        self._noise: Any = None
        self.pass_tokens = max(arm.pass_tokens for arm in arms)
        self.longest = max(arm.facts.length + 1 for arm in arms)
        # every drafter once, with the last position that its buffers bear: that of its window at the end of a row
        drafters = {id(arm.parts.drafter): (arm.parts.drafter, arm.facts.length + arm.shorter) for arm in arms}
        self.drafters = [(drafter, num_tokens + length) for drafter, length in drafters.values()]

    def steady(self, step: Step) -> None:
        """From now on the noise of the step has one buffer size."""
        if step.noise is not self._noise:
            if self._noise is None or self._noise.noise is not step.noise:
                self._noise = SteadyNoise(step.noise, self.longest)
            step.noise = self._noise


class Onlookers:
    """Several that look on in the same passes (:class:`arsd.models.attention.Observer`)."""

    def __init__(self, observers: Sequence[Any]) -> None:
        self.observers = observers

    def mask(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """See :class:`arsd.models.attention.Observer`."""
        for observer in self.observers:
            mask = observer.mask(layer, mask)
        return mask

    def saw(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """See :class:`arsd.models.attention.Observer`."""
        for observer in self.observers:
            observer.saw(layer, query, key, scaling)


class ArmsDrafter:
    """Guesses of the arm that has the round; every drafter hears of every outcome, before its next guesses or at once."""

    def __init__(self, arms: Arms) -> None:
        self.arms = arms
        self.backlog = Backlog([drafter for drafter, _ in arms.drafters if hears_late(drafter)])
        self.prompt = [(drafter, last) for drafter, last in arms.drafters if not hears_late(drafter)]
        self.target: Any = None  # until the first round
        self.needs_law = any(drafter.needs_law for drafter, _ in arms.drafters)
        trees = (getattr(drafter, "tree", None) for drafter, _ in arms.drafters)
        self.tree = next((tree for tree in trees if tree is not None), None)  # with one, no other strategy shares a pass

    def begin(self, target: Target) -> None:
        """Drafters that read the target may do so; those that look on in its passes all see the prefill."""
        self.target, watching = target, list[Any]()
        for drafter, _ in self.arms.drafters:
            if hasattr(drafter, "begin"):
                drafter.begin(target)
                watching.append(getattr(target, "observer", None))
                if watching[-1] is not None:
                    self.target.observer = None
        if any(watching):
            self.target.observer = Onlookers([observer for observer in watching if observer is not None])

    def propose(self, step: Step) -> Draft:
        """See :class:`arsd.decoding.types.Drafter`."""
        drafter = self.arms.now.parts.drafter
        self.backlog.tell(drafter)
        began = time.perf_counter()
        if self.target is not None:
            if getattr(self.target, "observer", None) is not None:
                self.target.observer = None  # a pass of plain AR is to be one
            self.target = None
        if isinstance(drafter, ModelDrafter):
            read_up(drafter, step)
        self.arms.steady(step)
        draft = drafter.propose(step)
        self.arms.drafting = time.perf_counter() - began
        return draft

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """See :class:`arsd.decoding.types.Drafter`.

        A drafter sees all of a window that is longer than its own; what lies behind its buffers is never committed.
        """
        self.arms.steady(step)
        now = self.arms.now.parts.drafter
        now.observe(step, law, verdict, lengths)
        for drafter, last in self.prompt:
            if drafter is not now:
                drafter.observe(replace(step, positions=step.positions.clamp_max(last)), law, verdict, lengths)
        self.backlog.add(now, step, law, verdict)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.Drafter`.

        Raises:
            StrategyError: when a drafter cannot begin another picture.
        """
        for drafter, _ in self.arms.drafters:
            self.backlog.tell(drafter)
            if not hasattr(drafter, "join"):
                name = type(drafter).__name__
                raise StrategyError(f"drafter {name} cannot begin another picture in a freed row: leave out batch_size")
            drafter.join(rows, pictures)


class ArmsRule:
    """The rule of the arm that has the round."""

    trees = True

    def __init__(self, arms: Arms) -> None:
        self.arms = arms

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        self.arms.steady(step)
        return self.arms.now.parts.rule.verify(step, law, draft)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Rules that remember something forget these rows."""
        for rule in {id(arm.parts.rule): arm.parts.rule for arm in self.arms.arms}.values():
            if hasattr(rule, "join"):
                rule.join(rows, pictures)


class ArmsController:
    """Lets a bandit choose the arm of every round.

    Args:
        arms: of the call.
        bandit: over the same arms.
        draws: uniform numbers by their index.
    """

    def __init__(self, arms: Arms, bandit: Bandit, draws: Callable[[int], float]) -> None:
        self.arms, self.bandit, self.draws = arms, bandit, draws
        self.counts = [0] * len(arms.arms)
        self.chosen, self.arm = 0, arms.now.name

    def window(self) -> int:
        """See :class:`arsd.decoding.types.Controller`."""
        tally = self.bandit.tally
        with tally.lock:
            self.chosen = self.bandit.choose(self.draws(tally.drawn))
            tally.drawn += 1
        self.arms.now = self.arms.arms[self.chosen]
        self.arm = self.arms.now.name
        return self.arms.now.window()

    def pass_tokens(self) -> int:
        """See :class:`arsd.decoding.types.Controller`: what the arm would feed alone."""
        return self.arms.now.width()

    def observe(self, counts: list[int], seconds: float) -> None:
        """See :class:`arsd.decoding.types.Controller`."""
        self.arms.now.parts.controller.observe(counts, seconds)
        if counts:
            self.counts[self.chosen] += 1
            with self.bandit.tally.lock:
                self.bandit.learn(self.chosen, counts, seconds, self.arms.drafting)

    def pulls(self) -> dict[str, int]:
        """Rounds of this call that each arm has decoded."""
        return {arm.name: count for arm, count in zip(self.arms.arms, self.counts, strict=True)}

    def summary(self) -> dict[str, dict[str, float]]:
        """What is known of each arm, with what was carried over and inferred.

        Returns:
            By name: ``pulls`` of this call, ``tokens`` per round, ``cost`` of a round (seconds; passes of plain AR in
            reproducible mode), and ``rate``, tokens per cost.
        """
        bandit, found = self.bandit, {}
        with bandit.tally.lock:
            costs = bandit.costs()
            for i, (name, count) in enumerate(self.pulls().items()):
                tokens = bandit.mean_tokens(i) if bandit.tally.seen[i] else 0.0
                found[name] = {"pulls": float(count), "tokens": tokens, "cost": costs[i]}
                found[name]["rate"] = tokens / found[name]["cost"]
        return found


def read_up(drafter: ModelDrafter, step: Step) -> None:
    """Let the draft model of an arm that sat out read what the others committed, in passes no wider than its own.

    Draft models of the target's own weights take what is committed from its cache, and need not.
    """
    if not isinstance(drafter.model, SmallARDrafter):
        return
    width, reading = drafter.window, set(step.reading)
    while True:
        before = list(drafter.read)
        behind = [b not in reading and n - r >= width for b, (n, r) in enumerate(zip(step.starts, before, strict=True))]
        if not any(behind):
            return
        # the others read their next token, and once more when their turn comes
        to = [r + width - 1 if late else r for r, late in zip(before, behind, strict=True)]
        drafter.catch_up(replace(step, starts=to))
        drafter.read = [new if late else old for new, old, late in zip(drafter.read, before, behind, strict=True)]


def has_ar(strategies: Sequence[DecodingStrategy]) -> bool:
    """Whether plain AR in passes of one token is among them: the safety arm."""
    return any(isinstance(s, Autoregressive) and (s.config["pass_tokens"] or 1) == 1 for s in strategies)
