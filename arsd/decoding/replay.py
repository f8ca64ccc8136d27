"""Teacher forcing in the decoding loop: recorded tokens are fed as guesses, always committed, and each one is judged.

This is how a picture is verified: the passes are those of the loop itself, in the shape that the picture was made in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.types import Draft, FixedWindow, Outcome, Parts, Step, Verdict


class Replay:
    """Drafter and rule at once: feeds the recorded tokens, and measures by how much each one falls short of the arg-max.

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

    needs_law = False

    def __init__(self, tokens: Tensor, margin: float = 0.0) -> None:
        self.tokens, self.margin = tokens, margin
        self.gaps = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        self.flips = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)

    def parts(self, pass_tokens: int) -> Parts:
        """The parts of a replay in passes of ``pass_tokens``."""
        return Parts(self, self, FixedWindow(pass_tokens), pass_tokens)

    def propose(self, step: Step) -> Draft:
        """The recorded tokens."""
        return Draft(self._at(step.positions[:, :-1]))

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """Commit the whole window as recorded; remember how each token was judged."""
        recorded = self._at(step.positions)
        noise = step.token_gumbel(law.scores.shape[-1], law.scores.dtype)
        rows, slots = step.active.nonzero(as_tuple=True)
        positions = step.positions[rows, slots]
        self.flips[rows, positions] = ((law.scores + noise).argmax(-1) != recorded)[rows, slots]
        self.gaps[rows, positions] = self._gaps(law, noise, recorded)[rows, slots]
        outcome = torch.full_like(recorded, int(Outcome.ACCEPTED))
        return Verdict(step.width, recorded, outcome)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Nothing to learn."""

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """A replay has as many rows as pictures."""
        raise NotImplementedError

    def _at(self, positions: Tensor) -> Tensor:
        return self.tokens.gather(1, positions.clamp_max(self.tokens.shape[1] - 1))

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
