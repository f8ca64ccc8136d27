"""Strategies that choose among strategies while they decode (BanditSpec, arXiv 2505.15141)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module

from arsd.decoding.arms import (
    Arm,
    Arms,
    ArmsController,
    ArmsDrafter,
    ArmsRule,
    arms_text,
    build_arms,
    check_arms,
    has_ar,
    parse_arms,
)
from arsd.decoding.bandits import EXP3, UCBV, Bandit, Tally
from arsd.decoding.noise import CounterNoise, Purpose
from arsd.decoding.options import number, whole
from arsd.decoding.strategies import STRATEGIES, Autoregressive, DecodingStrategy, Setting
from arsd.decoding.types import Parts
from arsd.errors import StrategyError

OF_TEXTS = ("prompt-lookup", "token-recycling", *(f"std:budget=256:draft_length={length}" for length in (3, 5, 9)))
OF_PICTURES = tuple(f"sjd:window={window}" for window in (8, 16, 32))
SCALE, FADE = {"ucb-spec": 0.4, "exp3-spec": 1.0}, {"ucb-spec": 0.999, "exp3-spec": 1.0}
RISK, DISCOUNT = 0.005, 1.0
AHEAD = 256  # random numbers made at a time

_CARRIED: WeakKeyDictionary[DecodingStrategy, dict[Any, Tally]] = WeakKeyDictionary()
_LOCK = threading.Lock()


class BanditStrategy(DecodingStrategy):
    """Base of the strategies with arms. Whole strategies are the arms, and one of them has each round.

    All arms must be lossless and seed-exact: then the tokens are those of plain AR, whatever the choices, and so are the
    choices free to use clocks. Plain AR is always among the arms, in passes of one token, and ``risk`` limits what the
    others may lose against it.
    """

    algorithm: type[Bandit] = Bandit

    def _check(self, arms: Any) -> None:
        """Check the options, and write the arms as text.

        Raises:
            StrategyError: for values that do not fit.
        """
        config = self.config
        number("scale", config["scale"], 0, open_end=True)
        for name in ("fade", "discount"):
            if not 0 < number(name, config[name], 0) <= 1:
                raise StrategyError(f"{name} must be a number > 0 and <= 1, not {config[name]!r}")
        if config["risk"] is not None:
            number("risk", config["risk"], 0, otherwise=" or none")
        if config["pass_tokens"] is not None:
            whole("pass_tokens", config["pass_tokens"], 1)
        for name in ("carry", "reproducible"):
            if not isinstance(config[name], bool):
                raise StrategyError(f"{name} must be true or false, not {config[name]!r}")
        if arms is not None:
            self.register_to_config(arms=arms_text(arms))
            check_arms(parse_arms(self.config["arms"]))

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`.

        Raises:
            StrategyError: when an arm that was asked for is not possible here, or none but plain AR is.
        """
        arms = Arms(self._arms(setting), setting.num_tokens)
        timed = not self.config["reproducible"]
        how = self.config["scale"], self.config["fade"], timed, self.config["risk"]
        bandit = self.algorithm([arm.facts for arm in arms.arms], self._tally(arms, setting), *how)
        controller = ArmsController(arms, bandit, _draws(setting) if bandit.draws else lambda index: 0.0)
        return Parts(ArmsDrafter(arms), ArmsRule(arms), controller, arms.pass_tokens)

    def _arms(self, setting: Setting) -> list[Arm]:
        """The arms of a call: those of ``arms``, or whatever of the usual ones is possible."""
        least = self.config["pass_tokens"] or 1
        if self.config["arms"] is None:
            chosen: list[DecodingStrategy] = [Autoregressive()]
            for text in OF_PICTURES if setting.row_length else OF_TEXTS:
                if text.partition(":")[0] in STRATEGIES:
                    chosen += [arm for arm in parse_arms(text) if _possible(arm, setting)]
            if len(chosen) == 1:
                raise StrategyError(f"{self.name} finds no arm but ar that is possible here: name some, as in arms=ar+sjd")
        else:
            chosen = parse_arms(self.config["arms"])
            chosen = chosen if has_ar(chosen) else [Autoregressive(), *chosen]
        return build_arms(chosen, setting, least)

    def _tally(self, arms: Arms, setting: Setting) -> Tally:
        """The sums of this call: its own, or those that were carried over."""
        carry = self.config["carry"] and not self.config["reproducible"]
        costs = setting.costs
        sizes = None if costs is None else (costs.weights, costs.entry, round(math.log2(max(1, costs.context))))
        kind = (tuple(arm.name for arm in arms.arms), setting.batch, setting.grammar.vocab, str(setting.device), sizes)
        with _LOCK:
            known = _CARRIED.setdefault(self, {})
            tally = known.setdefault(kind, Tally(len(arms.arms)))
        with tally.lock:
            if carry:
                tally.discount(self.config["discount"])
                return tally
        return Tally(len(arms.arms), tally.warm)


