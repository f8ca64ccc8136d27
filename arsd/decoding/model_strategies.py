"""Strategies with a draft model (the pipeline's component ``drafter``)."""

from __future__ import annotations

from dataclasses import replace

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module

from arsd.decoding.chain import ChainDrafter, HybridDrafter
from arsd.decoding.drafters import INITS
from arsd.decoding.options import number, one_of, whole
from arsd.decoding.registry import register_drafter
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.decoding.siblings import SeedExactTree, SiblingSampling
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting, auto_window
from arsd.decoding.tree_drafter import TreeDrafter
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import FixedWindow, Parts, Rule
from arsd.errors import StrategyError


@register_drafter("draft-model")
def chain_of_a_window(setting: Setting) -> ChainDrafter:
    """A chain of the draft model's guesses that fills the window."""
    return ChainDrafter(setting)


register_drafter("hybrid")(HybridDrafter)


class Eagle(DecodingStrategy):
    """A chain of guesses of the pipeline's draft model (EAGLE, arXiv 2401.15077, or a small AR model); lossless.

    Args:
        draft_length: guesses per pass.
        tree: a tree of guesses in the place of the chain, such as ``3x2x1``: children of each node by depth
            (:class:`arsd.decoding.trees.TreeShape`).
        coupling: ``gumbel``: guesses and tokens share one Gumbel noise per position, and the output equals plain AR token
            for token. ``rejection``: speculative sampling (Leviathan et al. 2023), of a tree's siblings one by one.
        pass_tokens: tokens per pass, at least ``draft_length + 1`` or the columns of the tree; ``None`` means that.
    """

    name = "eagle"
    _RULES: dict[str, tuple[type, type]] = {
        "gumbel": (SeedExact, SeedExactTree),
        "rejection": (RejectionSampling, SiblingSampling),
    }

    @register_to_config
    def __init__(
        self,
        draft_length: int = 4,
        coupling: str = "gumbel",
        tree: str | int | None = None,
        pass_tokens: int | None = None,
    ) -> None:
        check_length(draft_length, pass_tokens, tree)
        one_of("coupling", coupling, tuple(self._RULES))

    @property
    def seed_exact(self) -> bool:  # type: ignore[override]
        """Only the ``gumbel`` coupling gives plain AR's own tokens; the other only its law."""
        return bool(self.config["coupling"] == "gumbel")

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        for_chains, for_trees = self._RULES[self.config["coupling"]]
        if self.config["tree"] is not None:
            return tree_parts(setting, for_trees(), self.config["tree"], self.config["pass_tokens"])
        return chain_parts(setting, for_chains(), self.config["draft_length"], self.config["pass_tokens"])


class Hybrid(DecodingStrategy):
    """The draft model's guesses at the front of the window and Jacobi iterates behind them; lossless, seed-exact.

    Under the seed-exact rule any mixture of guesses gives plain AR's tokens.

    Args:
        draft_length: guesses of the draft model per pass.
        weight: of the draft model's law against what the last pass said of a position; ``None`` leaves out the latter
            (:class:`arsd.decoding.chain.HybridDrafter`).
        window: slots per pass, more than ``draft_length``; ``auto`` as for :class:`SJD`.
        init: what a Jacobi slot holds when it enters the window, as for :class:`SJD`.
        pass_tokens: tokens per pass, at least ``window``; ``None`` means ``window``.
    """

    name = "hybrid"

    @register_to_config
    def __init__(
        self,
        draft_length: int = 2,
        weight: float | None = 0.05,
        window: int | str = "auto",
        init: str = "uniform",
        pass_tokens: int | None = None,
    ) -> None:
        whole("draft_length", draft_length, 1)
        if weight is not None:
            number("weight", weight, 0, otherwise=" or none")
        if window != "auto" and whole("window", window, 2, " or auto") <= draft_length:
            raise StrategyError(f"window ({window}) must be more than draft_length ({draft_length})")
        if pass_tokens is not None:
            whole("pass_tokens", pass_tokens, draft_length + 1 if window == "auto" else int(window))
        one_of("init", init, INITS)

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        window = max(
            auto_window(self.config["window"], self.config["pass_tokens"], setting), self.config["draft_length"] + 1
        )
        rule = SeedExact()
        options = (self.config["draft_length"], self.config["weight"], self.config["init"])
        drafter = HybridDrafter(replace(setting, window=window, rule=rule), *options)
        return Parts(drafter, rule, FixedWindow(window), self.config["pass_tokens"] or window)


def check_length(draft_length: int, pass_tokens: int | None, tree: str | int | None = None) -> None:
    """Raise StrategyError for lengths that make no sense."""
    whole("draft_length", draft_length, 1)
    least, what = draft_length + 1, "draft_length + 1"
    if tree is not None:
        least, what = TreeShape.parse(tree).columns, f"the columns of tree {tree}"
    if pass_tokens is not None and whole("pass_tokens", pass_tokens, 1) < least:
        raise StrategyError(f"pass_tokens ({pass_tokens}) must be at least {what} ({least})")


def chain_parts(setting: Setting, rule: Rule, draft_length: int, pass_tokens: int | None) -> Parts:
    """A chain of the draft model's guesses under a rule."""
    window = draft_length + 1
    drafter = ChainDrafter(replace(setting, window=window, rule=rule))
    return Parts(drafter, rule, FixedWindow(window), pass_tokens or window)


def tree_parts(setting: Setting, rule: Rule, tree: str | int, pass_tokens: int | None) -> Parts:
    """A tree of the draft model's guesses under a rule that judges trees."""
    drafter = TreeDrafter(replace(setting, rule=rule), str(tree))
    return Parts(drafter, rule, FixedWindow(drafter.tree.depth + 1), pass_tokens or drafter.tree.columns)


STRATEGIES.update({cls.name: cls for cls in (Eagle, Hybrid)})
