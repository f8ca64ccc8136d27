"""Relaxed strategies: a chain of the draft model's guesses under a rule that changes the law, and says by how much.

All of them report ``stats.expected_changed_tokens``: the summed total variation of the slots that were reached, a bound on
how far the law of a picture has moved only while it is below 1.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module

from arsd.decoding.model_strategies import chain_parts, check_length, tree_parts
from arsd.decoding.registry import bound, find_rule, made_rule
from arsd.decoding.siblings import SiblingSampling
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.types import Parts
from arsd.errors import StrategyError


class RelaxedStrategy(DecodingStrategy):
    """A chain of guesses of the draft model under a registered rule; the strategy's options are the rule's.

    Attributes:
        rule_name: the registered rule.
    """

    lossless = False
    seed_exact = False
    rule_name = ""

    @property
    def _options(self) -> dict[str, Any]:
        own = ("draft_length", "pass_tokens", "tree")
        return {k: v for k, v in self.config.items() if not k.startswith("_") and k not in own}

    @property
    def rule(self) -> str:
        """The rule as ``sjd:acceptance=`` and ``speculative:rule=`` take it: ``name:key=value:key=value``."""
        return ":".join([self.rule_name, *(f"{k}={v}" for k, v in self._options.items())])

    def _check(self) -> None:
        """Raise StrategyError for options that do not fit."""
        check_length(self.config["draft_length"], self.config["pass_tokens"], self.config.get("tree"))
        made_rule(find_rule(self.rule_name), self._options)

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        rule = bound(made_rule(find_rule(self.rule_name), self._options), setting)
        return chain_parts(setting, rule, self.config["draft_length"], self.config["pass_tokens"])


class CoolSD(RelaxedStrategy):
    """COOL-SD (arXiv 2601.09212), clamped: annealed relaxation of speculative sampling; not lossless.

    Args: those of :class:`arsd.decoding.relaxed.CoolSDRule`, and
        draft_length: guesses per pass.
        tree: a tree of guesses in the place of the chain, as for :class:`arsd.Eagle`; the factors are then those of the
            depths, and there can be no budget.
        pass_tokens: tokens per pass, at least ``draft_length + 1`` or the columns of the tree; ``None`` means that.
    """

    name = rule_name = "cool-sd"

    @register_to_config
    def __init__(
        self,
        delta: float = 1.1,
        nu: float = 0.7,
        draft_length: int = 4,
        normalize: str | None = "mean",
        floor: float = 1.0,
        budget: float | None = None,
        tree: str | int | None = None,
        pass_tokens: int | None = None,
    ) -> None:
        self._check()
        if tree is not None and budget is not None:
            raise StrategyError("a budget is kept on chains only: leave out tree or budget")

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        if self.config["tree"] is None:
            return super().build(setting)
        schedule = made_rule(find_rule(self.rule_name), self._options).schedule
        return tree_parts(setting, SiblingSampling(schedule), self.config["tree"], self.config["pass_tokens"])


class PublishedCoolSD(CoolSD):
    """COOL-SD as published (arXiv 2601.09212): later guesses are taken less readily than by speculative sampling.

    That gains no fidelity, so :class:`CoolSD` does not do it by default. Not lossless.

    Args: those of :class:`CoolSD` that the paper has, ``tree`` and ``pass_tokens``.
    """

    name = rule_name = "cool-sd-published"

    @register_to_config
    def __init__(
        self,
        delta: float = 1.1,
        nu: float = 0.7,
        draft_length: int = 4,
        normalize: str | None = "mean",
        tree: str | int | None = None,
        pass_tokens: int | None = None,
    ) -> None:
        self._check()


class Lantern(RelaxedStrategy):
    """LANTERN (arXiv 2410.03355): the mass of a guess's nearest codes counts for it; not lossless.

    Args: those of :class:`arsd.decoding.lantern.LanternRule`, and ``draft_length`` and ``pass_tokens`` of :class:`CoolSD`.
    """

    name = rule_name = "lantern"

    @register_to_config
    def __init__(
        self, k: int = 1000, delta: float = 0.2, residual: str = "own", draft_length: int = 4, pass_tokens: int | None = None
    ) -> None:
        self._check()


class LanternPlusPlus(RelaxedStrategy):
    """LANTERN++ (arXiv 2502.06352): LANTERN with a bound in proportion to the guess's own probability; not lossless.

    Args: those of :class:`arsd.decoding.lantern.LanternPlusPlusRule`, and ``draft_length`` and ``pass_tokens`` of
        :class:`CoolSD`.
    """

    name = rule_name = "lantern-plus-plus"

    @register_to_config
    def __init__(
        self, k: int = 10, lam: float = 5.0, residual: str = "own", draft_length: int = 4, pass_tokens: int | None = None
    ) -> None:
        self._check()


class GroupedSD(RelaxedStrategy):
    """Grouped speculative decoding (GSD, arXiv 2508.07747): groups of codes stand in for one another; not lossless.

    Args: those of :class:`arsd.decoding.grouped.GroupedRule`, and ``draft_length`` and ``pass_tokens`` of :class:`CoolSD`.
    """

    name = rule_name = "grouped"

    @register_to_config
    def __init__(
        self,
        group: int = 10,
        spread: float = 0.15,
        radius: float = 0.5,
        residual: str = "optimal",
        draft_length: int = 4,
        pass_tokens: int | None = None,
    ) -> None:
        self._check()


STRATEGIES.update({cls.name: cls for cls in (CoolSD, PublishedCoolSD, Lantern, LanternPlusPlus, GroupedSD)})
