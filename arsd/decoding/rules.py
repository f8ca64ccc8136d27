"""Rules: when a guess is taken. Each judges all slots of all rows at once, without a host synchronisation.

``p`` is the target law and ``q`` the law that a guess was drawn from, everywhere.
"""

from __future__ import annotations

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
        scores = law.scores
        noisy = scores + step.token_gumbel(scores.shape[-1], scores.dtype)
        best, tokens = noisy.max(dim=-1)
        second = noisy.scatter_(-1, tokens[..., None], -torch.inf).amax(-1)
        return _verdict(step, draft, tokens, tokens[:, :-1] == draft.tokens, near_tie=best - second < NEAR_TIE)


class RejectionSampling:
    """Speculative sampling (Leviathan et al. 2023; SJD, arXiv 2410.01699, algorithm 1); lossless.

    A guess d is taken with probability min(1, p(d) / q(d)); the first one refused is replaced by a draw from
    norm(max(p - q, 0)); where there is no guess the token is drawn from p.

    Args:
        every_slot: judge the slots behind the first refusal as well, so that the drafter can go on from the result (maximal
            coupling of successive iterates: arXiv 2510.24211).
    """

    needs_law = True

    def __init__(self, every_slot: bool = False) -> None:
        self.every_slot = every_slot

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        assert draft.law is not None
        p, q, guesses = law.probs, draft.law.to(law.probs.dtype), draft.tokens
        p_d = p[:, :-1].gather(-1, guesses[..., None])[..., 0]
        q_d = q.gather(-1, guesses[..., None])[..., 0]
        ratio = (p_d.double() / q_d.double()).clamp_max(1.0)
        noise, positions = step.noise, step.positions
        accepted = noise.bernoulli(ratio, Purpose.ACCEPT, positions[:, :-1], step.iteration, step.active[:, :-1])
        if self.every_slot:
            weights = _residual(p, _pad_law(q))
            refused = torch.cat([~accepted, step.active[:, -1:]], dim=1) & step.active
            fresh = noise.categorical(weights, Purpose.RESIDUAL, positions, step.iteration, refused)
            tokens = torch.where(refused, fresh, _pad(guesses))
        else:
            first = _leading(accepted)[:, None]  # W - 1 when every guess was taken: the slot without a guess
            rows = torch.arange(len(first), device=first.device)[:, None]
            q_first = _pad_law(q)[rows, first]
            active = step.active.gather(1, first)
            at = positions.gather(1, first)
            fresh = noise.categorical(_residual(p[rows, first], q_first), Purpose.RESIDUAL, at, step.iteration, active)
            tokens = _pad(guesses).scatter(1, first, fresh)
        return _verdict(step, draft, tokens, accepted)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), or p where nothing is left of it (p = q up to rounding: a refusal has probability 0)."""
    weights = (p - q).clamp_min(0)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, p)


def _pad(guesses: Tensor) -> Tensor:
    return torch.cat([guesses, guesses.new_zeros(len(guesses), 1)], dim=1)


def _pad_law(q: Tensor) -> Tensor:
    return torch.cat([q, q.new_zeros(len(q), 1, q.shape[-1])], dim=1)


def _leading(accepted: Tensor) -> Tensor:
    """Number of accepted guesses before the first refusal [B]."""
    return accepted.to(torch.int64).cumprod(dim=1).sum(dim=1)


def _verdict(step: Step, draft: Draft, tokens: Tensor, accepted: Tensor, near_tie: Tensor | None = None) -> Verdict:
    """Commit the accepted run and one token more, never beyond the end of the image."""
    outcome = torch.full_like(tokens, int(Outcome.BONUS))
    outcome[:, :-1] = torch.where(accepted, int(Outcome.ACCEPTED), int(Outcome.RESAMPLED))
    return Verdict(torch.minimum(_leading(accepted) + 1, step.width), tokens, outcome, near_tie)
