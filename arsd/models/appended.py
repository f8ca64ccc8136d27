"""Stock language models whose vocabulary goes on with the codes of an image tokenizer: what SimpleAR and Liquid share.

The code c is the word ``len(tokenizer) + c``; the text tokenizer has no names for them. A picture is its codes row by row,
without marks, so nothing tells the model how wide it is: pictures are square.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.folders import config_of
from arsd.models.raster import Raster
from arsd.models.token_images import TokenProtocol, word_ids

LARGEST = 1024  # pixels along a side: more was never trained, by any of them
_WORD_FILES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")


class AppendedProtocol(TokenProtocol):
    """What such families share; each names its ``special`` words, and says how its two streams are worded.

    Args:
        tokenizer: the text tokenizer.
        codes: codes of the image tokenizer.
        factor: pixels per code along one side.
        size: side of the square picture that the weights were trained on, in pixels.
        sampling: sampling options instead of the published ones.
        vocabulary: V, words and codes that the network knows; not checked when ``None``.

    Raises:
        CheckpointError: when the text tokenizer lacks special words, or the sizes do not add up.
    """

    published: ClassVar[dict[str, float]]
    special: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        tokenizer: Any,
        codes: int,
        factor: int,
        size: int,
        sampling: dict[str, float] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer, self.factor, self.size, self.sampling = tokenizer, factor, size, sampling or dict(self.published)
        self.special_ids, words = word_ids(tokenizer, self.special), len(tokenizer)
        if vocabulary is not None and words + codes != vocabulary:
            found = f"the text tokenizer has {words} words, the image tokenizer {codes} codes"
            raise CheckpointError(f"{found}, the network {vocabulary} of both together: one of them is another model's")
        self.mark_ids = {}
        self.code_ids = torch.arange(words, words + codes)

    def raster(self, height: int, width: int) -> Raster:
        """See :class:`TokenProtocol`."""
        if height != width or height % self.factor or not 0 < height <= LARGEST:
            side = f"height = width, a multiple of {self.factor} in {self.factor}..{LARGEST}"
            raise InputError(f"this model makes square pictures: give {side}, not {height} x {width}")
        return Raster(height // self.factor, width // self.factor, len(self.code_ids))

    def advice(self, height: int, width: int) -> str:
        """See :class:`TokenProtocol`."""
        if height == self.size:
            return ""
        return f"{height} x {width} is no size that this model was trained on: {self.size} x {self.size} is"

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Tensor] = ()) -> list[int]:
        """See :class:`TokenProtocol`."""
        return self.image_only_ids(height, width, images) if images else self.asked(prompt)

    @abstractmethod
    def asked(self, prompt: str) -> list[int]:
        """Ids of the conditional stream."""

    def words(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def is_stock(folder: str | Path, model_type: str, words: Sequence[str]) -> bool:
    """Whether a folder is such a network: by its configuration, and special words in its tokenizer's files.

    Those are searched, not parsed, so that the many other folders with this configuration are soon told.
    """
    folder = Path(folder)
    if config_of(folder).get("model_type") != model_type:
        return False
    files = [(folder / name).read_bytes() for name in _WORD_FILES if (folder / name).is_file()]
    return any(all(f'"{word}"'.encode() in content for word in words) for content in files)
