"""Pass shapes: does a token's law depend, bit by bit, on where in a pass and in which row of the batch it is computed?

Attention runs over the whole cache under a mask and every pass has one shape (batch, pass_tokens), so the arithmetic of a
slot could be the same everywhere in a pass. Whether it is, is a property of the kernels, measured here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def probe(target: Any, num_tokens: int, pass_tokens: int) -> str:
    """16 hex digits of the logits of fixed passes: equal where two machines compute alike, bit by bit.

    Args:
        target: a fresh target of the pass shape in question.
        num_tokens: N.
        pass_tokens: T.
    """
    digest, device = hashlib.sha256(), target.device
    with torch.inference_mode():
        target.prefill([-target.unread] * target.batch, pass_tokens)
        for start in (0, min(pass_tokens, num_tokens - 1), num_tokens // 2):
            starts = [start] * target.batch
            lengths = torch.tensor(starts, device=device)
            target.rollback(lengths)
            ids = torch.arange(target.batch * pass_tokens, device=device) * 7919 + 31 * start
            logits = target.forward((ids % target.vocab).view(target.batch, pass_tokens), lengths, starts)
            digest.update(logits.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class ShapeReport:
    """Largest differences of logits between computations of the same token, in one pass shape.

    Args:
        batch: rows.
        pass_tokens: tokens per row.
        places: over the places in the pass, in one row.
        rows: over the rows, at one place.
        everywhere: over all places and rows.
        reference: [contexts, S, V] the logits themselves, to compare shapes.
    """

    batch: int
    pass_tokens: int
    places: float
    rows: float
    everywhere: float
    reference: Tensor

    @property
    def holds(self) -> bool:
        """The same bits everywhere."""
        return self.everywhere == 0


def study_shape(target: Any, tokens: Tensor, pass_tokens: int, contexts: Sequence[int]) -> ShapeReport:
    """Compute the law of the same tokens at every place of a pass and in every row, with junk around it.

    Args:
        target: a fresh target whose rows all have the same condition.
        tokens: [N] the picture.
        pass_tokens: T.
        contexts: positions whose laws are compared, each in 1..N-1.
    """
    batch, device = target.batch, target.device
    generator = torch.Generator().manual_seed(0)
    tokens = tokens.to(device)

    def feed(start: int, known: int) -> Tensor:
        """A pass from ``start`` that feeds ``known`` right tokens and junk behind them."""
        fed = torch.randint(0, target.vocab, (batch, pass_tokens), generator=generator).to(device)
        first = max(0, start - 1)
        right = tokens[first : start - 1 + known]
        fed[:, known - len(right) : known] = right
        lengths = torch.tensor([start] * batch, device=device)
        target.rollback(lengths)
        return target.forward(fed, lengths, [start] * batch)

    found = []
    with torch.inference_mode():
        target.prefill([-target.unread] * batch, pass_tokens)
        for context in sorted(contexts):
            for start in range(0, context, pass_tokens):  # the cache as teacher forcing leaves it
                feed(start, min(pass_tokens, len(tokens) - start + 1))
            places = range(min(pass_tokens, context))
            found.append(torch.stack([feed(context - place, place + 1)[:, :, place].clone() for place in places]))
    spread = [
        ((x[:, :, 0] - x[0, :, 0]).abs().amax(), (x[0] - x[0, :, :1]).abs().amax(), (x - x[0, :, :1]).abs().amax())
        for x in found  # [places, S, B, V]
    ]
    by_place, by_row, everywhere = [max(float(s[i]) for s in spread) for i in range(3)]
    return ShapeReport(batch, pass_tokens, by_place, by_row, everywhere, torch.stack([x[0, :, 0] for x in found]))
