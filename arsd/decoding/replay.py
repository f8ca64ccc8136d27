"""Teacher forcing in the decoding loop: recorded tokens are fed as guesses and always committed.

This is how a picture is verified (:class:`Replay`), in passes of the loop itself and in the shape that the picture was made
in, and how laws are measured on given prefixes (:class:`TeacherForcing`, :class:`Steered`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.types import Draft, FixedWindow, Outcome, Parts, Step, Verdict


class _Recorded:
    """The recorded tokens of the pictures that the rows hold.

    Args:
        tokens: [M, N] recorded ids.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.held = torch.arange(len(tokens), device=tokens.device)  # the picture of each row; the first B at first

    def at(self, positions: Tensor) -> Tensor:
        """The recorded ids at ``positions`` [B, W]."""
        return self.tokens[self.held[: len(positions), None], positions.clamp_max(self.tokens.shape[1] - 1)]

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Rows begin other pictures."""
        self.held = self.held.clone()
        self.held[rows] = torch.tensor(pictures, device=self.held.device)


class TeacherForcing(_Recorded):
    """Drafter and rule at once: feeds the recorded tokens and commits them all."""

    needs_law = False

    def parts(self, pass_tokens: int) -> Parts:
        """The parts of a run in passes of ``pass_tokens``."""
        return Parts(self, self, FixedWindow(pass_tokens), pass_tokens)

    def propose(self, step: Step) -> Draft:
        """The recorded tokens."""
        return Draft(self.at(step.positions[:, :-1]))

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """Commit the whole window as recorded."""
        recorded = self.at(step.positions)
        return Verdict(step.width, recorded, torch.full_like(recorded, int(Outcome.ACCEPTED)))

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Nothing to learn."""


class Replay(TeacherForcing):
    """Teacher forcing that measures by how much each recorded token falls short of the arg-max.

    Args:
        tokens: [B, N] recorded ids.
        margin: scores that differ by less may have changed places under another rounding, and a token whose score lies that
            near the border of top-k or top-p may have been kept or dropped.

    Attributes:
        gaps: [B, N] best score minus the token's own, of log p + G; 0 where the token *is* the arg-max, infinity where the
            law excludes it. With ``margin``, ids near the border of the support do not count against a token, and a token
            near it is not excluded.
        flips: [B, N] whether the token is not the arg-max, margins or not.
    """

    def __init__(self, tokens: Tensor, margin: float = 0.0) -> None:
        super().__init__(tokens)
        self.margin = margin
        self.gaps = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        self.flips = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """Commit the whole window as recorded; remember how each token was judged."""
        verdict = super().verify(step, law, draft)
        noise = step.token_gumbel(law.scores.shape[-1], law.scores.dtype)
        rows, slots = step.active.nonzero(as_tuple=True)
        place = (self.held[rows], step.positions[rows, slots])
        self.flips[place] = ((law.scores + noise).argmax(-1) != verdict.tokens)[rows, slots]
        self.gaps[place] = self._gaps(law, noise, verdict.tokens)[rows, slots]
        return verdict

    def _gaps(self, law: Law, noise: Tensor, recorded: Tensor) -> Tensor:
        kept = law.scores.isfinite()
        border = law.scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        surely = kept & (
            (law.unfiltered >= border + self.margin) | (law.unfiltered == law.unfiltered.amax(-1, keepdim=True))
        )
        perhaps = kept | (law.unfiltered >= border - self.margin)
        best = (law.unfiltered + noise).masked_fill(~(surely if self.margin else kept), -torch.inf).amax(-1)
        own = (law.unfiltered + noise).masked_fill(~perhaps, -torch.inf).gather(-1, recorded[..., None])[..., 0]
        return (best - own).clamp_min(0).double()


class Steered(_Recorded):
    """A rule on given prefixes: it judges the guesses of its drafter, and the recorded tokens are committed.

    A slot is reached when every guess before it is the recorded token, and a pass ends behind the first guess that is not.
    So the total variation that the rule states for each slot (``local_tv``) is read at every position of the recorded
    picture once, whatever the rule would have committed.

    Args:
        rule: of a chain.
        tokens: [M, N] recorded ids.
    """

    def __init__(self, rule: Any, tokens: Tensor) -> None:
        super().__init__(tokens)
        self.rule = rule

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        verdict: Verdict = self.rule.verify(step, law, draft)
        recorded = self.at(step.positions)
        agreed = (draft.tokens[:, : recorded.shape[1] - 1] == recorded[:, :-1]).long().cumprod(1).sum(1)
        verdict.count = torch.minimum(agreed + 1, step.width)
        committed = torch.arange(recorded.shape[1], device=recorded.device) < verdict.count[:, None]
        verdict.tokens, verdict.near_tie = torch.where(committed, recorded, verdict.tokens), None
        return verdict

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Rows begin other pictures."""
        super().join(rows, pictures)
        if hasattr(self.rule, "join"):
            self.rule.join(rows, pictures)
