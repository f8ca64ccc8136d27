"""The target's own weights over a few entries of the prompt: the :class:`arsd.decoding.types.DraftModel` of StD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from arsd.decoding.types import Target
from arsd.errors import StrategyError
from arsd.models.attention import observed
from arsd.models.compact_cache import CompactCache
from arsd.models.selection import POLICIES, SINKS, Attention, Policy, keep, shares
from arsd.models.visual import visual_mask

UNSEEN = "std cannot look into the attention of this model: its layers do not go through sdpa"
RECENT = 64  # latest tokens of a prompt without pictures that are always kept
SMOOTHING = 0.8  # of the running acceptance


class Choice:
    """Looks on in passes of the target and chooses the entries of the prompt; an :class:`arsd.models.attention.Observer`.

    Args:
        target: whose passes; a :class:`arsd.generation_parts.ModelTarget`.
        policy: what entries are worth.
        budget: visual entries per layer and key/value head, on average; ``None`` keeps all.
        done: called when the last layer was seen.
    """

    def __init__(self, target: Any, policy: Policy, budget: int | None, done: Callable[[], None]) -> None:
        self.target, self.policy, self.done = target, policy, done
        size = target.prefix - 1  # the last token of the prompt is always seen: drafts begin with it
        padding = torch.zeros(target.condition.shape[:3], dtype=torch.bool, device=target.device)
        padding = padding if target.padding is None else target.padding
        self.hidden = padding.flatten(0, 1)[:, :size]
        self.visual = self._candidates(target, padding).flatten(0, 1)[:, :size]
        self.budget = size if budget is None else budget
        self.worth: dict[int, Tensor] = {}
        self.weights: dict[int, float] = {}

    @staticmethod
    def _candidates(target: Any, padding: Tensor) -> Tensor:
        """[S, M, P] what may be left out: pictures, or else what lies between the first and the latest tokens."""
        ids = target.prompt.ids
        if ids is not None:
            visual = visual_mask(target.model.config, ids) & ~padding
            if bool(visual.any()):
                return visual
        place = (~padding).long().cumsum(-1)
        return (place > SINKS) & (place <= place[..., -1:] - RECENT)

    def mask(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """See :class:`arsd.models.attention.Observer`."""
        return mask

    def saw(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """See :class:`arsd.models.attention.Observer`."""
        size, device = self.hidden.shape[1], key.device
        slots = self.target.cache.places.to(device)
        width = self.target.reach  # of a verifying pass that is the prompt and the text so far
        visual, hidden = (pad(x, (0, width - size)).to(device) for x in (self.visual, self.hidden))
        last = torch.where(visual.any(1), width - visual.flip(1).long().argmax(1), 0)  # behind the last picture
        voters = slots >= last.clamp_max(width - 1)[:, None]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        before = pad(self.worth[layer], (0, width - size)) if layer in self.worth else None
        seen = Attention(query, key[:, :, :width], scale, slots, hidden, visual, voters, before)
        worth, self.weights[layer] = self.policy(seen)
        self.worth[layer] = worth[..., :size]
        if layer == len(self.target.cache.layers) - 1:
            self.done()

    def entries(self) -> list[Any]:
        """What every layer keeps, by what was seen."""
        layers = range(len(self.target.cache.layers))
        if len(self.worth) != len(layers):
            raise StrategyError(UNSEEN)
        most = max(1, int(self.visual.sum(1).max()))
        budgets = shares([self.weights[i] for i in layers], min(self.budget, most), most)
        parts = zip((self.worth[i] for i in layers), budgets, strict=True)
        return [keep(worth, self.visual.to(worth.device), self.hidden.to(worth.device), n) for worth, n in parts]


class SparseDraft:
    """A sparse pass of the target's own weights: all text, and of the pictures what a policy kept (StD, arXiv 2505.19155).

    The choice is made from what the queries of the prefill attend to, beside the ordinary kernel (of a prompt of plain text
    the last token's is not among them). Entries of committed tokens are the dense pass's own.

    Args:
        policy: a name of :data:`arsd.models.selection.POLICIES`.
        budget: visual entries per layer and key/value head; ``None``: all.
        refresh: choose anew from the queries of the next verifying pass while the running share of accepted guesses is below
            this; ``None``: never.
    """

    def __init__(self, policy: str, budget: int | None, refresh: float | None) -> None:
        self.policy, self.budget, self.refresh = POLICIES[policy], budget, refresh
        self.cache: CompactCache | None = None
        self.acceptance, self.refreshes = 1.0, 0
        self.starts: list[int] = []
        self.drafted = 0

    def begin(self, target: Target) -> None:
        """Look on in the prefill.

        Raises:
            StrategyError: for a target that is no model of texts.
        """
        if not hasattr(target, "observer"):
            raise StrategyError("std drafts on the prompt's keys and values: use it with VideoLLMPipeline or generate_fn")
        self.target = cast(Any, target)
        self.choice = target.observer = Choice(target, self.policy, self.budget, self._choose)
        self.known = [0] * self.target.batch

    def catch_up(self, tokens: Tensor, read: list[int], columns: list[int]) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        target = self.target
        starts = [n + c for n, c in zip(read, columns, strict=True)]
        every = starts * target.streams
        if self.cache is None:
            raise StrategyError(UNSEEN)
        self._watch(starts)
        first = [max(0, min(n, m)) for n, m in zip(self.known, starts, strict=True)]
        width = max(m - n for n, m in zip(first, starts, strict=True))
        if width:
            at = torch.tensor(first * target.streams, device=target.device)
            self.cache.copy(at, width, target.unread)
        self.known, self.starts, self.drafted = list(starts), list(starts), 0
        self.lengths, last = torch.tensor([starts, columns], device=target.device)  # -1 in rows that are finished
        return self._pass(tokens.gather(1, last.clamp_min(0)[:, None]), every)

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        self.lengths, self.starts = self.lengths + 1, [n + 1 for n in self.starts]
        return self._pass(tokens[:, None], self.starts * self.target.streams)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Not supported.

        Raises:
            StrategyError: always.
        """
        raise StrategyError("std cannot begin another text in a freed row: leave out batch_size")

    def _pass(self, tokens: Tensor, starts: list[int]) -> Tensor:
        assert self.cache is not None
        lengths = self.lengths.repeat(self.target.streams)
        positions, mask = self.cache.begin_row_passes(lengths, starts, 1)
        self.drafted += 1
        with observed(self.target.model, self.cache):
            logits = self.target.pass_over(self.cache, tokens, self.lengths, positions, mask)
        return logits[:, :, -1]

    def _choose(self) -> None:
        """A pass was seen: hold what the policy chose, from now on."""
        dense = self.target.cache
        if self.cache is None:
            self.cache = CompactCache(dense, dense.get_max_length() - self.target.prefix + 1)
        else:
            self.refreshes += 1
        self.cache.keep(self.choice.entries())
        self.target.observer = None

    def _watch(self, starts: list[int]) -> None:
        """Keep the running acceptance; let the choice be made anew when it is low."""
        if self.refresh is None:
            return
        moved = [m - n - 1 for n, m in zip(self.known, starts, strict=True) if m > n]
        if self.drafted and any(n <= self.drafted for n in moved):  # else other drafters came between
            share = sum(min(n, self.drafted) for n in moved) / (self.drafted * len(moved))
            self.acceptance = SMOOTHING * self.acceptance + (1 - SMOOTHING) * share
        if self.acceptance < self.refresh:
            self.target.observer = self.choice
