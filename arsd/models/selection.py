"""Which entries of a prompt a sparse draft pass attends to: one function per published policy, all with one signature.

A policy says what every entry is worth in one layer and key/value head, and how much of the budget the layer gets. The text
of the prompt is always kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SINKS = 4  # first entries, which draw attention whatever they hold (StreamingLLM)
LAZY_ROWS = 32  # last queries that tell a lazy layer (SimLayerKV)
LAZY_RECENT = 1020  # recent entries that a lazy layer looks at
LAZY_SHARE = 0.9  # of the attention that goes to sinks and recent entries in a lazy layer
CHUNK = 1 << 24  # scores in one piece


@dataclass
class Attention:
    """What one layer attended to in a pass over the prompt, or over a part of the answer.

    Args:
        query: [R, H, T, d] behind the rotary embedding; the heads of a group lie side by side.
        key: [R, G, S, d] of the prompt, and of the answer as far as the pass goes.
        scaling: of the scores.
        slots: [R, T] entry that each query belongs to; it sees that one and those before it.
        hidden: [R, S] padding.
        visual: [R, S] entries that stand for pictures.
        voters: [R, T] queries of text behind the pictures.
        before: [R, G, S] what the policy said of the layer in its last pass, ``None`` in the first one.
    """

    query: Tensor
    key: Tensor
    scaling: float
    slots: Tensor
    hidden: Tensor
    visual: Tensor
    voters: Tensor
    before: Tensor | None = None

    def received(self, queries: Tensor) -> Tensor:
        """[R, G, S] attention of the marked ``queries`` [R, T], summed over them and over the heads of each group."""
        rows, heads, width, head_dim = self.query.shape
        groups, size = self.key.shape[1:3]
        marked = queries.any(0).nonzero()[:, 0]
        total = torch.zeros(rows, groups, size, device=self.key.device)
        entries, keys = torch.arange(size, device=self.key.device), self.key.float()
        for part in marked.split(max(1, CHUNK // (rows * heads * size))):
            query = self.query[:, :, part].float().view(rows, groups, -1, head_dim)
            scores = (query @ keys.transpose(-1, -2) * self.scaling).view(rows, groups, -1, len(part), size)
            seen = (entries <= self.slots[:, part, None]) & ~self.hidden[:, None]
            probs = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num()
            total += (probs * queries[:, None, None, part, None]).sum((2, 3))
        return total

    def last(self, count: int) -> Tensor:
        """[R, T] the last ``count`` queries of every row."""
        width = self.slots.shape[1]
        return (torch.arange(width, device=self.slots.device) >= width - count).expand(len(self.slots), -1)


Policy = Callable[[Attention], tuple[Tensor, float]]


def by_text(attention: Attention) -> tuple[Tensor, float]:
    """StD (arXiv 2505.19155): attention of the text behind the pictures, summed over the heads of a group."""
    return attention.received(attention.voters), 1.0


def sinks_and_window(attention: Attention) -> tuple[Tensor, float]:
    """StreamingLLM (arXiv 2309.17453) as MagicDec drafts with it: the first entries and the latest ones."""
    size = attention.hidden.shape[1]
    age = torch.arange(size, device=attention.hidden.device).float().expand_as(attention.hidden)
    place = attention.visual.long().cumsum(1)
    worth = torch.where(attention.visual & (place <= SINKS), age + size, age)
    return worth[:, None].expand(-1, attention.key.shape[1], -1), 1.0


def accumulated(attention: Attention) -> tuple[Tensor, float]:
    """H2O (arXiv 2306.14048): attention of all queries so far, summed up."""
    received = attention.received(torch.ones_like(attention.voters))
    return received if attention.before is None else received + attention.before, 1.0


def soft_vote(attention: Attention) -> tuple[Tensor, float]:
    """TokenSelect (arXiv 2411.02886): the last query's attention, summed over all heads; one choice for the layer."""
    received = attention.received(attention.last(1))
    return received.sum(1, keepdim=True).expand_as(received), 1.0


def lazy_layers(attention: Attention) -> tuple[Tensor, float]:
    """SimLayerKV (arXiv 2410.13846) for the budget, StD for the choice: lazy layers leave their budget to the others.

    A layer is lazy when its last queries give 90 % of their attention to the first 4 entries and the 1020 latest ones (or
    the latest tenth of a prompt shorter than 10,200). It gets a tenth of what
    the others get.
    """
    size = attention.hidden.shape[1]
    recent = min(LAZY_RECENT, size // 10)
    received = attention.received(attention.last(LAZY_ROWS))
    place = (~attention.hidden).long().cumsum(1)
    near = ((place <= SINKS) | (place > place[:, -1:] - recent)) & ~attention.hidden
    share = float((received * near[:, None]).sum() / received.sum().clamp_min(1e-9))
    return attention.received(attention.voters), 0.1 if share > LAZY_SHARE else 1.0


POLICIES: dict[str, Policy] = {
    "std": by_text,
    "streaming-llm": sinks_and_window,
    "h2o": accumulated,
    "token-select": soft_vote,
    "sim-layer-kv": lazy_layers,
}


@dataclass
class Kept:
    """The entries that one layer keeps.

    Args:
        index: [R, G, K] entries of the prompt in ascending order.
        hidden: [R, K] places that hold nothing, at the end of rows that keep less.
    """

    index: Tensor
    hidden: Tensor


def keep(worth: Tensor, visual: Tensor, hidden: Tensor, budget: int) -> Kept:
    """All text and the ``budget`` visual entries that are worth most, for each key/value head.

    Args:
        worth: [R, G, S].
        visual: [R, S].
        hidden: [R, S].
        budget: visual entries.
    """
    size = worth.shape[-1]
    counts = (~visual & ~hidden).sum(1) + (visual & ~hidden).sum(1).clamp_max(budget)
    worth = worth.float().nan_to_num().masked_fill((~visual)[:, None], torch.inf).masked_fill(hidden[:, None], -torch.inf)
    best = worth.topk(int(counts.max()), dim=-1).indices
    unused = torch.arange(best.shape[-1], device=best.device) >= counts[:, None]
    index = best.masked_fill(unused[:, None], size).sort(-1).values
    return Kept(index.clamp_max(size - 1), unused)


def shares(weights: list[float], budget: int, most: int) -> list[int]:
    """The budget of every layer, ``budget`` on average, at most ``most`` each: by their weights, and never less than 1."""
    whole, given = budget * len(weights), [0] * len(weights)
    open_layers = list(range(len(weights)))
    while open_layers:
        total = sum(weights[i] for i in open_layers)
        asked = {i: whole * weights[i] / total for i in open_layers}
        full = [i for i in open_layers if asked[i] >= most]
        for i in full or open_layers:
            given[i] = most if full else max(1, int(asked[i]))
        if not full:
            break
        whole -= most * len(full)
        open_layers = [i for i in open_layers if i not in full]
    return given
