"""Rules: when a guess is taken. Each judges all slots of all rows at once, without a host synchronisation.

``p`` is the target law and ``q`` the law that a guess was drawn from, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.noise import Purpose
from arsd.decoding.types import Draft, Outcome, Step, Verdict

NEAR_TIE = 1e-2  # margin of log p + G below which another rounding could have chosen otherwise


class SeedExact:
    """Gumbel fixed point (Wiggers & Hoogeboom 2020, arXiv 2002.09928); lossless, and equal to plain AR token for token.

    Every token is argmax(log p + G) with Gumbel noise G that belongs to the absolute position. A guess is taken when it *is*
    that token; the first one that is not is replaced by it. No draft law is needed.
    """

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        tokens, margin = decided(law, lambda: step.token_gumbel(law.scores.shape[-1], law.scores.dtype))
        return _verdict(step, draft, tokens, tokens[:, :-1] == draft.tokens, near_tie=margin < NEAR_TIE)


def decided(law: Law, gumbel: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [B, W] = argmax(log p + G), and by how much [B, W] the best score exceeds the second one.

    Of a greedy law, which has one token whatever the noise, the margin is that of the scores before.
    """
    if law.ungreedy is None:
        noisy = law.scores + gumbel()
        best, tokens = noisy.max(dim=-1)
    else:
        noisy, tokens = law.ungreedy.clone(), law.scores.argmax(-1)
        best = noisy.gather(-1, tokens[..., None])[..., 0]
    return tokens, best - noisy.scatter_(-1, tokens[..., None], -torch.inf).amax(-1)


@dataclass
class Slots:
    """The slots of a pass as a chain rule sees them.

    Args:
        p: [B, n, V] target law.
        q: [B, n, V] law that each guess was drawn from; zero where there is no guess.
        guesses: [B, n]; 0 where there is none.
        guessed: [B, n] whether there is a guess.
        omega: [B, n] float64 factors of the rule, ``None`` for 1 everywhere.
        chance: [B, n] what :meth:`ChainRule.acceptance` said, for a meter that is read off the guesses.
    """

    p: Tensor
    q: Tensor
    guesses: Tensor
    guessed: Tensor
    omega: Tensor | None = None
    chance: Tensor | None = None

    @classmethod
    def of(cls, p: Tensor, draft: Draft) -> Slots:
        """All W slots; the last one has no guess."""
        assert draft.law is not None
        guesses = draft.tokens
        guessed = torch.ones_like(guesses, dtype=torch.bool)
        none = guessed.new_zeros(len(guesses), 1)
        return cls(p, _pad_law(draft.law.to(p.dtype)), _pad(guesses), torch.cat([guessed, none], dim=1))

    def at(self, index: Tensor) -> Slots:
        """The slots ``index`` [B, m] only."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        omega = None if self.omega is None else self.omega[rows, index]
        return Slots(self.p[rows, index], self.q[rows, index], self.guesses[rows, index], self.guessed[rows, index], omega)

    def masses(self, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """p and q of ``ids`` [B, n, m] in float64, or of the whole vocabulary as they are."""
        if ids is None:
            return self.p, self.q
        return self.p.gather(-1, ids).double(), self.q.gather(-1, ids).double()

    @property
    def ratio(self) -> Tensor:
        """p(d) / q(d) of each slot's guess [B, n], float64: speculative sampling takes it where a uniform lies below."""
        p, q = self.masses(self.guesses[..., None])
        return (p / q)[..., 0]

    def double(self) -> Slots:
        """The same in float64."""
        return replace(self, p=self.p.double(), q=self.q.double())


