"""Rounds that drafters hear of later, all at once: a drafter that has no round costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.types import Seen, Step, Verdict


class Backlog:
    """The rounds that some drafter has yet to hear of. Laws are kept of the latest ones only.

    Args:
        drafters: that hear of rounds late.
    """

    LAWS = 2**24  # numbers of the laws that are kept

    def __init__(self, drafters: Sequence[Any]) -> None:
        self.rounds: list[tuple[Step, Verdict, Tensor | None]] = []
        self.heard = {id(drafter): 0 for drafter in drafters}
        self.kept, self.size = 0, 0  # the first round whose law is there, and how many numbers there are

    def add(self, drafter: Any, step: Step, law: Law, verdict: Verdict) -> None:
        """A round is over, of which ``drafter`` was told."""
        if not self.heard:
            return
        scores = law.before_greedy
        self.rounds.append((step, verdict, scores))
        self.size += scores.numel()
        while self.size > self.LAWS and self.kept < len(self.rounds) - 1:
            older, judged, forgotten = self.rounds[self.kept]
            assert forgotten is not None
            self.rounds[self.kept] = (older, judged, None)
            self.kept, self.size = self.kept + 1, self.size - forgotten.numel()
        if id(drafter) in self.heard:
            self._has_heard(drafter)

    def tell(self, drafter: Any) -> None:
        """Let a drafter hear of what it has not heard of."""
        first = self.heard.get(id(drafter), len(self.rounds))
        if first == len(self.rounds):
            return
        steps, verdicts, laws = zip(*self.rounds[first:], strict=True)
        positions = torch.cat([step.positions for step in steps], 1)
        tokens = torch.cat([verdict.tokens for verdict in verdicts], 1)
        slots = [(round_, j) for round_, step in enumerate(steps) for j in range(step.positions.shape[1])]
        which, slot = torch.tensor(slots, device=tokens.device).T
        counts = torch.stack([verdict.count for verdict in verdicts], 1)
        scores = torch.cat([law for law in laws if law is not None], 1)
        drafter.hear(Seen(positions, tokens, slot < counts[:, which], scores))
        self._has_heard(drafter)

    def _has_heard(self, drafter: Any) -> None:
        self.heard[id(drafter)] = len(self.rounds)
        known = min(self.heard.values())
        if known:
            self.size -= sum(law.numel() for _, _, law in self.rounds[:known] if law is not None)
            del self.rounds[:known]
            self.kept = max(0, self.kept - known)
            self.heard = {key: first - known for key, first in self.heard.items()}


def hears_late(drafter: Any) -> bool:
    """Whether rounds of others can be told to a drafter in one go, by the class that says how it is told of its own."""
    owners = [next((c for c in type(drafter).__mro__ if name in vars(c)), None) for name in ("observe", "hear")]
    return owners[0] is owners[1]
