"""A grammar whose forced tokens differ between the pictures of a call, as the actions between the frames of a clip do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arsd.decoding.laws import Grammar
from arsd.errors import InputError


class RowGrammar(Grammar):
    """What each position of each picture may hold: a token that is forced in this picture, or a set of allowed ids.

    It knows which picture each row holds, so an object belongs to one call. Rows begin with the first pictures; the loop
    tells it, before it tells the drafter, of those that take another one. Every look-up is for all rows of the batch.

    Args:
        tables: [M, N] forced token of each picture and position, -1 where there is none.
        vocab: size of the vocabulary, V.
        allowed: groups of allowed ids, as :class:`Grammar` has them.
        group: likewise.
        device: of all tensors.

    Raises:
        InputError: for tables that are none.
    """

    def __init__(
        self,
        tables: Tensor,
        vocab: int,
        allowed: Tensor | None = None,
        group: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if tables.ndim != 2 or not tables.numel() or tables.is_floating_point():
            raise InputError(f"forced tokens must be whole numbers [pictures, positions], not {tuple(tables.shape)}")
        if int(tables.min()) < -1 or int(tables.max()) >= vocab:
            raise InputError(f"forced tokens must lie in 0..{vocab - 1}, or be -1 where there are none")
        super().__init__(tables.shape[1], vocab, None, allowed, group, device)
        self.tables = tables.to(device, torch.int64)
        self.any_forced = bool((tables >= 0).any())
        self.held = torch.arange(len(tables), device=device)  # the picture of each row, as far as there are rows

    def forced_at(self, positions: Tensor) -> Tensor:
        """The forced token of each position [B, W] of the pictures that the rows hold, -1 where there is none."""
        return self.tables[self.held[: len(positions), None], positions.clamp_max(self.num_tokens - 1)]

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """``rows`` begin other pictures."""
        self.held = self.held.clone()
        self.held[rows] = torch.tensor(pictures, device=self.held.device)
