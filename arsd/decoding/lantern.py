"""LANTERN and LANTERN++: a guess is also vouched for by the codes that look like it. Both change the law of the output."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arsd.decoding.options import number, one_of, whole
from arsd.decoding.rules import ChainRule, Slots
from arsd.errors import StrategyError

if TYPE_CHECKING:
    from arsd.decoding.strategies import Setting

RESIDUALS = ("own", "optimal")
CHUNK = 1 << 22  # numbers held at a time when all ids are looked at
_TABLES: dict[tuple[Any, ...], Tensor] = {}  # the last few neighbour tables: a pipeline asks for the same one every call


def neighbour_table(codebook: Tensor, k: int) -> Tensor:
    """The ``k`` nearest other codes of every code [V, k], nearest first (l2; equal distances by id), on the same device."""
    codes = codebook.detach().double()
    digest = hashlib.sha256(codes.cpu().contiguous().numpy().tobytes()).hexdigest()
    key = (digest, tuple(codes.shape), k, codes.device)
    if key not in _TABLES:
        while len(_TABLES) >= 4:
            _TABLES.pop(next(iter(_TABLES)), None)
        rows = max(1, CHUNK // len(codes))
        parts = [_nearest(codes, first, min(first + rows, len(codes)), k) for first in range(0, len(codes), rows)]
        _TABLES[key] = torch.cat(parts)
    return _TABLES[key]


def _nearest(codes: Tensor, first: int, last: int, k: int) -> Tensor:
    """Rows ``first`` to ``last`` of the table. A plain top-k breaks ties as it likes, so the border is settled by id."""
    distance = torch.cdist(codes[first:last], codes, compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.arange(last - first), torch.arange(first, last)] = torch.inf
    nearest, ids = distance.topk(k + 1, largest=False)
    ids = ids[:, :k].sort(dim=1).values
    unsettled = (nearest[:, k - 1] == nearest[:, k]).nonzero()[:, 0]
    if len(unsettled):
        rows, border = distance[unsettled], nearest[unsettled, k - 1 : k]
        tied = rows == border
        room = k - (rows < border).sum(1, keepdim=True)
        chosen = (rows < border) | (tied & (tied.cumsum(1) <= room))
        ids[unsettled] = chosen.nonzero()[:, 1].view(-1, k)
    order = distance.gather(1, ids).argsort(dim=1, stable=True)
    return ids.gather(1, order).int()


def codebook_of(setting: Setting, name: str) -> Tensor:
    """The codes of a call, one for each id.

    Raises:
        StrategyError: when there are none, or not one for each id.
    """
    codes = setting.codebook
    if codes is None:
        raise StrategyError(f"rule {name!r} compares code vectors, and this model gives no codebook")
    if len(codes) != setting.grammar.vocab:
        raise StrategyError(f"rule {name!r} needs a code for each of {setting.grammar.vocab} ids, not {len(codes)} codes")
    return codes.detach().to(setting.device)


class LanternRule(ChainRule):
    """LANTERN (Jang et al., ICLR 2025, arXiv 2410.03355): accept with min(1, S(d) / q(d)); not lossless.

    S(d) = p(d) + p(y_1) + ... + p(y_m) over the longest run of d's nearest codes y_1, y_2, ... (at most k, without d) whose
    mass is at most delta. A guess with p(d) = 0 gets no help, so top-k, top-p and the grammar hold (the paper does not say).

    Refused guesses are replaced by the paper's ``own`` residual norm(max(p~ - q, 0)), where p~ has the mass of the run on d
    and none on the run, or by the ``optimal`` one (COOL-SD, theorem 2). As S >= p, the latter is norm(max(p - q, 0)).

    ``local_tv`` is read off the guess alone, since S of all ids costs O(V k) a slot. It is an unbiased estimate: of the
    slot's total variation with the ``optimal`` residual, of an upper bound with the ``own`` one (see :meth:`local_tv`).
    :meth:`ChainRule.slot_law` gives the law itself, in O(V (V + k)).

    Args:
        k: neighbours at most.
        delta: mass of the neighbours at most.
        residual: ``own`` or ``optimal``.

    Raises:
        StrategyError: for a value out of range; on :meth:`bind` without a codebook, or one of no more than k codes.
    """

    name = "lantern"

    def __init__(self, k: int = 1000, delta: float = 0.2, residual: str = "own") -> None:
        self.k, self.delta = whole("k", k, 1), number("delta", delta, 0)
        self.own = one_of("residual", residual, RESIDUALS) == "own"
        self.neighbours: Tensor | None = None

    def bind(self, setting: Setting) -> None:
        """The neighbours of every code."""
        codes = codebook_of(setting, self.name)
        if self.k >= len(codes):
            raise StrategyError(f"k must be less than the {len(codes)} codes, not {self.k}")
        self.neighbours = neighbour_table(codes, self.k)

    def bound(self, p: Tensor) -> Tensor:
        """How much mass the neighbours of ids of probability ``p`` may add."""
        return torch.full_like(p, self.delta)

    def delivered(self, slots: Slots, ids: Tensor | None = None) -> Tensor:
        """See :class:`ChainRule`: a = min(q, S)."""
        if ids is not None:
            p, q = slots.masses(ids)
            return torch.minimum(q, p + self._help(slots, ids)[0])
        every = torch.arange(slots.p.shape[-1], device=slots.p.device)
        chunks = every.split(max(1, CHUNK // (slots.guesses.numel() * self.k)))
        parts = [self.delivered(slots, chunk.expand(*slots.guesses.shape, -1)) for chunk in chunks]
        return torch.cat(parts, dim=-1).to(slots.p.dtype)

    def residual(self, slots: Slots) -> Tensor:
        """See :class:`ChainRule`."""
        weights = (slots.p - slots.q).clamp_min(0)
        if self.own:
            _, run, taken = self._help(slots, slots.guesses[..., None])
            taken &= slots.guessed[..., None, None]
            run = torch.where(taken, run, slots.guesses[..., None, None])[..., 0, :]  # d itself has no residual: q(d) > p(d)
            kept = torch.ones_like(weights).scatter(-1, run, 0.0)
            weights = torch.where(slots.guessed[..., None], weights * kept, weights)
        return torch.where(weights.sum(-1, keepdim=True) > 0, weights, slots.p)

    def local_tv(self, slots: Slots) -> Tensor:
        """[B, n] estimate from each guess d ~ q, with f = min(1, S / q) and v = min(1, p / q) of d.

        ``optimal``: f - v, whose expectation is sum max(q f - p, 0), the slot's total variation. ``own``: the kernel "d with
        f, else d's residual" lies f - v + max(0, 1 - f - (1 - v)(1 - g)) from the kernel of speculative sampling, where g is
        the share of max(p - q, 0) that lies on d's run; its expectation is an upper bound, as total variation is convex.
        """
        guesses = slots.guesses[..., None]
        p, q = slots.masses(guesses)
        added, run, taken = self._help(slots, guesses)
        v, f = (p / q).clamp_max(1), ((p + added) / q).clamp_max(1)
        estimate = f - v
        if self.own:
            left = (slots.p - slots.q).clamp_min(0).double()
            ours = torch.where(taken, left.gather(-1, run[..., 0, :])[..., None, :], 0.0).sum(-1)
            share = ours / left.sum(-1, keepdim=True).clamp_min(1e-300)
            estimate = estimate + (1 - f - (1 - v) * (1 - share)).clamp_min(0)
        return torch.where(slots.guessed, estimate[..., 0].clamp_min(0), 0.0)

    def _help(self, slots: Slots, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the neighbours add to ``ids`` [B, n, m] (float64); the neighbours [B, n, m, k] and which are in the run."""
        assert self.neighbours is not None, "call bind(setting) first"
        near = self.neighbours[ids].long()
        mass = slots.p.gather(-1, near.flatten(-2)).double().view(near.shape)
        p = slots.p.gather(-1, ids).double()
        taken = (mass.cumsum(-1) <= self.bound(p)[..., None]) & (p > 0)[..., None]
        return torch.where(taken, mass, 0.0).sum(-1), near, taken


class LanternPlusPlusRule(LanternRule):
    """LANTERN++ (Park et al. 2025, arXiv 2502.06352): as LANTERN, with neighbours up to (lam - 1) p(d); not lossless.

    S(d) <= lam p(d): a guess is relaxed in proportion to its own probability. (Their static tree of guesses is a drafter's
    business.) Arguments and errors are those of :class:`LanternRule`, but for:

    Args:
        k: neighbours at most.
        lam: the paper's lambda, at least 1; (k, lam) = (10, 5), (5, 10) and (5, 20) are the released settings.
        residual: ``own`` or ``optimal``.
    """

    name = "lantern-plus-plus"

    def __init__(self, k: int = 10, lam: float = 5.0, residual: str = "own") -> None:
        super().__init__(k, residual=residual)
        self.lam = number("lam", lam, 1)

    def bound(self, p: Tensor) -> Tensor:
        """See :class:`LanternRule`."""
        return (self.lam - 1) * p
