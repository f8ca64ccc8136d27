"""Rounds that drafters hear of later, all at once: a drafter that has no round costs nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.types import Seen, Step, Verdict


class Backlog:
    """The rounds that some drafter has yet to hear of. Laws are kept of the latest ones, if a drafter reads them.

    Args:
        drafters: that hear of rounds late.
    """

    SLOTS, NUMBERS = 64, 2**24  # of the laws that are kept; one round is kept in any case

    def __init__(self, drafters: Sequence[Any]) -> None:
        self.rounds: list[tuple[Tensor, Tensor, Tensor]] = []  # positions [B, n], tokens [B, n], how many were committed [B]
        self.laws: deque[Tensor] = deque()  # of the last rounds
        self.heard = {id(drafter): 0 for drafter in drafters}
        self.keeps_laws = any(getattr(drafter, "hears_laws", False) for drafter in drafters)

    def add(self, drafter: Any, step: Step, law: Law, verdict: Verdict) -> None:
        """A round is over, of which ``drafter`` was told."""
        if not self.heard:
            return
        self.rounds.append((step.positions, verdict.tokens, verdict.count))
        if self.keeps_laws:
            scores = law.before_greedy
            if scores.untyped_storage().nbytes() > 2 * scores.nbytes:  # a part of something that may go
                scores = scores.clone()
            self.laws.append(scores)
            while len(self.laws) > 1 and self._too_many():
                self.laws.popleft()
        if id(drafter) in self.heard:
            self._has_heard(drafter)

    def tell(self, drafter: Any) -> None:
        """Let a drafter hear of what it has not heard of."""
        first = self.heard.get(id(drafter), len(self.rounds))
        if first == len(self.rounds):
            return
        positions, tokens, counts = zip(*self.rounds[first:], strict=True)
        places = [(number, slot) for number, one in enumerate(positions) for slot in range(one.shape[1])]
        which, slots = torch.tensor(places, device=counts[0].device).T
        taken = slots < torch.stack(counts, 1)[:, which]
        laws = list(self.laws)[-len(positions) :] if getattr(drafter, "hears_laws", False) else []
        seen = Seen(torch.cat(positions, 1), torch.cat(tokens, 1), taken, torch.cat(laws, 1) if laws else None)
        drafter.hear(seen)
        self._has_heard(drafter)

    def _too_many(self) -> bool:
        return sum(x.shape[1] for x in self.laws) > self.SLOTS or sum(x.numel() for x in self.laws) > self.NUMBERS

    def _has_heard(self, drafter: Any) -> None:
        """Rounds of which all have heard are forgotten."""
        self.heard[id(drafter)] = len(self.rounds)
        known = min(self.heard.values())
        if known:
            del self.rounds[:known]
            self.heard = {key: first - known for key, first in self.heard.items()}
            while len(self.laws) > len(self.rounds):
                self.laws.popleft()


def hears_late(drafter: Any) -> bool:
    """Whether rounds of others can be told to a drafter in one go, by the class that says how it is told of its own."""
    owners = [next((c for c in type(drafter).__mro__ if name in vars(c)), None) for name in ("observe", "hear")]
    return owners[1] is not None and owners[0] is owners[1]
