"""``speculative``: any registered drafter under any registered rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module

from arsd.decoding.drafters import Jacobi, NoDraft, redraft_by_gumbel, redraft_by_rule, redraft_independently
from arsd.decoding.grouped import GroupedRule
from arsd.decoding.lantern import LanternPlusPlusRule, LanternRule
from arsd.decoding.options import whole
from arsd.decoding.registry import (
    Registered,
    bound,
    find_drafter,
    find_rule,
    made_rule,
    register_drafter,
    register_rule,
    split_part,
)
from arsd.decoding.relaxed import CoolSDRule, MarginRule, PublishedCoolSDRule
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.decoding.siblings import SeedExactTree, SiblingSampling
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import FixedWindow, Parts
from arsd.errors import StrategyError

register_rule("seed-exact", seed_exact=True)(SeedExact)
register_rule("rejection")(RejectionSampling)
register_rule("cool-sd", lossless=False)(CoolSDRule)
register_rule("cool-sd-published", lossless=False)(PublishedCoolSDRule)
register_rule("lantern", lossless=False)(LanternRule)
register_rule("lantern-plus-plus", lossless=False)(LanternPlusPlusRule)
register_rule("grouped", lossless=False)(GroupedRule)
register_rule("margin", lossless=False)(MarginRule)
register_rule("siblings")(lambda: SiblingSampling())
register_rule("seed-exact-tree", seed_exact=True)(SeedExactTree)


@register_drafter("none")
class Nothing(NoDraft):
    """No guesses: plain AR, at the pass shape of the strategy."""

    def __init__(self, setting: Setting) -> None:
        """Nothing to keep."""


@register_drafter("jacobi")
class JacobiGuesses(Jacobi):
    """Jacobi iterates (see :class:`arsd.decoding.drafters.Jacobi`), redrafted in a way that suits the rule.

    Args:
        setting: of the call.
        init: ``uniform``, ``random``, ``left``, ``above`` or ``previous-frame``.
        redraft: ``rule`` goes on with the rule's own tokens, ``gumbel`` with Gumbel-coupled draws, ``independent`` with
            fresh ones; ``auto`` is ``rule`` where that is sound, else ``independent``.

    Raises:
        StrategyError: for an unknown value, or ``rule`` under a rule that needs q and does not judge every slot.
    """

    needs_law = True  # it can give q, and does for a rule that needs it
    _REDRAFTS = {"rule": redraft_by_rule, "gumbel": redraft_by_gumbel, "independent": redraft_independently}

    def __init__(self, setting: Setting, init: str = "uniform", redraft: str = "auto") -> None:
        needs_law = bool(getattr(setting.rule, "needs_law", False))
        # behind the first refusal such a rule leaves the old guesses, which do not have the law recorded for them
        unsound = needs_law and not getattr(setting.rule, "every_slot", False)
        if redraft == "auto":
            redraft = "independent" if unsound else "rule"
        if redraft not in self._REDRAFTS:
            raise StrategyError(
                f"drafter 'jacobi': unknown redraft {redraft!r}: choose from auto, {', '.join(self._REDRAFTS)}"
            )
        if redraft == "rule" and unsound:
            raise StrategyError(
                "drafter 'jacobi': redraft=rule needs a rule that judges every slot: use redraft=independent"
            )
        super().__init__(
            self._REDRAFTS[redraft],
            init,
            needs_law,
            setting.batch,
            setting.num_tokens,
            setting.row_length,
            setting.window,
            setting.grammar,
            setting.noise,
            setting.device,
            setting.given,
            setting.frame_length,
        )


class Speculative(DecodingStrategy):
    """A registered drafter under a registered rule; the promises are the rule's.

    On the command line: ``speculative:drafter=copy-above,rule=seed-exact,window=16``. Options of a part follow its name, as
    in ``drafter=jacobi:init=left``.

    Args:
        drafter: name of a drafter (:func:`arsd.register_drafter`), with options.
        rule: name of a rule (:func:`arsd.register_rule`), with options.
        window: slots per pass: the last committed token and ``window - 1`` guesses. A drafter of trees has its own.
        pass_tokens: tokens per pass, at least ``window``; ``None`` means ``window``, or the columns of a tree.

    Raises:
        StrategyError: for names, options or numbers that do not fit, and for a rule that needs q under a drafter that
            cannot give it.
    """

    name = "speculative"

    @register_to_config
    def __init__(
        self, drafter: str = "jacobi", rule: str = "seed-exact", window: int = 16, pass_tokens: int | None = None
    ) -> None:
        if drafter is None:  # as the command line reads "none"
            self.register_to_config(drafter="none")
        whole("window", window, 1)
        found, options = self._drafter
        least = 1 if getattr(found.factory, "trees", False) else window  # a tree has its own window, see _tree_parts
        if pass_tokens is not None and whole("pass_tokens", pass_tokens, 1) < least:
            raise StrategyError(f"pass_tokens ({pass_tokens}) must be at least window ({window})")
        found.check_options(options)
        can_give = getattr(found.factory, "needs_law", None)
        self._refuse_without_law(made_rule(*self._rule), can_give is None or bool(can_give))

    @property
    def _drafter(self) -> tuple[Registered, dict[str, Any]]:
        name, options = split_part(self.config["drafter"])
        return find_drafter(name), options

    @property
    def _rule(self) -> tuple[Registered, dict[str, Any]]:
        name, options = split_part(self.config["rule"])
        return find_rule(name), options

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """What the rule was registered with."""
        return self._rule[0].lossless

    @property
    def seed_exact(self) -> bool:  # type: ignore[override]
        """What the rule was registered with."""
        return self._rule[0].seed_exact

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        (found, options), window = self._drafter, self.config["window"]
        rule = bound(made_rule(*self._rule), setting)
        drafter = found.make(replace(setting, window=window, rule=rule), **options)
        self._refuse_without_law(rule, bool(getattr(drafter, "needs_law", False)))
        tree = getattr(drafter, "tree", None)
        if tree is not None:
            return self._tree_parts(drafter, rule, tree)
        guesses = FixedWindow(1 if isinstance(drafter, NoDraft) else window)
        return Parts(drafter, rule, guesses, self.config["pass_tokens"] or window)

    def _tree_parts(self, drafter: Any, rule: Any, tree: TreeShape) -> Parts:
        """A tree has its own window: its depth and one slot more."""
        if not getattr(rule, "trees", False):
            raise StrategyError(f"rule {self.config['rule']!r} judges chains of guesses, not the trees of {self}")
        pass_tokens = self.config["pass_tokens"] or tree.columns
        if pass_tokens < tree.columns:
            raise StrategyError(f"pass_tokens ({pass_tokens}) must be at least {tree.columns}, the columns of tree {tree}")
        return Parts(drafter, rule, FixedWindow(tree.depth + 1), pass_tokens)

    def _refuse_without_law(self, rule: Any, given: bool) -> None:
        if getattr(rule, "needs_law", False) and not given:
            names = self.config["rule"], self.config["drafter"]
            raise StrategyError("rule {!r} needs the law q of the guesses, which drafter {!r} does not give".format(*names))


STRATEGIES[Speculative.name] = Speculative
