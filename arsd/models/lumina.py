"""Lumina-mGPT (arXiv 2408.02657) and Lumina-mGPT 2.0 (arXiv 2507.17801): prompts, sizes and grammar of both.

A picture is ``<begin> <rows> <columns>``, then rows of codes with an end-of-line word behind each, then ``<end>``. The
models were trained to write the first three themselves; here they follow from the size asked for, and belong to the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.raster import Raster
from arsd.models.token_images import TokenProtocol, chameleon_code_ids, word_ids

BEGIN, END, END_OF_LINE, END_OF_TURN = "<racm3:break>", "<eoss>", "<reserved08799>", "<reserved08706>"
PATCH = 32  # pixels along the side of the patches that a size is told in
INSTRUCTION = re.compile(r"Generate an? (dual-panel )?image of \d+x\d+ ")  # as the models were trained on
FIRST_CODE = 155000  # Lumina-mGPT 2.0: the id of code 0; its tokenizer has no words for codes


def trained_sizes(side: int, max_ratio: float = 4.0) -> list[tuple[int, int]]:
    """The (height, width) in pixels that a model of ``side`` x ``side`` pixels was trained on.

    For every number of columns there is the largest number of rows that keeps the area, in patches of 32 pixels, and the
    ratio of the sides within bounds; with some numbers of columns also smaller ones (the staircase below the hyperbola).
    """
    patches, found = (side // PATCH) ** 2, []
    columns, rows = patches, 1
    while columns > 0:
        if max(columns, rows) <= max_ratio * min(columns, rows):
            found.append((rows * PATCH, columns * PATCH))
        if (rows + 1) * columns <= patches:
            rows += 1
        else:
            columns -= 1
    return found


class LuminaProtocol(TokenProtocol):
    """Lumina-mGPT, either version.

    Args:
        tokenizer: the text tokenizer, which knows the words of the structure by name, and those of the codes in version 1.
        codes: codes of the image tokenizer.
        factor: pixels per code along one side: 16 in version 1, 8 in version 2.
        size: side of the square picture that the model was trained on (512, 768 or 1024).
        sampling: sampling options; those of the version when ``None``.
        first_code: the id of code 0, where the tokenizer has no words for codes.

    Raises:
        CheckpointError: when the tokenizer is another model's, or has another number of codes.
    """

    def __init__(
        self,
        tokenizer: Any,
        codes: int,
        factor: int,
        size: int = 768,
        sampling: dict[str, float] | None = None,
        first_code: int = FIRST_CODE,
    ) -> None:
        self.tokenizer, self.factor, self.size = tokenizer, factor, size
        if PATCH % factor or size < PATCH:
            raise CheckpointError(f"an image tokenizer with {factor} pixels per code does not go with Lumina-mGPT")
        self._begin, end, line, self._turn = word_ids(tokenizer, (BEGIN, END, END_OF_LINE, END_OF_TURN))
        self.mark_ids = {"end_of_line": line, "end": end}
        named = chameleon_code_ids(tokenizer)
        self.code_ids = torch.arange(first_code, first_code + codes) if named is None else named
        if len(self.code_ids) != codes:
            raise CheckpointError(f"the text tokenizer has {len(self.code_ids)} codes, the image tokenizer {codes}")
        self.sampling = sampling or {"guidance_scale": 4.0, "top_k": 4096 if named is None else 2000, "temperature": 1.0}
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._first = [] if first is None else [int(first)]
        known, words = tokenizer.get_vocab(), {n: f"<reserved{8800 + n:05d}>" for n in range(1, 100)}
        self._sizes = {n: int(known[word]) for n, word in words.items() if word in known}

    def raster(self, height: int, width: int) -> Raster:
        """See :class:`TokenProtocol`."""
        if height % PATCH or width % PATCH or {height // PATCH, width // PATCH} - self._sizes.keys():
            most = max(self._sizes, default=0) * PATCH
            raise InputError(f"height and width must be multiples of {PATCH} in {PATCH}..{most}, not {height} x {width}")
        marks = tuple(self.mark_ids)
        return Raster(height // self.factor, width // self.factor, len(self.code_ids), marks, "end_of_line", ("end",))

    def advice(self, height: int, width: int) -> str:
        """See :class:`TokenProtocol`: about sizes that the model was not trained on."""
        if (height, width) in trained_sizes(self.size):
            return ""
        return f"{height} x {width} is no size that a {self.size} x {self.size} model was trained on"

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Tensor] = ()) -> list[int]:
        """See :class:`TokenProtocol`; a prompt that is an instruction already (:data:`INSTRUCTION`) is taken as it is."""
        if images:
            return self.image_only_ids(height, width, images)
        text = f"Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
        text = prompt if INSTRUCTION.match(prompt) else text
        words = self.tokenizer.encode(text, add_special_tokens=False)
        return [*self._first, *words, self._turn, *self.null_ids(height, width)]

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """What a picture begins with, and nothing else: this stream knows the size, but no words."""
        return [self._begin, self._sizes[height // PATCH], self._sizes[width // PATCH]]
