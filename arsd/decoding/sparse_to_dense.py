"""``std``: the same weights over a few entries of the prompt draft, the dense pass verifies (Sparse-to-Dense)."""

from __future__ import annotations

from dataclasses import replace

from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module

from arsd.decoding.chain import ChainDrafter
from arsd.decoding.model_strategies import check_length
from arsd.decoding.options import number, one_of, whole
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.types import FixedWindow, Parts
from arsd.errors import StrategyError
from arsd.models.selection import POLICIES
from arsd.models.sparse_draft import SparseDraft


class SparseToDense(DecodingStrategy):
    """Sparse-to-Dense decoding (StD, arXiv 2505.19155) of Video-LLMs; training-free, lossless.

    Drafts come from the target's own weights, which attend to all text and to a few visual entries of the prompt; one dense
    pass verifies them. It pays where reading the keys and values costs more than reading the weights: long videos, large
    batches (:class:`arsd.decoding.costs.PassCosts`). Without pictures in the prompt, all of it but its first 4 and its
    latest 64 tokens may be left out.

    Args:
        budget: visual entries that a draft attends to, for each layer and key/value head; ``all`` keeps every one. The paper
            counts the text in: 1024 minus the length of the text.
        draft_length: guesses per dense pass.
        policy: which entries: ``std`` (attention of the question), ``streaming-llm``, ``h2o``, ``token-select``,
            ``sim-layer-kv`` (:mod:`arsd.models.selection`).
        refresh: choose anew, by the queries of a verifying pass, while the running share of accepted guesses is below this;
            ``None``: once, in the prefill, as the paper does.
        coupling: ``gumbel``: guesses and tokens share one Gumbel noise per position, and the output equals plain AR token
            for token. ``rejection``: speculative sampling.
        pass_tokens: tokens per dense pass, at least ``draft_length + 1``; ``None`` means that.

    Raises:
        StrategyError: for values that do not fit.
    """

    name = "std"

    @register_to_config
    def __init__(
        self,
        budget: int | str = 1024,
        draft_length: int = 9,
        policy: str = "std",
        refresh: float | None = None,
        coupling: str = "gumbel",
        pass_tokens: int | None = None,
    ) -> None:
        if budget != "all":
            whole("budget", budget, 1, " or all")
        check_length(draft_length, pass_tokens)
        one_of("policy", policy, tuple(POLICIES))
        if refresh is not None:
            number("refresh", refresh, 0, otherwise=" or none")
        one_of("coupling", coupling, ("gumbel", "rejection"))

    @property
    def seed_exact(self) -> bool:  # type: ignore[override]
        """Only the ``gumbel`` coupling gives plain AR's own tokens; the other only its law."""
        return bool(self.config["coupling"] == "gumbel")

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`.

        Raises:
            StrategyError: when the attention of the model cannot be observed.
        """
        if setting.kernel not in ("", "sdpa"):
            raise StrategyError(f"attn_implementation={setting.kernel!r} cannot be observed: load the model with 'sdpa'")
        budget = None if self.config["budget"] == "all" else self.config["budget"]
        options = self.config["policy"], budget, self.config["refresh"]
        rule = SeedExact() if self.seed_exact else RejectionSampling()
        window = self.config["draft_length"] + 1
        drafts = replace(setting, window=window, rule=rule, draft_model=lambda window: SparseDraft(*options))
        return Parts(ChainDrafter(drafts), rule, FixedWindow(window), self.config["pass_tokens"] or window)


STRATEGIES[SparseToDense.name] = SparseToDense
