"""Grouped speculative decoding (GSD): a guess is judged by the mass of a group of codes that it could be exchanged with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arsd.decoding.lantern import CHUNK, RESIDUALS, codebook_of
from arsd.decoding.options import number, one_of, whole
from arsd.decoding.rules import ChainRule, Slots, _residual

if TYPE_CHECKING:
    from arsd.decoding.strategies import Setting


class GroupedRule(ChainRule):
    """GSD (So et al., ICCV 2025, arXiv 2508.07747): accept with min(1, p(C) / q(C)), C the group of d; not lossless.

    The groups are the paper's dynamic ones, formed anew in every slot: ids are ranked by p (equal ones by id); of the
    ``group`` ranks around d's (moved inwards at either end), C holds d and those ids with |p(x) - p(d)| < ``spread`` and a
    squared distance of codes below ``radius``. The token committed is d itself. Groups of one are speculative sampling. A
    guess with p(d) = 0 is never taken, so top-k, top-p and the grammar hold (the paper does not say).

    Refused guesses are replaced by the ``optimal`` residual norm(max(p - q f, 0)), or by the paper's ``own``,
    norm(max(p - q, 0)), although f can lie on either side of min(1, p / q).

    ``local_tv`` is read off the guess alone, since the groups of all ids cost O(V group) a slot. It is an unbiased estimate:
    of the slot's total variation with the ``optimal`` residual, of an upper bound with the ``own`` one.

    Args:
        group: ids of a group at most; all of them when there are fewer. The paper has 3 to 50.
        spread: difference of probabilities below which ids may share a group; at most 1 of them, so 2 admits all.
        radius: squared l2 distance of codes below which they may. It depends on the scale of the codebook.
        residual: ``optimal`` or ``own``.

    Raises:
        StrategyError: for a value out of range; on :meth:`bind` without a codebook.
    """

    def __init__(self, group: int = 10, spread: float = 0.15, radius: float = 0.5, residual: str = "optimal") -> None:
        self.group, self.own = whole("group", group, 1), one_of("residual", residual, RESIDUALS) == "own"
        self.spread, self.radius = number("spread", spread, 0), number("radius", radius, 0)
        self.codes: Tensor | None = None

    def bind(self, setting: Setting) -> None:
        """The codes are compared in every slot."""
        self.codes = codebook_of(setting, "grouped")

    def delivered(self, slots: Slots, ids: Tensor | None = None) -> Tensor:
        """See :class:`ChainRule`: a = q min(1, p(C) / q(C))."""
        order = slots.p.argsort(dim=-1, descending=True, stable=True)
        every = torch.arange(order.shape[-1], device=order.device)
        rank = torch.empty_like(order).scatter_(-1, order, every.expand_as(order))
        if ids is not None:
            return slots.masses(ids)[1] * self._chance(slots, ids, order, rank)
        assert self.codes is not None
        chunks = every.split(max(1, CHUNK // (slots.guesses.numel() * self.group * self.codes.shape[1])))
        parts = [self._chance(slots, chunk.expand(*slots.guesses.shape, -1), order, rank) for chunk in chunks]
        return slots.q * torch.cat(parts, dim=-1).to(slots.q.dtype)

    def residual(self, slots: Slots) -> Tensor:
        """See :class:`ChainRule`."""
        return _residual(slots.p, slots.q) if self.own else super().residual(slots)

    def local_tv(self, slots: Slots) -> Tensor:
        """[B, n] estimate from each guess d ~ q, with f = min(1, p(C) / q(C)) and v = min(1, p / q) of d.

        ``optimal``: max(f - p / q, 0), whose expectation is sum max(q f - p, 0), the slot's total variation. ``own``:
        |f - v| bounds the distance of the kernels "d with f, else the residual" and "d with v, else the residual".
        """
        f = self.acceptance(slots) if slots.chance is None else slots.chance
        p, q = (x[..., 0] for x in slots.masses(slots.guesses[..., None]))
        estimate = (f - (p / q).clamp_max(1)).abs() if self.own else (f - p / q).clamp_min(0)
        return torch.where(slots.guessed, estimate, 0.0)

    def _chance(self, slots: Slots, ids: Tensor, order: Tensor, rank: Tensor) -> Tensor:
        """f [B, n, m] of ``ids`` [B, n, m] in float64; ``order`` [B, n, V] are the ids by rank, ``rank`` its inverse."""
        assert self.codes is not None, "call bind(setting) first"
        size = min(self.group, order.shape[-1])
        first = (rank.gather(-1, ids) - size // 2).clamp(0, order.shape[-1] - size)
        window = first[..., None] + torch.arange(size, device=ids.device)
        members = order.gather(-1, window.flatten(-2)).view(window.shape)
        p, q = (x.view(window.shape) for x in slots.masses(members.flatten(-2)))
        p_d = slots.p.gather(-1, ids).double()[..., None]
        far = (self.codes[members] - self.codes[ids][..., None, :]).double().square().sum(-1)
        shared = (members == ids[..., None]) | (((p - p_d).abs() < self.spread) & (far < self.radius))
        p, q = (torch.where(shared, x, 0.0).sum(-1) for x in (p, q))
        return torch.where(p_d[..., 0] > 0, (p / q.clamp_min(1e-300)).clamp_max(1), 0.0)
