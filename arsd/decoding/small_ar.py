"""An independent small AR model as the :class:`arsd.decoding.types.DraftModel` of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arsd.decoding.trees import TreeShape, parents_of
from arsd.decoding.types import Target
from arsd.errors import InputError


class SmallARDrafter:
    """An independent small model of the same tokens.

    Args:
        model: the small model with its own conditions, cache and as many rows as the target; any
            :class:`arsd.decoding.types.Target` will do, such as a :class:`arsd.models.target.DecoderTarget` around any
            transformers decoder.
        pass_tokens: tokens per pass in which it reads conditions.
    """

    def __init__(self, model: Any, pass_tokens: int) -> None:
        self.model, self.pass_tokens = model, max(2, pass_tokens)
        self.fresh: set[int] = set(range(model.batch))  # rows whose condition is not read
        self.first = model.first  # what is given of a picture is read with its condition
        self.lengths = torch.full((model.batch,), self.first, device=model.device)  # tokens read, and on the host
        self.starts = [self.first] * model.batch
        self.rows, self.origin = torch.arange(model.batch, device=model.device), torch.zeros_like(self.lengths)

    def begin(self, target: Target) -> None:
        """Nothing of the target is read.

        Raises:
            InputError: when it has another vocabulary.
        """
        if self.model.vocab != target.vocab:
            raise InputError(f"the drafter has {self.model.vocab} ids, the target {target.vocab}: they must be the same")

    def catch_up(self, tokens: Tensor, read: list[int], columns: list[int]) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        new = {b for b in self.fresh if read[b] == self.first}
        starts = [max(self.first, n) for n in read]
        if new and self.model.unread + self.first:
            self.model.prefill([-self.model.unread if b in new else n for b, n in enumerate(starts)], self.pass_tokens)
        self.fresh -= new
        self.starts = starts
        # all that a round sends to the device: every upload of its own would wait for the pass before
        self.lengths, last = torch.tensor([starts, columns], device=self.model.device)
        return self._pass(tokens, last, columns)

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        return self._pass(tokens[:, None], self.origin, [0] * len(tokens))

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.DraftModel`."""
        self.fresh |= set(rows)
        self.model.join(rows, pictures)

    def extend_tree(self, tokens: Tensor, tree: TreeShape, depth: int) -> Tensor:
        """See :class:`arsd.decoding.types.TreeDraftModel`: all levels so far once more, in a pass that grows."""
        if depth == 1:  # the last committed token is column 0
            self.root = self.lengths - 1, [n - 1 for n in self.starts]
            self.grown = self.last
        self.grown = torch.cat([self.grown, tokens], 1)
        lengths, starts = self.root
        self.model.rollback(lengths)
        logits = self.model.forward(self.grown, lengths, starts, tree.head(self.grown.shape[1]))
        return logits[:, :, parents_of(tree, depth, logits.device)]

    def _pass(self, tokens: Tensor, last: Tensor, columns: list[int]) -> Tensor:
        """One pass from where the rows are; ``last`` [B] (host: ``columns``) is the column of each row's last token."""
        self.model.rollback(self.lengths)
        logits = self.model.forward(tokens, self.lengths, self.starts)
        self.lengths = self.lengths + last + 1
        self.starts = [n + c + 1 for n, c in zip(self.starts, columns, strict=True)]
        self.last = tokens[self.rows, last][:, None]
        return logits[:, self.rows, last]
