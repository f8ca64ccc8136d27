"""Relaxed rules that keep no table: COOL-SD's annealed acceptance, with a budget if wanted, and the Gumbel margin.

Both change the law of the output, and report by how much (``Verdict.local_tv``, summed over the committed tokens into
``DecodeStats.expected_changed_tokens``). The expectation of that sum bounds the total variation between the law of the
picture and plain AR's; below 1 that says something.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arsd.decoding.options import number, one_of
from arsd.decoding.rules import ChainRule, Slots, _verdict
from arsd.decoding.types import Draft, Step, Verdict
from arsd.errors import StrategyError

if TYPE_CHECKING:
    from arsd.decoding.strategies import Setting

MOST = 1e30  # the largest factor: takes all that p allows at all, and is finite in float32
LEAST = 1e-300  # the smallest: takes nothing, and is no 0
SLACK = 1e-13  # what a slot leaves of its allowance for rounding, so that a budget holds to the last bit


class CoolSDRule(ChainRule):
    """COOL-SD (Li et al., AAAI 2026, arXiv 2601.09212): accept with min(1, omega_i p(d) / q(d)); not lossless.

    omega_i = delta exp(-nu i - mu) for the guesses i = 0, 1, ... of a chain, with mu such that the mean over the chain is
    delta. A refused guess is replaced by a draw from the paper's optimal residual norm(max(p - min(q, omega p), 0)): where
    omega <= 1 the law is p. Otherwise the total variation of a slot that is reached is alpha(omega) - alpha(1) for
    alpha(omega) = sum min(q, omega p), which is what it accepts beyond speculative sampling.

    With a ``budget`` B the schedule is not used. The slot at position n of N may spend B (n + 1) / N, less what was spent at
    earlier positions of the picture, and its omega is the largest that costs no more. What a slot spends is fixed by its p
    and q and by earlier positions, never by its own guess or by later ones. So, given all that happened at earlier
    positions, its token has a law within t_n of p in total variation, and a maximal coupling with plain AR's draw, one
    position after the other, parts the pictures with a probability of at most E[sum t_n]. Each position is committed in
    exactly one pass, so sum t_n <= B on every path: the total variation to plain AR is at most B, and so is the expected
    number of tokens that are not drawn as plain AR would have drawn them.

    Args:
        delta: mean of the factors; 1.1 and 2 are the paper's settings.
        nu: how fast they fall; 0 is a uniform relaxation.
        normalize: ``mean``, or ``none`` for omega_i = delta exp(-nu i) with delta at the first guess.
        floor: the factors' least value. With 1 no guess is refused more often than by speculative sampling: factors below
            1 buy no fidelity. The paper clamps nothing; 0 is its form (:class:`PublishedCoolSDRule`).
        budget: B, in expected changed tokens per picture; ``None`` for the schedule.

    Raises:
        StrategyError: for a value out of range.
    """

    def __init__(
        self,
        delta: float = 1.1,
        nu: float = 0.7,
        normalize: str | None = "mean",
        floor: float = 1.0,
        budget: float | None = None,
    ) -> None:
        self.delta, self.nu = number("delta", delta, 0, open_end=True), number("nu", nu, -math.inf)
        self.floor = number("floor", floor, 0)
        self.budget = None if budget is None else number("budget", budget, 0)
        # the command line reads the word none as nothing
        self.normalize = one_of("normalize", "none" if normalize is None else normalize, ("mean", "none"))
        self._schedules: dict[int, Tensor] = {}
        self._spent: Tensor | None = None  # [B] of the picture in each row
        self._num_tokens = 0

    def bind(self, setting: Setting) -> None:
        """The length of a picture, and a purse for each row."""
        self._num_tokens = setting.num_tokens
        self._spent = torch.zeros(setting.batch, dtype=torch.float64, device=setting.device)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """A picture begins with nothing spent."""
        if self._spent is not None:
            self._spent[rows] = 0

    def schedule(self, length: int) -> Tensor:
        """omega_i [L] of a chain of ``length`` guesses, float64."""
        decay = -self.nu * torch.arange(length, dtype=torch.float64)
        if self.normalize == "mean":  # in the log domain: a long or steep schedule must not overflow
            decay = decay - (torch.logsumexp(decay, 0) - math.log(max(1, length)))
        return (self.delta * decay.exp()).clamp(max(self.floor, LEAST), MOST)

    def verify(self, step: Step, law: Any, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        verdict = super().verify(step, law, draft)
        if self.budget is not None and self._spent is not None:
            assert verdict.local_tv is not None
            committed = torch.arange(step.positions.shape[1], device=verdict.count.device) < verdict.count[:, None]
            self._spent = self._spent + torch.where(committed, verdict.local_tv, 0.0).sum(1)
        return verdict

    def omegas(self, step: Step, slots: Slots) -> Tensor:
        """See :class:`ChainRule`."""
        if self.budget is not None:
            return largest_omega(slots, self.allowances(step, slots))
        batch, window = slots.guesses.shape
        if window not in self._schedules:
            omega = torch.cat([self.schedule(window - 1), torch.ones(1, dtype=torch.float64)])  # the last has no guess
            self._schedules[window] = omega.to(slots.p.device)
        return self._schedules[window].expand(batch, -1)

    def allowances(self, step: Step, slots: Slots) -> Tensor:
        """[B, W] what each slot may spend if it is reached.

        The purse after slot i is S_i = min(S_{i-1} + w_i, C_i): w_i is the most that the slot can use, C_i what has accrued.
        In closed form, with W the running sum of w: S_i = W_i + min(S, min_{j <= i} (C_j - W_j)).
        """
        if self._spent is None or self.budget is None:
            raise StrategyError("a budget is kept for each picture of a call: call bind(setting) first")
        p, q = slots.p.double(), slots.q.double()
        accrued = self.budget * (step.positions + 1).clamp_max(self._num_tokens).double() / self._num_tokens
        most = (torch.where(p > 0, q, 0.0) - p).clamp_min(0).sum(-1).cumsum(1)
        before = self._spent[:, None]
        after = most + torch.minimum(before, (accrued - most).cummin(1).values)
        return after.diff(dim=1, prepend=before).clamp_min(0)


class PublishedCoolSDRule(CoolSDRule):
    """COOL-SD as published (Li et al., AAAI 2026, arXiv 2601.09212): factors below 1 stay; not lossless.

    Args: those of :class:`CoolSDRule` that the paper has.
    """

    def __init__(self, delta: float = 1.1, nu: float = 0.7, normalize: str | None = "mean") -> None:
        super().__init__(delta, nu, normalize, floor=0.0)


def largest_omega(slots: Slots, allowance: Tensor) -> Tensor:
    """The largest omega [B, n] >= 1 with t(omega) = sum max(min(q, omega p) - p, 0) <= ``allowance`` [B, n]; float64.

    t is increasing, concave and linear between its breakpoints q / p, so the answer is exact but for the slack that it
    leaves to rounding. Should rounding take more than that, it is 1.
    """
    aim = (allowance - SLACK).clamp_min(0)
    p, q = slots.p.double(), slots.q.double()
    gains = (q > p) & (p > 0)
    ratio, order = torch.where(gains, q / p, 1.0).clamp_max(MOST).sort(dim=-1)
    p_up, q_up = (torch.where(gains, x, 0.0).gather(-1, order) for x in (p, q))
    full = (q_up - p_up).cumsum(-1) - (q_up - p_up)  # ids before this one are taken whenever they are drawn
    rest = p_up.flip(-1).cumsum(-1).flip(-1)
    cost = full + (ratio - 1) * rest
    k = torch.searchsorted(cost, aim[..., None], right=True).clamp_max(cost.shape[-1] - 1)
    full, rest, ratio = (x.gather(-1, k)[..., 0] for x in (full, rest, ratio))
    slope = (aim - full).clamp_min(0) / rest.clamp_min(1e-300)
    omega = torch.minimum(1 + slope, ratio)
    spends = (torch.minimum(q, omega[..., None] * p) - p).clamp_min(0).sum(-1)
    return torch.where(spends <= allowance, omega, 1.0)


class MarginRule:
    """Relaxed Gumbel fixed point: take a guess within log(omega) of the arg-max of log p + G; not lossless, needs no q.

    A guess d is taken when log omega + log p(d) + G(d) >= max_x (log p(x) + G(x)), with the canonical noise G of the
    position; the first one that is not is replaced by the arg-max, which is plain AR's token. omega = 1 is the seed-exact
    rule (:class:`arsd.decoding.rules.SeedExact`), and so is anything below.

    For a guess that is independent of G given the past and omega >= 1, the slot gives d with probability omega p(d) / Z and
    any other x with p(x) / Z, where Z = 1 + (omega - 1) p(d): multiplying p(d) by omega adds log omega to its score, and
    where d is refused the arg-max is not d. Gumbel-coupled guesses (Jacobi iterates under ``coupling=gumbel``) have been
    chosen for a large G(d), so they are taken more often than that: the law is another one.

    ``local_tv`` is the indicator that the token is not plain AR's arg-max. Until the first such token the picture *is* plain
    AR's, so the expected number of them bounds the total variation, whatever the guesses depend on.

    Args:
        omega: factor, at least 1 to have an effect.

    Raises:
        StrategyError: unless omega > 0.
    """

    needs_law = False

    def __init__(self, omega: float = 2.0) -> None:
        self.margin = math.log(number("omega", omega, 0, open_end=True))

    def verify(self, step: Step, law: Any, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        noisy = law.scores + step.token_gumbel(law.scores.shape[-1], law.scores.dtype)
        best, tokens = noisy.max(dim=-1)
        own = noisy[:, :-1].gather(-1, draft.tokens[..., None])[..., 0]
        accepted = (own + self.margin >= best[:, :-1]) & (own > -torch.inf)
        changed = accepted & (draft.tokens != tokens[:, :-1])
        tokens = torch.cat([torch.where(accepted, draft.tokens, tokens[:, :-1]), tokens[:, -1:]], dim=1)
        verdict = _verdict(step, draft, tokens, accepted, relaxed=changed)
        verdict.local_tv = torch.cat([changed, torch.zeros_like(changed[:, :1])], dim=1).double()
        return verdict
