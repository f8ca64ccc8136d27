"""Emu3 (arXiv 2409.18869) and Emu3.5 (arXiv 2510.26583): prompts, sizes in digits, and the grammar of their pictures.

A picture is ``<image start> h*w <image token>``, with h and w in codes and in plain text, then rows of codes. Emu3 has an
end-of-line word behind every row, then ``<end of frame> <image end> <end>``. Emu3.5 has it between the rows only, and then
``<image end>``. All before the first code follows from the size asked for, and belongs to the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from arsd.errors import CheckpointError, InputError
from arsd.models.raster import Raster
from arsd.models.token_images import TokenProtocol, word_ids

BEGIN, IMAGE, END = "<|image start|>", "<|image token|>", "<|image end|>"
END_OF_LINE, END_OF_FRAME, FIRST, LAST = "<|extra_200|>", "<|extra_201|>", "<|extra_203|>", "<|extra_204|>"
CODE = "<|visual token {:06d}|>"
QUALITY = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, low"
    " quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""What upstream's script appends to every prompt, and its negative prompt."""


class Emu3Protocol(TokenProtocol):
    """Emu3-Gen.

    Args:
        tokenizer: the text tokenizer, which knows codes and marks by name.
        codes: codes of the image tokenizer.
        factor: pixels per code along one side (8).
        size: side of the square picture with the area that the model was trained on, in pixels (720).
        sampling: sampling options instead of the published ones.

    Raises:
        CheckpointError: when the tokenizer is another model's, or has another number of codes.
    """

    negative_prompt: str | None = NEGATIVE
    marks: tuple[tuple[str, str], ...] = (
        ("end_of_line", END_OF_LINE),
        ("end_of_frame", END_OF_FRAME),
        ("end", END),
        ("end_of_sequence", LAST),
    )
    published: dict[str, float] = {"guidance_scale": 3.0, "top_k": 2048, "temperature": 1.0}

    def __init__(
        self, tokenizer: Any, codes: int, factor: int, size: int = 720, sampling: dict[str, float] | None = None
    ) -> None:
        self.tokenizer, self.factor, self.size, self.sampling = tokenizer, factor, size, sampling or dict(self.published)
        self._first, self._begin, self._image = word_ids(tokenizer, (FIRST, BEGIN, IMAGE))
        self.mark_ids = dict(zip(dict(self.marks), word_ids(tokenizer, [word for _, word in self.marks]), strict=True))
        first, last = word_ids(tokenizer, (CODE.format(0), CODE.format(codes - 1)))
        if last - first != codes - 1 or CODE.format(codes) in tokenizer.get_vocab():
            raise CheckpointError(f"the text tokenizer does not have the {codes} codes of the image tokenizer")
        self.code_ids = torch.arange(first, last + 1)

    def raster(self, height: int, width: int) -> Raster:
        """See :class:`TokenProtocol`."""
        if height % self.factor or width % self.factor:
            raise InputError(f"height and width must be multiples of {self.factor}, not {height} x {width}")
        rows, columns = height // self.factor, width // self.factor
        return self._raster(rows, columns)

    def _raster(self, rows: int, columns: int) -> Raster:
        marks = tuple(self.mark_ids)
        return Raster(rows, columns, len(self.code_ids), marks, "end_of_line", ("end_of_frame", "end", "end_of_sequence"))

    def advice(self, height: int, width: int) -> str:
        """See :class:`TokenProtocol`: sides of any ratio, but of one area."""
        if abs(height * width / self.size**2 - 1) < 0.1:
            return ""
        return (
            f"{height} x {width} is no size that this model was trained on: about {self.size} x {self.size}, or of that area"
        )

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Any] = ()) -> list[int]:
        """See :class:`TokenProtocol`; :data:`QUALITY` is appended where the prompt does not end so."""
        if images:
            return self.image_only_ids(height, width, images)
        text = prompt if prompt.endswith(QUALITY) else prompt + QUALITY
        return [self._first, *self._words(text), *self._opening(height, width)]

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """See :class:`TokenProtocol`."""
        words = self._words(NEGATIVE if negative_prompt is None else negative_prompt)
        return [self._first, *words, *self._opening(height, width)]

    def _words(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _opening(self, height: int, width: int) -> list[int]:
        return [self._begin, *self._words(f"{height // self.factor}*{width // self.factor}"), self._image]


class Emu35Protocol(Emu3Protocol):
    """Emu3.5-Image, and Emu3.5, for which upstream recommends a guidance scale of 2.

    Args: as of :class:`Emu3Protocol`, with a factor of 16 and a size of 1024 pixels.
    """

    negative_prompt = None
    marks = (("end_of_line", END_OF_LINE), ("end", END))
    published = {"guidance_scale": 5.0, "top_k": 5120, "temperature": 1.0}
    asked = FIRST + "You are a helpful assistant for t2i task. USER: {} ASSISTANT: <|extra_100|>"
    unasked = FIRST + "You are a helpful assistant. USER:  ASSISTANT: <|extra_100|>"

    def _raster(self, rows: int, columns: int) -> Raster:
        return Raster(rows, columns, len(self.code_ids), tuple(self.mark_ids), "end_of_line", ("end",), between=True)

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Any] = ()) -> list[int]:
        """See :class:`TokenProtocol`."""
        if images:
            return self.image_only_ids(height, width, images)
        return [*self._words(self.asked.format(prompt)), *self._opening(height, width)]

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """See :class:`TokenProtocol`."""
        return [*self._words(self.unasked), *self._opening(height, width)]
