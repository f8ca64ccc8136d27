"""How a clip lies in a sequence of tokens: frame after frame, each in raster order (Cosmos' order t, y, x)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from arsd.decoding.laws import Grammar
from arsd.errors import InputError


@dataclass(frozen=True)
class Volume:
    """The layout of one clip; it plays the part of :class:`arsd.models.raster.Raster`.

    Args:
        frames: t, latent frames.
        rows: h, rows of codes of a frame.
        columns: w, codes per row.
        codes: C, codes of the tokenizer.
    """

    frames: int
    rows: int
    columns: int
    codes: int
    marks: ClassVar[tuple[str, ...]] = ()
    first: ClassVar[int] = 0  # the position of the first code
    forced: ClassVar[dict[int, int]] = {}

    @property
    def row_length(self) -> int:
        """Tokens from one row to the next."""
        return self.columns

    @property
    def frame_length(self) -> int:
        """Tokens from one frame to the next."""
        return self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """N, tokens of a whole clip."""
        return self.frames * self.frame_length

    @property
    def vocab(self) -> int:
        """V, codes and marks."""
        return self.codes

    @cached_property
    def places(self) -> Tensor:
        """[t, h, w] the position of each code."""
        return torch.arange(self.num_tokens).view(self.frames, self.rows, self.columns)

    def begins(self, count: int) -> bool:
        """Whether clips can begin with ``count`` given tokens: whole frames, and never all of them."""
        return count % self.frame_length == 0 and 0 <= count < self.num_tokens

    def grammar(self, device: torch.device | str = "cpu") -> Grammar:
        """Every code is allowed everywhere."""
        return Grammar(self.num_tokens, self.vocab, device=device)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to codes [B, t, h, w].

        Raises:
            InputError: for tokens of another size.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise InputError(f"tokens must be [B, {self.num_tokens}], not {tuple(tokens.shape)}")
        return tokens[:, self.places.to(tokens.device)]

    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, t', h, w] to the tokens of the first t' frames, [B, t' * frame_length].

        Raises:
            InputError: for frames of another size, or more of them than a clip has.
        """
        size = self.rows, self.columns
        if codes.ndim != 4 or tuple(codes.shape[2:]) != size or not 0 < codes.shape[1] <= self.frames:
            raise InputError(f"codes must be [B, 1..{self.frames}, {self.rows}, {self.columns}], not {tuple(codes.shape)}")
        return codes.flatten(1)
