"""iVideoGPT (arXiv 2405.15223): how a clip lies in the tokens of a plain Llama.

Context pictures come first, a grid of codes each; every later picture is a mark and a few codes of another codebook, which
tell what changes (:mod:`arsd.tokenizers.ivideogpt`). The ids of the loop are the model's own: codes of context pictures,
codes of later pictures, the mark between context pictures, the mark in front of later ones. Published folders are read by
:mod:`arsd.models.ivideogpt_files`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from arsd.decoding.laws import Grammar
from arsd.errors import InputError

SAMPLING = {"temperature": 1.0, "top_k": 100}
"""What upstream's prediction script samples with."""
FRAMES = 16
"""Pictures of a clip, context included, that the published models were trained on."""


@dataclass(frozen=True)
class ContextVolume:
    """The layout of one clip. What a position holds is a pure function of the position.

    Upstream lets its models write any id anywhere, drops what stands where marks belong, and clips what is no code of later
    pictures to their range; here marks are forced, and later pictures have codes of their own only.

    Args:
        frames: pictures of the clip, context included.
        context: c, context pictures.
        side: codes along one side of a context picture.
        patches: codes along one side of a later picture.
        context_codes: C, codes of context pictures.
        dynamics_codes: codes of later pictures, counted from C on.
    """

    frames: int
    context: int = 2
    side: int = 16
    patches: int = 4
    context_codes: int = 8192
    dynamics_codes: int = 8192

    @property
    def codes(self) -> int:
        """Codes of both kinds."""
        return self.context_codes + self.dynamics_codes

    @property
    def marks(self) -> tuple[str, str]:
        """The mark between context pictures, and that in front of each later one."""
        return ("context", "dynamics")

    @property
    def vocab(self) -> int:
        """V, codes and marks."""
        return self.codes + len(self.marks)

    @property
    def row_length(self) -> int:
        """Tokens from one row of a later picture to the next."""
        return self.patches

    @property
    def frame_length(self) -> int:
        """Tokens from one later picture to the next."""
        return 1 + self.patches**2

    @property
    def first(self) -> int:
        """The position of the first code."""
        return 0

    @property
    def _begin(self) -> int:
        """Tokens of all context pictures."""
        return self.context * (self.side**2 + 1) - 1

    @property
    def num_tokens(self) -> int:
        """N, tokens of a whole clip with its marks."""
        return self._begin + (self.frames - self.context) * self.frame_length

    @cached_property
    def forced(self) -> dict[int, int]:
        """``{position: id}`` of the marks."""
        between = range(self.side**2, self._begin, self.side**2 + 1)
        ahead = range(self._begin, self.num_tokens, self.frame_length)
        return dict.fromkeys(between, self.codes) | dict.fromkeys(ahead, self.codes + 1)

    @cached_property
    def places(self) -> Tensor:
        """[K] the position of each code."""
        return torch.tensor([n for n in range(self.num_tokens) if n not in self.forced])

    def begins(self, count: int) -> bool:
        """Whether clips can begin with ``count`` given tokens: the context, or more pictures, and never all of them."""
        return count % self.frame_length == self._begin % self.frame_length and self._begin <= count < self.num_tokens

    def grammar(self, device: torch.device | str = "cpu") -> Grammar:
        """Marks are forced; every picture has codes of its own kind, and nothing else."""
        ids = torch.arange(self.vocab)
        is_context = ids < self.context_codes
        allowed = torch.stack([is_context, ~is_context & (ids < self.codes)])
        group = [int(n >= self._begin) for n in range(self.num_tokens)]
        return Grammar(self.num_tokens, self.vocab, self.forced, allowed, group, device)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to codes [B, K], as :class:`arsd.tokenizers.ivideogpt.IVideoGPTTokenizer` has them.

        A later picture that was not finished (token 0 where no code of its kind stands) has the first code there.

        Raises:
            InputError: for tokens of another clip, or with ids where they do not belong.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise InputError(f"tokens must be [B, {self.num_tokens}], not {tuple(tokens.shape)}")
        codes = tokens[:, self.places.to(tokens.device)]
        later = torch.arange(codes.shape[1], device=codes.device) >= self.context * self.side**2
        codes = torch.where(later & (codes == 0), self.context_codes, codes)
        self.check(codes)
        return codes

    def check(self, codes: Tensor) -> None:
        """Raise InputError for codes [B, K'] that lie where those of the other kind, or marks, belong."""
        context, later = codes.tensor_split([self.context * self.side**2], dim=1)
        if bool(((context < 0) | (context >= self.context_codes)).any()):
            raise InputError(f"context pictures have codes from 0 to {self.context_codes - 1}")
        if bool(((later < self.context_codes) | (later >= self.codes)).any()):
            raise InputError(f"pictures behind the context have codes from {self.context_codes} to {self.codes - 1}")

    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, K'] of the first pictures, the context at least, to their tokens; the inverse of :meth:`to_codes`.

        Raises:
            InputError: for codes that are no whole pictures of this clip.
        """
        shown, each = self.context * self.side**2, self.patches**2
        later, rest = divmod(codes.shape[-1] - shown, each)
        if codes.ndim != 2 or rest or not 0 <= later <= self.frames - self.context:
            raise InputError(f"codes must be [B, {shown} + up to {self.frames - self.context} * {each}]")
        count = self._begin + later * self.frame_length
        tokens = codes.new_zeros(len(codes), count)
        for position, mark in self.forced.items():
            if position < count:
                tokens[:, position] = mark
        tokens[:, self.places[: codes.shape[1]].to(codes.device)] = codes
        return tokens