class UCBSpec(BanditStrategy):
    """UCBSpec: each round is decoded by the arm with the highest upper confidence bound; lossless, seed-exact.

    The bound is on tokens per second (:class:`arsd.decoding.bandits.UCBV`). On the command line:
    ``ucb-spec:arms=ar+prompt-lookup:draft_length=6+std:budget=512:draft_length=3``.

    Args:
        arms: strategies, separated by ``+`` and with ``:`` between their options; also a strategy, or a list of strategies
            and texts. ``None``: plain AR and, of texts, ``prompt-lookup``, ``token-recycling`` and ``std`` with 3, 5 and 9
            guesses, as far as they are possible; of pictures ``sjd`` with windows of 8, 16 and 32.
        scale: of the confidence radius. The paper's is 1, and L / 2 in the place of a standard deviation; that exceeds the
            differences between arms for hundreds of rounds.
        fade: what a round counts for after one more token, as arms get better and worse along a text; 1 is the paper's.
        carry: go on with what earlier calls of this object have shown, for the same arms, batch, device and sizes of the
            model, and prompts of about that length (powers of two).
        discount: what earlier calls count for, at each new one.
        reproducible: choose by the cost model and accepted guesses only, never by a clock, and carry nothing over: the
            passes then have the same shapes in every run.
        risk: what guesses may lose against plain AR: of N tokens, in all calls from which statistics were carried over, the
            time of ``risk`` N of its passes and of the 20 first ones (or of the dearest round, if that is more). ``None``:
            anything, as published.
        pass_tokens: the least tokens of every pass, as in other strategies. ``None``: each arm feeds what it needs.

    Raises:
        StrategyError: for values that do not fit, and arms that are not seed-exact.
    """

    name = "ucb-spec"
    algorithm = UCBV

    @register_to_config
    def __init__(
        self,
        arms: Any = None,
        scale: float = SCALE["ucb-spec"],
        fade: float = FADE["ucb-spec"],
        carry: bool = True,
        discount: float = DISCOUNT,
        reproducible: bool = False,
        risk: float | None = RISK,
        pass_tokens: int | None = None,
    ) -> None:
        self._check(arms)


class EXP3Spec(BanditStrategy):
    """EXP3Spec: each round's arm is drawn by exponential weights of the losses so far; lossless, seed-exact.

    It makes no assumption about how rounds come about, and learns more slowly (:class:`arsd.decoding.bandits.EXP3`).

    Args:
        arms: as for :class:`UCBSpec`.
        scale: of the learning rate; 1 is the paper's.
        fade: as for :class:`UCBSpec`.
        carry: as for :class:`UCBSpec`.
        discount: as for :class:`UCBSpec`.
        reproducible: as for :class:`UCBSpec`. The draws belong to the seed of the call in either mode.
        risk: as for :class:`UCBSpec`.
        pass_tokens: as for :class:`UCBSpec`.

    Raises:
        StrategyError: for values that do not fit, and arms that are not seed-exact.
    """

    name = "exp3-spec"
    algorithm = EXP3

    @register_to_config
    def __init__(
        self,
        arms: Any = None,
        scale: float = SCALE["exp3-spec"],
        fade: float = FADE["exp3-spec"],
        carry: bool = True,
        discount: float = DISCOUNT,
        reproducible: bool = False,
        risk: float | None = RISK,
        pass_tokens: int | None = None,
    ) -> None:
        self._check(arms)


def _possible(arm: DecodingStrategy, setting: Setting) -> bool:
    """Whether a call with this setting can have the arm."""
    try:
        parts = arm.build(replace(setting))
    except StrategyError:
        return False
    return getattr(parts.drafter, "tree", None) is None or not setting.chains_only


def _draws(setting: Setting) -> Callable[[int], float]:
    """Uniform numbers of the call by their index, made on the host: a round waits for no device."""
    place = torch.full((setting.batch, 1), -1, device=setting.device)  # no token stands there
    seed = int(setting.noise.integers(torch.full_like(place, 2**62), Purpose.INITIAL, place)[0, 0])
    noise, blocks = CounterNoise([seed], [0]), dict[int, list[float]]()

    def draw(index: int) -> float:
        block, at = divmod(index, AHEAD)
        if block not in blocks:
            positions = AHEAD * block + torch.arange(AHEAD)[None]
            blocks[block] = noise.uniform(Purpose.INITIAL, positions, 0)[0].tolist()
        return blocks[block][at]

    return draw


STRATEGIES.update({cls.name: cls for cls in (UCBSpec, EXP3Spec)})
