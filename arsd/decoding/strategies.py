"""Decoding strategies: what a user picks. Configuration only; a call builds its own parts, so one object can be shared.

They are schedulers in diffusers' sense (as its discrete and block-refinement schedulers are): they live in a pipeline as the
component ``decoder``, save to ``decoder_config.json`` and round-trip through ``from_config``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from arsd.decoding.drafters import INITS, Jacobi, NoDraft, Redraft, redraft_by_gumbel, redraft_by_rule, redraft_independently
from arsd.decoding.laws import Grammar, Laws
from arsd.decoding.noise import Noise
from arsd.decoding.options import one_of, whole
from arsd.decoding.registry import Registered, bound, find_rule, made_rule, parse_value, split_part
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.decoding.types import DraftModel, FixedWindow, Parts, Rule
from arsd.errors import StrategyError

if TYPE_CHECKING:
    from arsd.decoding.costs import PassCosts
    from arsd.profile import Profile


FALLBACK_WINDOW = 16  # for window="auto" where nothing was measured


@dataclass
class Setting:
    """What a strategy may need to know of a call.

    ``profile`` is what was measured of the model on this kind of device; ``laws`` make the law of a draft model's logits;
    ``codebook`` [V, C] are the vectors of the image codes; ``draft_model`` makes the call's own draft model
    (:class:`arsd.decoding.types.DraftModel`) for a window; ``given`` [M, F] are the tokens that pictures begin with.
    ``prompt`` [M, K] are the ids of a text before its first token, -1 where there is none (padding); ``None`` where the
    condition is no text; ``kernel`` is the attention implementation of the model behind it. ``chains_only``: trees of
    guesses are refused. ``costs`` say what passes cost, by the sizes of the model. ``frame_length`` are the tokens from one
    frame of a clip to the next (0 in pictures and text). ``window`` and ``rule`` are what a strategy tells the drafter that
    it builds.
    """

    batch: int
    num_tokens: int
    row_length: int
    grammar: Grammar
    noise: Noise
    device: torch.device
    profile: Profile | None = None
    laws: Laws | None = None
    codebook: torch.Tensor | None = None
    draft_model: Callable[[int], DraftModel] | None = None
    given: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    kernel: str = ""
    chains_only: bool = False
    costs: PassCosts | None = None
    frame_length: int = 0
    window: int = 1
    rule: Rule | None = None


class DecodingStrategy(SchedulerMixin, ConfigMixin):
    """Base of all strategies.

    Attributes:
        name: what it is called on the command line.
        lossless: whether the output has exactly the law of plain autoregressive decoding.
        seed_exact: whether the tokens are exactly those of plain autoregressive decoding with the same seed.
    """

    config_name = "decoder_config.json"
    name = ""
    lossless = True
    seed_exact = True

    def build(self, setting: Setting) -> Parts:
        """The parts for one call."""
        raise NotImplementedError

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return list(STRATEGIES.values())

    def __str__(self) -> str:
        """The strategy as the command line takes it, with the options that are not at their default."""
        defaults = {k: v for k, v in type(self)().config.items() if not k.startswith("_")}
        given = [f"{k}={self.config[k]}" for k, v in defaults.items() if self.config[k] != v]
        return self.name + (":" + ",".join(given) if given else "")


def auto_window(window: int | str, pass_tokens: int | None, setting: Setting) -> int:
    """The window of a call: as given; for ``auto`` the whole pass, else the fastest by the profile, else 16."""
    if window != "auto":
        return int(window)
    if pass_tokens:
        return int(pass_tokens)
    return setting.profile.window(setting.batch) if setting.profile is not None else FALLBACK_WINDOW


class Autoregressive(DecodingStrategy):
    """Plain autoregressive decoding: one token per pass. The reference of every comparison.

    Args:
        pass_tokens: tokens per pass; ``None`` means 1, the fastest form (``ar``). With the ``pass_tokens`` of another
            strategy, the first slot is used and the rest is padding: the identity reference (``ar@W``).
    """

    name = "ar"

    @register_to_config
    def __init__(self, pass_tokens: int | None = None) -> None:
        if pass_tokens is not None:
            whole("pass_tokens", pass_tokens, 1)

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        return Parts(NoDraft(), SeedExact(), FixedWindow(1), self.config["pass_tokens"] or 1)


class SJD(DecodingStrategy):
    """Speculative Jacobi Decoding (arXiv 2410.01699) with a choice of couplings between iterates; training-free.

    Lossless, unless ``acceptance`` names a relaxed rule.

    Args:
        window: slots per pass: the last committed token and ``window - 1`` guesses; 1 is plain autoregressive decoding.
            ``auto``: the fastest one by the measured profile of the model on this kind of device, for the batch of the call
            (:mod:`arsd.profile`); 16 where there is none. With ``pass_tokens`` given, the whole pass.
        coupling: how a guess depends on its predecessor in the last pass.

            - ``gumbel``: one Gumbel noise per position decides tokens and guesses (fixed point of arXiv 2002.09928). The
              output equals plain AR token for token.
            - ``maximal``: the accept-or-residual rule goes on behind the first refusal (SCD-MC, arXiv 2510.24211).
            - ``gumbel-rejection``: Gumbel-coupled guesses, verified by speculative sampling (SCD-GS, same paper).
            - ``independent``: fresh draws, as SJD was published.
        init: what a slot holds when it enters the window: ``uniform``, ``random``, ``left``, ``above`` or (in clips)
            ``previous-frame``; see :class:`arsd.decoding.drafters.Jacobi`.
        pass_tokens: tokens per pass, at least ``window``; ``None`` means ``window``. It belongs to the identity of a sample
            in reduced precision, ``window`` does not.
        acceptance: another rule that judges the guesses, by its registered name with options, as in
            ``cool-sd:delta=2:nu=0.7`` (:func:`arsd.register_rule`); also a strategy that names one (its ``rule``). The
            promises are then those of the rule. A rule that needs q goes with the couplings ``independent`` (which it gets
            in the place of ``gumbel``) and ``gumbel-rejection``; ``maximal`` needs one that judges every slot.

    Raises:
        StrategyError: for values that do not fit.
    """

    name = "sjd"
    _COUPLINGS: dict[str, tuple[Redraft, bool]] = {
        "gumbel": (redraft_by_rule, False),
        "maximal": (redraft_by_rule, True),
        "gumbel-rejection": (redraft_by_gumbel, True),
        "independent": (redraft_independently, True),
    }

    @register_to_config
    def __init__(
        self,
        window: int | str = "auto",
        coupling: str = "gumbel",
        init: str = "uniform",
        pass_tokens: int | None = None,
        acceptance: str | DecodingStrategy | None = None,
    ) -> None:
        if window != "auto":
            whole("window", window, 1, " or auto")
        one_of("coupling", coupling, tuple(self._COUPLINGS))
        one_of("init", init, INITS)
        if pass_tokens is not None and whole("pass_tokens", pass_tokens, 1) < (1 if isinstance(window, str) else window):
            raise StrategyError(f"pass_tokens ({pass_tokens}) must be at least window ({window})")
        if isinstance(acceptance, DecodingStrategy):
            self.register_to_config(acceptance=_rule_of(acceptance))
        if acceptance is not None:
            self._coupling_under(made_rule(*self._acceptance))

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """Whether the rule is; all of SJD's own are."""
        return self.config["acceptance"] is None or self._acceptance[0].lossless

    @property
    def seed_exact(self) -> bool:  # type: ignore[override]
        """Only the ``gumbel`` coupling gives plain AR's own tokens; the others only its law."""
        if self.config["acceptance"] is not None:
            return self._acceptance[0].seed_exact
        return bool(self.config["coupling"] == "gumbel")

    @property
    def _acceptance(self) -> tuple[Registered, dict[str, Any]]:
        name, options = split_part(self.config["acceptance"])
        return find_rule(name), options

    def _coupling_under(self, rule: Rule) -> str:
        """The coupling that is sound under another rule."""
        coupling = str(self.config["coupling"])
        if not getattr(rule, "needs_law", False) or coupling in ("independent", "gumbel-rejection"):
            return coupling
        if coupling == "gumbel":
            return "independent"
        if not getattr(rule, "every_slot", False):
            raise StrategyError(
                f"coupling=maximal needs a rule that judges every slot, which {self.config['acceptance']!r} does not: "
                "use independent or gumbel-rejection"
            )
        return coupling

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        window = auto_window(self.config["window"], self.config["pass_tokens"], setting)
        pass_tokens = self.config["pass_tokens"] or window
        rule, redraft = self._rule_and_redraft(setting)
        needs_law = bool(getattr(rule, "needs_law", False))
        if window == 1 and isinstance(rule, SeedExact):
            return Parts(NoDraft(), rule, FixedWindow(1), pass_tokens)
        drafter = Jacobi.of(setting, redraft, self.config["init"], needs_law, window)
        return Parts(drafter, rule, FixedWindow(window), pass_tokens)

    def _rule_and_redraft(self, setting: Setting) -> tuple[Rule, Redraft]:
        coupling = self.config["coupling"]
        if self.config["acceptance"] is not None:
            rule = bound(made_rule(*self._acceptance), setting)
            return rule, self._COUPLINGS[self._coupling_under(rule)][0]
        redraft, needs_law = self._COUPLINGS[coupling]
        return RejectionSampling(every_slot=coupling == "maximal") if needs_law else SeedExact(), redraft


