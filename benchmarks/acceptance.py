"""Figures of decoded pictures, and what theory says that they should be (see frontier.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from arsd.decoding.rules import RejectionSampling


@dataclass
class Figures:
    """What a strategy did on all pictures.

    Args:
        tokens: of each picture.
        passes: of each picture.
        changed: expected changed tokens of each picture.
        accepted: passes by tokens committed.
    """

    tokens: np.ndarray
    passes: np.ndarray
    changed: np.ndarray
    accepted: dict[int, int]

    @property
    def tokens_per_pass(self) -> float:
        """Over all pictures."""
        return float(self.tokens.sum() / self.passes.sum())

    def interval(self) -> tuple[float, float]:
        """95 % of tokens per pass, by a bootstrap over pictures."""
        draws = np.random.default_rng(0).integers(len(self.tokens), size=(2000, len(self.tokens)))
        low, high = np.quantile(self.tokens[draws].sum(1) / self.passes[draws].sum(1), [0.025, 0.975])
        return float(low), float(high)

    def against(self, other: Figures) -> tuple[float, float, float]:
        """How many times the other's tokens per pass these are, with 95 % of a paired bootstrap over pictures."""
        draws = np.random.default_rng(0).integers(len(self.tokens), size=(2000, len(self.tokens)))
        low, high = np.quantile(other.passes[draws].sum(1) / self.passes[draws].sum(1), [0.025, 0.975])
        return self.tokens_per_pass / other.tokens_per_pass, float(low), float(high)

    def first_acceptance(self) -> float:
        """Share of passes whose first guess was taken (forced ends aside: all passes)."""
        return 1 - self.accepted.get(1, 0) / max(1, sum(self.accepted.values()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens_per_pass": self.tokens_per_pass,
            "interval": self.interval(),
            "first_acceptance": self.first_acceptance(),
            "expected_changed_tokens": float(self.changed.mean()),
            "changed_per_token": float(self.changed.sum() / self.tokens.sum()),
            "passes": self.passes.tolist(),
            "changed": self.changed.round(4).tolist(),
            "accepted_lengths": self.accepted,
        }


def at_equal_cost(curve: list[Figures], rival: Figures) -> tuple[float, float, float]:
    """How many times the rival's tokens per pass a curve has at the rival's changed tokens, with 95 % (paired).

    A rival that costs more than all of the curve is held against its end.
    """

    def ratio(pick: np.ndarray) -> float:
        cost, passes = (np.array([getattr(f, name)[pick].sum() for f in curve]) for name in ("changed", "passes"))
        order = cost.argsort()
        return float(rival.passes[pick].sum() / np.interp(rival.changed[pick].sum(), cost[order], passes[order]))

    draws = np.random.default_rng(0).integers(len(rival.passes), size=(2000, len(rival.passes)))
    low, high = np.quantile([ratio(pick) for pick in draws], [0.025, 0.975])
    return ratio(np.arange(len(rival.passes))), float(low), float(high)


def refusals_say(lossless: Figures, relaxed: Figures, length: int) -> float:
    """Tokens per pass if every unit of total variation spared one refusal, and nothing else changed.

    A pass ends with a refusal, or with all its guesses taken. Of R refusals, F full passes and N tokens, N - F were guesses
    that were judged, so R = (N - F)(1 - a) - C with the lossless chain's mean acceptance a and C expected changed tokens,
    and the passes are R + F.
    """
    tokens, full = lossless.tokens.sum(), lossless.accepted.get(length + 1, 0)
    refused = (lossless.passes.sum() - full) / (tokens - full)
    full = relaxed.accepted.get(length + 1, 0)
    return float(tokens / ((tokens - full) * refused - relaxed.changed.sum() + full))


def gaussian_acceptance(noise: float, sharpness: float, factors: np.ndarray, vocab: int = 1024) -> np.ndarray:
    """Mean alpha(omega) of 4,000 pairs p = softmax(s g), q = softmax(s g + n e), g and e standard normal."""
    generator = torch.Generator().manual_seed(0)
    totals = np.zeros(len(factors))
    for _ in range(8):
        logits = sharpness * torch.randn(500, vocab, generator=generator, dtype=torch.float64)
        p = torch.softmax(logits, -1)
        q = torch.softmax(logits + noise * torch.randn(500, vocab, generator=generator, dtype=torch.float64), -1)
        totals += np.array([float(torch.minimum(q, factor * p).sum(-1).mean()) / 8 for factor in factors])
    return totals


def expected_tokens(alphas: np.ndarray) -> float:
    """Tokens per pass of a chain whose guesses are taken independently with these probabilities."""
    return float(1 + np.cumprod(alphas).sum())


def fitted(sharpness: float, length: int, tokens_per_pass: float) -> tuple[float, float]:
    """Noise of the Gaussian model that gives a lossless chain's tokens per pass, and its alpha0."""
    low, high = 0.0, 12.0
    for _ in range(24):
        noise = (low + high) / 2
        alpha = float(gaussian_acceptance(noise, sharpness, np.ones(1))[0])
        if expected_tokens(np.full(length, alpha)) > tokens_per_pass:
            low = noise
        else:
            high = noise
    return noise, alpha


class CurveRule(RejectionSampling):
    """Speculative sampling that also measures alpha(omega) = sum min(q, omega p) of the slots it reaches.

    Args:
        factors: omegas.
    """

    def __init__(self, factors: np.ndarray) -> None:
        super().__init__()
        self.factors = torch.tensor(factors)
        self.sums: Any = 0.0  # [L, len(factors)]
        self.reached: Any = 0.0  # [L]
        self.first: list[torch.Tensor] = []  # alpha(1) of first slots

    def verify(self, step: Any, law: Any, draft: Any) -> Any:
        """Judge, and count."""
        verdict = super().verify(step, law, draft)
        p, q = law.probs[:, :-1].double(), draft.law.double()
        slots = torch.arange(p.shape[1])
        reached = (slots < verdict.count[:, None]) & step.active[:, :-1]
        curve = torch.stack([torch.minimum(q, factor * p).sum(-1) for factor in self.factors], dim=-1)
        self.sums = self.sums + torch.where(reached[..., None], curve, 0.0).sum(0)
        self.reached = self.reached + reached.sum(0)
        self.first.append(torch.minimum(p, q).sum(-1)[:, 0][reached[:, 0]])
        return verdict
