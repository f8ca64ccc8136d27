"""Chain rules written out plainly, with exact numbers: what the production rules are held against. No tensor in sight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction as F
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import Laws
from arsd.exactness.tables import World

Numbers = Sequence[Any]


def fractions(text: str) -> list[F]:
    """``"1/2 3/10"`` to exact numbers."""
    return [F(word) for word in text.split()]


def world_of(*laws: list[Numbers], **options: Any) -> World:
    """A world whose laws are given: for every position, the law behind each prefix."""
    tables = [torch.tensor([[float(x) for x in law] for law in rows], dtype=torch.float64).log() for rows in laws]
    return World(tables[0].shape[1], len(tables), tables=tables, **options)


def law_of(world: World) -> Callable[[tuple[int, ...]], list[float]]:
    """The law behind a prefix."""
    target, laws = world.target(1), Laws(world.config, world.grammar())

    def law(prefix: tuple[int, ...]) -> list[float]:
        row = 0
        for token in prefix:
            row = row * world.vocab + token
        logits = target.tables[len(prefix)][:, row][:, None, None]
        return laws(logits, torch.tensor([[len(prefix)]])).probs[0, 0].tolist()

    return law


def normalised(weights: Numbers, otherwise: Numbers) -> list[Any]:
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else list(otherwise)


class Judge:
    """f(d), the residual and the cost of a slot. ``i`` of ``length`` guesses, at position n, after ``spent``."""

    def accept(self, p: Numbers, q: Numbers, i: int, length: int, n: int, spent: Any) -> list[Any]:
        raise NotImplementedError

    def residual(self, p: Numbers, q: Numbers, f: Numbers, d: int) -> list[Any]:
        """norm(max(p - q f, 0)), COOL-SD's theorem 2."""
        return normalised([max(a - b * c, 0) for a, b, c in zip(p, q, f, strict=True)], p)

    def slot_law(self, p: Numbers, q: Numbers, f: Numbers) -> list[Any]:
        law = [b * c for b, c in zip(q, f, strict=True)]
        for d, (b, c) in enumerate(zip(q, f, strict=True)):
            if b and c < 1:
                for x, r in enumerate(self.residual(p, q, f, d)):
                    law[x] += b * (1 - c) * r
        return law

    def cost(self, p: Numbers, q: Numbers, f: Numbers) -> Any:
        """Total variation of the slot."""
        return sum(max(a - b, 0) for a, b in zip(self.slot_law(p, q, f), p, strict=True))


class Omegas(Judge):
    """f = min(1, omega_i p / q); ``omegas(i, length)``."""

    def __init__(self, omegas: Callable[[int, int], Any]) -> None:
        self.omegas = omegas

    def accept(self, p, q, i, length, n, spent):
        return [min(1, self.omegas(i, length) * a / b) if b else 0 for a, b in zip(p, q, strict=True)]


def predicted(target: World, draft: World, window: int, judge: Judge) -> Tensor:
    """The law [V ** N] of decoding in rounds: a chain of guesses, judged one after another, one token more, and again."""
    return forecast(target, draft, window, judge)[0]


def forecast(target: World, draft: World, window: int, judge: Judge) -> tuple[Tensor, float]:
    """The law, and the expected total of the costs of all slots that are reached."""
    p_of, q_of, law, bill = law_of(target), law_of(draft), defaultdict(float), [0.0]

    def slot(prefix: tuple[int, ...], i: int, mass: Any, spent: Any) -> None:
        if len(prefix) == target.num_tokens or mass == 0:
            law[prefix] += mass
            return
        p = p_of(prefix)
        if i == window - 1:
            for x, chance in enumerate(p):
                slot((*prefix, x), 0, mass * chance, spent)
            return
        q = q_of(prefix)
        f = judge.accept(p, q, i, window - 1, len(prefix), spent)
        cost = judge.cost(p, q, f)
        bill[0] += mass * cost
        spent = spent + cost
        after: dict[int, Any] = defaultdict(float)
        for d, (chance, taken) in enumerate(zip(q, f, strict=True)):
            slot((*prefix, d), i + 1, mass * chance * taken, spent)
            if chance and taken < 1:
                for x, weight in enumerate(judge.residual(p, q, f, d)):
                    after[x] += chance * (1 - taken) * weight
        for x, chance in after.items():
            slot((*prefix, x), 0, mass * chance, spent)

    slot((), 0, 1.0, 0.0)
    flat = torch.zeros(target.vocab**target.num_tokens, dtype=torch.float64)
    for sequence, mass in law.items():
        if len(sequence) == target.num_tokens:
            flat[int(target.number(torch.tensor([sequence])))] = float(mass)
    return flat, bill[0]


class Virtual:
    """A controller that guesses in the first pass only: what follows is the target's virtual continuation."""

    def __init__(self, window: int) -> None:
        self.windows = [window, 1]

    def window(self) -> int:
        return self.windows[0]

    def observe(self, counts: list[int], seconds: float) -> None:
        self.windows = self.windows[1:] or [1]
        self.windows = self.windows[-1:]


class Means:
    """Expectations over all paths: reported cost, accepted guesses of the first pass; and the largest reported cost."""

    def __init__(self) -> None:
        self.changed, self.accepted, self.most = 0.0, 0.0, 0.0

    def __call__(self, result: Any, weight: Tensor) -> None:
        changed = torch.tensor(result.stats.expected_changed_tokens, dtype=torch.float64)
        self.changed += float((changed * weight).sum())
        self.most = max(self.most, float(changed.max()))
        first = result.trace[0]
        slots = first.drafts.shape[1]
        taken = (first.outcome[:, :slots] == 0) & (first.positions[:, :slots] < result.tokens.shape[1])
        self.accepted += float((taken.long().cumprod(1).sum(1) * weight).sum())