def _rule_of(strategy: DecodingStrategy) -> str:
    """The rule that a strategy names."""
    if strategy.config.get("tree") is not None:
        raise StrategyError(f"acceptance takes the rule of {str(strategy)!r}, but not its tree: leave out tree")
    rule = strategy.config["rule"] if "rule" in strategy.config else getattr(strategy, "rule", None)
    if not isinstance(rule, str):
        raise StrategyError(f"acceptance must name a rule, and {str(strategy)!r} has none: write name:key=value:key=value")
    return rule


STRATEGIES: dict[str, type[DecodingStrategy]] = {cls.name: cls for cls in (Autoregressive, SJD)}


def parse_strategy(text: str) -> DecodingStrategy:
    """``name`` or ``name:key=value,key=value`` to a strategy, e.g. ``sjd:window=32,coupling=maximal``.

    Raises:
        StrategyError: for an unknown name, an unknown option or a value that does not fit.
    """
    name, _, options = text.strip().partition(":")
    if name not in STRATEGIES:
        raise StrategyError(f"unknown decoder {name!r}: choose from {', '.join(STRATEGIES)}")
    cls = STRATEGIES[name]
    known = {k: v for k, v in cls().config.items() if not k.startswith("_")}
    values: dict[str, Any] = {}
    for item in filter(None, options.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            raise StrategyError(f"{name} has no option {item!r}: its options are {', '.join(known)} (key=value)")
        values[key] = parse_value(value)
    return cls(**values)
