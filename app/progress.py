"""How far pictures are: every token, how it came about and in which pass, heard from the decoding loop pass by pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from arsd.decoding import Outcome
from arsd.decoding.types import Round

UNDECIDED = -1
NAMES = {
    Outcome.ACCEPTED: "accepted guess",
    Outcome.RELAXED: "taken by the relaxed rule",
    Outcome.RESAMPLED: "resampled: the guess was refused",
    Outcome.BONUS: "the model's own, without a guess",
    Outcome.FORCED: "forced by the layout",
}


class Progress:
    """What is known of the tokens of a call while it runs.

    Attributes:
        tokens: [M, N] ids; 0 where undecided.
        outcomes: [M, N] :class:`arsd.decoding.Outcome` of each, or ``UNDECIDED``.
        passes: [M, N] the pass, from 0, that committed it.
        committed: of each picture, the tokens of each of its passes.
        forward_passes: of the call.
        seconds: of decoding so far: wall clock from the first pass on, less what drawing took.

    Args:
        pictures: M.
        num_tokens: N.
    """

    def __init__(self, pictures: int, num_tokens: int) -> None:
        self.tokens = np.zeros((pictures, num_tokens), dtype=np.int64)
        self.outcomes = np.full((pictures, num_tokens), UNDECIDED, dtype=np.int8)
        self.passes = np.zeros((pictures, num_tokens), dtype=np.int32)
        self.committed: list[list[int]] = [[] for _ in range(pictures)]
        self.forward_passes, self.aside = 0, 0.0
        self.began = time.perf_counter()

    def hear(self, round: Round) -> None:
        """A pass was made."""
        positions, tokens, outcome = (x.numpy() for x in (round.positions, round.tokens, round.outcome))
        for row, (count, picture) in enumerate(zip(round.counts, round.pictures, strict=True)):
            if count:
                where = positions[row, :count]
                self.tokens[picture, where] = tokens[row, :count]
                self.outcomes[picture, where] = outcome[row, :count]
                self.passes[picture, where] = self.forward_passes
                self.committed[picture].append(count)
        self.forward_passes += 1

    @property
    def seconds(self) -> float:
        """See the class."""
        return time.perf_counter() - self.began - self.aside

    @property
    def done(self) -> int:
        """Tokens decided."""
        return int((self.outcomes != UNDECIDED).sum())

    @property
    def total(self) -> int:
        """Tokens of all pictures."""
        return int(self.outcomes.size)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per picture and pass."""
        return sum(map(sum, self.committed)) / max(1, sum(map(len, self.committed)))

    def counts(self, picture: int | None = None) -> dict[str, int]:
        """How many tokens came about in each way, by its name."""
        outcomes = self.outcomes if picture is None else self.outcomes[picture]
        return {name: n for kind, name in NAMES.items() if (n := int((outcomes == int(kind)).sum()))}


class Pace:
    """Lets something be done a few times a second, and never for more than a share of the time.

    Args:
        every: seconds between two times, at least.
        share: of the time that it may take.
    """

    def __init__(self, every: float = 0.25, share: float = 0.2) -> None:
        self.every, self.share, self.due = every, share, 0.0

    def __call__(self, act: Callable[[], Any]) -> float:
        """Do it, if it is due; returns the seconds that it took."""
        began = time.perf_counter()
        if began < self.due:
            return 0.0
        act()
        ended = time.perf_counter()
        self.due = ended + max(self.every, (ended - began) * (1 / self.share - 1))
        return ended - began
