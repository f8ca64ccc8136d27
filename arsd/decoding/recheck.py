"""Near-ties decided once more, in the pass shape of plain autoregressive decoding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arsd.decoding.laws import Law, Laws
from arsd.decoding.rules import decided
from arsd.decoding.types import Outcome, Step, Target, Verdict


def recheck(
    margin: float, step: Step, law: Law, verdict: Verdict, target: Target, laws: Laws, last: Tensor, lengths: Tensor
) -> int:
    """Decide the first near-tie of every row again in a pass of one token, and commit nothing behind it.

    A wide pass rounds otherwise than a pass of one token, so that a near-tie may be decided otherwise. Where the two best
    scores of a token that is to be committed lie nearer than ``margin``, the token is what a pass of one token says, as in
    plain AR; the entries of the cache before it still come from wide passes. For seed-exact rules on chains of guesses.

    Args:
        margin: of log p + G (of log p when decoding greedily), more than 0.
        step: of the round.
        law: p of its slots; the slots that are decided again get the new one.
        verdict: on the round; cut behind those slots.
        target: whose pass it was.
        laws: of the call.
        last: [B, 1] the last committed token of each row.
        lengths: [B] committed lengths.

    Returns:
        Rows that were decided again.
    """
    slots = torch.arange(step.positions.shape[1], device=lengths.device)
    _, margins = decided(law, lambda: step.token_gumbel(law.scores.shape[-1], law.scores.dtype))
    doubtful = (margins < margin) & (slots < verdict.count[:, None])
    places = torch.where(doubtful.any(1), doubtful.long().argmax(1), -1)
    found = places.tolist()
    rows = [b for b, place in enumerate(found) if place >= 0]
    if not rows:
        return 0
    at = places.clamp_min(0)
    before = verdict.tokens.gather(1, (at - 1).clamp_min(0)[:, None])
    fed = torch.where(at[:, None] > 0, before, last)
    where = lengths + at
    starts = [n + max(0, place) for n, place in zip(step.starts, found, strict=True)]
    target.rollback(where)
    logits = target.forward(fed, where, starts)
    positions = step.positions.gather(1, at[:, None])
    here = laws(logits[:, :, :1], positions)
    one = replace(step, positions=positions, width=step.width.clamp_max(1), active=step.active[:, :1], starts=starts)
    tokens, _ = decided(here, lambda: one.token_gumbel(here.scores.shape[-1], here.scores.dtype))
    index = torch.tensor(rows, device=lengths.device)
    place = at[index]
    verdict.tokens[index, place] = tokens[index, 0]
    verdict.outcome[index, place] = int(Outcome.RESAMPLED)
    verdict.count[index] = place + 1
    law.scores[index, place] = here.scores[index, 0]
    return len(rows)
