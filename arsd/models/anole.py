"""Anole (arXiv 2407.06135) and Chameleon (arXiv 2405.09818): 32 x 32 codes between two words, pictures in prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.lumina import BEGIN, END, END_OF_TURN
from arsd.models.raster import Raster
from arsd.models.token_images import TokenProtocol, chameleon_code_ids, word_ids

PLACEHOLDER = "<image>"


class AnoleProtocol(TokenProtocol):
    """Anole.

    A prompt may speak of pictures: ``<image>`` stands for each in turn, and those without a place come before the text.

    Args:
        tokenizer: Chameleon's text tokenizer.
        codes: codes of the image tokenizer.
        factor: pixels per code along one side (16).
        size: side of a picture in pixels (512); there is no other size.
        sampling: sampling options instead of Anole's own.

    Raises:
        CheckpointError: when the tokenizer is another model's, or has another number of codes.
    """

    def __init__(
        self, tokenizer: Any, codes: int, factor: int, size: int = 512, sampling: dict[str, float] | None = None
    ) -> None:
        self.tokenizer, self.factor, self.size = tokenizer, factor, size
        self._begin, self._end, self._turn = word_ids(tokenizer, (BEGIN, END, END_OF_TURN))
        self.mark_ids = {"end": self._end}
        found = chameleon_code_ids(tokenizer)
        if found is None or len(found) != codes:
            known = "no" if found is None else str(len(found))
            raise CheckpointError(f"the text tokenizer has {known} codes, the image tokenizer {codes}")
        if size < factor or size % factor:
            raise CheckpointError(f"pictures of {size} pixels cannot be cut into codes of {factor} pixels")
        self.code_ids = found
        self.sampling = sampling or {"guidance_scale": 3.0, "image_guidance_scale": 1.2, "temperature": 1.0, "top_p": 0.9}
        bos = tokenizer.bos_token_id
        self._first = [] if bos is None else [int(bos)]

    def raster(self, height: int, width: int) -> Raster:
        """See :class:`TokenProtocol`."""
        if (height, width) != (self.size, self.size):
            raise InputError(f"this model makes pictures of {self.size} x {self.size} pixels only")
        side = self.size // self.factor
        return Raster(side, side, len(self.code_ids), ("end",), None, ("end",))

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Tensor] = ()) -> list[int]:
        """See :class:`TokenProtocol`.

        Raises:
            InputError: for more places than pictures.
        """
        pieces = prompt.split(PLACEHOLDER)
        waiting = [self._picture(image) for image in images]
        if len(pieces) - 1 > len(waiting):
            raise InputError(
                f"the prompt speaks of {len(pieces) - 1} pictures ({PLACEHOLDER}), prompt_images has {len(waiting)}"
            )
        unplaced = len(waiting) - (len(pieces) - 1)
        ids = [*self._first, *(i for picture in waiting[:unplaced] for i in picture)]
        for piece, picture in zip(pieces, [*waiting[unplaced:], []], strict=True):
            ids += [*self.tokenizer.encode(piece, add_special_tokens=False), *picture] if piece else picture
        return [*ids, self._turn, self._begin]

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """No words, no pictures."""
        return [*self._first, self._begin]

    def image_only_ids(self, height: int, width: int, images: Sequence[Tensor]) -> list[int]:
        """See :class:`TokenProtocol`."""
        return [*self._first, *(i for image in images for i in self._picture(image)), self._begin]

    def _picture(self, codes: Tensor) -> list[int]:
        return [self._begin, *self.code_ids[codes.cpu().flatten()].tolist(), self._end]