class ChainRule:
    """Base of the rules that test a chain of guesses against q: min(1, omega p(d) / q(d)); lossless for omega <= 1.

    A rule is the mass a(x) = q(x) f(x) that it delivers by accepting. A guess d is taken with probability
    f(d) = a(d) / q(d); the first one refused is replaced by a draw from G* = norm(max(p - a, 0)), which brings the law of
    the slot as near to p as any residual can (COOL-SD, arXiv 2601.09212, theorem 2): the total variation that is left is
    sum max(a - p, 0). Where nothing is left of p - a, a refusal has probability 0 up to rounding, and the draw is from p.

    A member overrides :meth:`omegas`, or :meth:`delivered` (and :meth:`local_tv`) altogether.
    """

    needs_law = True
    every_slot = False

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        slots = Slots.of(law.probs, draft)
        slots.omega = self.omegas(step, slots)
        slots.chance = self.acceptance(slots)
        local_tv = self.local_tv(slots)
        strict = None if local_tv is None else slots.ratio[:, :-1]
        accepted, relaxed = acceptance_test(step, slice(-1), slots.chance[:, :-1], strict, step.active[:, :-1])
        tokens = (self._judge_every_slot if self.every_slot else self._judge_until_refused)(step, slots, accepted)
        verdict = _verdict(step, draft, tokens, accepted, relaxed=relaxed)
        verdict.local_tv = local_tv
        return verdict

    def omegas(self, step: Step, slots: Slots) -> Tensor | None:
        """[B, W] how far each slot is relaxed. It may depend on what happened before the slot's own guess was drawn only."""
        return None

    def delivered(self, slots: Slots, ids: Tensor | None = None) -> Tensor:
        """a(x) = min(q, omega p) of ``ids`` [B, n, m] (float64), or of the whole vocabulary [B, n, V]."""
        p, q = slots.masses(ids)
        return torch.minimum(q, p if slots.omega is None else slots.omega[..., None].to(p.dtype) * p)

    def acceptance(self, slots: Slots) -> Tensor:
        """f(d) = a(d) / q(d) of each slot's guess [B, n]; NaN where there is none."""
        guesses = slots.guesses[..., None]
        return (self.delivered(slots, guesses) / slots.masses(guesses)[1])[..., 0]

    def residual(self, slots: Slots) -> Tensor:
        """Weights [B, n, V] of the draw that replaces a refused guess, or that stands where there is no guess."""
        return _residual(slots.p, self.delivered(slots))

    def local_tv(self, slots: Slots) -> Tensor | None:
        """[B, n] total variation between p and the law of each slot once it is reached; ``None`` of a lossless rule."""
        slots = slots.double()
        return (self.delivered(slots) - slots.p).clamp_min(0).sum(-1)

    def slot_law(self, slots: Slots) -> Tensor:
        """The law [B, n, V] of a slot's token once it is reached, for proofs: O(V) times :meth:`residual`.

        Every id stands in for the guess once, so this holds for residuals that depend on the guess as well.
        """
        slots, law = slots.double(), torch.zeros_like(slots.p, dtype=torch.float64)
        for x in range(slots.p.shape[-1]):
            one = replace(slots, guesses=torch.full_like(slots.guesses, x))
            weights = self.residual(one)
            weights = weights / weights.sum(-1, keepdim=True)
            taken = self.delivered(one, one.guesses[..., None])
            law += (slots.q[..., x : x + 1] - taken) * weights
            law[..., x : x + 1] += taken
        return torch.where(slots.guessed[..., None], law, slots.p)

    def _judge_until_refused(self, step: Step, slots: Slots, accepted: Tensor) -> Tensor:
        """The guesses, the first refused one (or the slot without a guess) replaced."""
        first = _leading(accepted)[:, None]
        at, active = step.positions.gather(1, first), step.active.gather(1, first)
        fresh = step.noise.categorical(self.residual(slots.at(first)), Purpose.RESIDUAL, at, step.iteration, active)
        return slots.guesses.scatter(1, first, fresh)

    def _judge_every_slot(self, step: Step, slots: Slots, accepted: Tensor) -> Tensor:
        """The guesses, every refused one replaced."""
        refused = torch.cat([~accepted, step.active[:, -1:]], dim=1) & step.active
        fresh = step.noise.categorical(self.residual(slots), Purpose.RESIDUAL, step.positions, step.iteration, refused)
        return torch.where(refused, fresh, slots.guesses)


class RejectionSampling(ChainRule):
    """Speculative sampling (Leviathan et al. 2023; SJD, arXiv 2410.01699, algorithm 1); lossless: omega = 1.

    A guess d is taken with probability min(1, p(d) / q(d)); the first one refused is replaced by a draw from
    norm(max(p - q, 0)); where there is no guess the token is drawn from p.

    Args:
        every_slot: judge the slots behind the first refusal as well, so that the drafter can go on from the result (maximal
            coupling of successive iterates: arXiv 2510.24211).
    """

    def __init__(self, every_slot: bool = False) -> None:
        self.every_slot = every_slot

    def local_tv(self, slots: Slots) -> None:
        """Nothing to report: every slot has law p."""


def acceptance_test(
    step: Step, slots: slice, chance: Tensor, strict: Tensor | None, active: Tensor, *number: int
) -> tuple[Tensor, Tensor | None]:
    """Which guesses are taken, and which of them a stricter test would have refused with the same random number.

    Args:
        step: of the round.
        slots: n of its slots.
        chance: [B, n] probability that a guess is taken.
        strict: [B, n] that of the stricter test (above 1 is 1), ``None`` if nobody asks.
        active: [B, n] slots that count.
        number: which of the siblings of a tree.

    Returns:
        [B, n] and [B, n]. There is no answer to the second question (``None``) from noise that has no uniforms, such as an
        enumeration of all choices.
    """
    where = Purpose.ACCEPT, step.positions[:, slots], step.iteration
    uniform = getattr(step.noise, "uniform", None)
    if strict is None or uniform is None:
        return step.noise.bernoulli(chance, *where, active, *number), None
    u = uniform(*where, *number)
    return u < chance, (u < chance) & (u >= strict)


def _residual(p: Tensor, a: Tensor) -> Tensor:
    """max(p - a, 0), or p where nothing is left of it (a >= p up to rounding: a refusal has probability 0)."""
    weights = (p - a).clamp_min(0)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, p)


def _pad(guesses: Tensor) -> Tensor:
    return torch.cat([guesses, guesses.new_zeros(len(guesses), 1)], dim=1)


def _pad_law(q: Tensor) -> Tensor:
    return torch.cat([q, q.new_zeros(len(q), 1, q.shape[-1])], dim=1)


def _leading(accepted: Tensor) -> Tensor:
    """Number of accepted guesses before the first refusal [B]."""
    return accepted.to(torch.int64).cumprod(dim=1).sum(dim=1)


def _verdict(
    step: Step,
    draft: Draft,
    tokens: Tensor,
    accepted: Tensor,
    near_tie: Tensor | None = None,
    relaxed: Tensor | None = None,
) -> Verdict:
    """Commit the accepted run and one token more, never beyond the end of the image."""
    outcome = torch.full_like(tokens, int(Outcome.BONUS))
    outcome[:, :-1] = torch.where(accepted, int(Outcome.ACCEPTED), int(Outcome.RESAMPLED))
    if relaxed is not None:
        outcome[:, :-1].masked_fill_(relaxed, int(Outcome.RELAXED))
    return Verdict(torch.minimum(_leading(accepted) + 1, step.width), tokens, outcome, near_tie)
