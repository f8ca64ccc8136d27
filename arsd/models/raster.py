"""How a picture lies in a sequence of tokens: rows of codes, with marks (end of row, end of image) where a model wants them.

The decoding loop works in a vocabulary of its own that is as small as it can be: ids 0..C-1 are the codes of the image
tokenizer, the ids behind them the marks of the family in the order of :attr:`Raster.marks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from arsd.decoding.laws import Grammar
from arsd.errors import InputError


@dataclass(frozen=True)
class Raster:
    """The layout of one picture. What a position holds is a pure function of the position.

    Args:
        rows: h, rows of codes.
        columns: w, codes per row.
        codes: C, codes of the image tokenizer.
        marks: names of the family's structure tokens; mark i has the id C + i.
        row_end: the mark behind each row, if any.
        tail: marks behind the last row.
        between: ``row_end`` stands between rows only, not behind the last one (Emu3.5).
        preview: (rows, columns) of a small grid of codes ahead of the picture, which is no part of it (GLM-Image).
    """

    rows: int
    columns: int
    codes: int
    marks: tuple[str, ...] = ()
    row_end: str | None = None
    tail: tuple[str, ...] = ()
    between: bool = False
    preview: tuple[int, int] = (0, 0)

    frame_length: ClassVar[int] = 0  # a picture has no frames

    @property
    def row_length(self) -> int:
        """Tokens from one row to the next."""
        return self.columns + (self.row_end is not None)

    @property
    def first(self) -> int:
        """The position of the picture's first code."""
        return self.preview[0] * self.preview[1]

    @property
    def _behind(self) -> int:
        """The position behind the last row."""
        return self.first + self.rows * self.row_length - (self.between and self.row_end is not None)

    @property
    def num_tokens(self) -> int:
        """N, tokens of a whole picture with its marks."""
        return self._behind + len(self.tail)

    @property
    def vocab(self) -> int:
        """V, codes and marks."""
        return self.codes + len(self.marks)

    @cached_property
    def forced(self) -> dict[int, int]:
        """``{position: id}`` of the marks."""
        found = {}
        if self.row_end is not None:
            end, rows = self.codes + self.marks.index(self.row_end), self.rows - self.between
            found = {self.first + row * self.row_length + self.columns: end for row in range(rows)}
        return found | {self._behind + i: self.codes + self.marks.index(name) for i, name in enumerate(self.tail)}

    def begins(self, count: int) -> bool:
        """Whether pictures can begin with ``count`` given tokens: whole rows, and never all of them."""
        return count == 0 or (not self.first and count % self.row_length == 0 and 0 < count < self.rows * self.row_length)

    @cached_property
    def places(self) -> Tensor:
        """[h, w] the position of each code of the picture."""
        return self.first + self.row_length * torch.arange(self.rows)[:, None] + torch.arange(self.columns)

    def grammar(self, device: torch.device | str = "cpu") -> Grammar:
        """Marks are forced where they belong; everywhere else every code is allowed, and nothing but codes."""
        allowed = None
        if self.marks:
            allowed = (torch.arange(self.vocab) < self.codes)[None]
        return Grammar(self.num_tokens, self.vocab, self.forced, allowed, device=device)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to codes [B, h, w].

        Raises:
            InputError: for tokens of another picture size, or with marks at the places of codes.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise InputError(f"tokens must be [B, {self.num_tokens}], not {tuple(tokens.shape)}")
        codes = tokens[:, self.places.to(tokens.device)]
        if self.marks and bool((codes >= self.codes).any()):
            raise InputError("tokens have marks at the places of codes")
        return codes

    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] to tokens [B, N], marks included; the inverse of :meth:`to_codes`.

        Raises:
            InputError: for a grid of another shape, or a layout that holds more than this grid.
        """
        if self.first:
            raise InputError("a picture of this model begins with a preview of its own: it cannot be given")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (self.rows, self.columns):
            raise InputError(f"codes must be [B, {self.rows}, {self.columns}], not {tuple(codes.shape)}")
        tokens = codes.new_zeros(len(codes), self.num_tokens)
        for position, mark in self.forced.items():
            tokens[:, position] = mark
        tokens[:, self.places.to(codes.device)] = codes
        return tokens
