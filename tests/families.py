"""One tiny published checkpoint of each family whose language model writes codes, and what a test must know of it.

A family's own module (``family_chameleon``, ``family_emu3`` ...) writes its folders and says what is true of them, as
a :class:`Sample`; ``test_families`` asks the same of all.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd import AutoARPipeline
from arsd.pipelines.token_images import TokenImagePipeline

PROMPTS = ["a cat", "a red apple on a table in the sun"]
CODES = 32

FAMILY_MODULES = {
    "family_chameleon": ("lumina-mgpt", "lumina-mgpt-2", "anole", "anole-meta", "chameleon"),
    "family_emu3": ("emu3", "emu3-hf", "emu3.5"),
    "family_janus": ("janus", "janus-original"),
    "family_simplear": ("simplear",),
    "family_liquid": ("liquid",),
}
KINDS = tuple(kind for kinds in FAMILY_MODULES.values() for kind in kinds)


@dataclass
class Sample(ABC):
    """A checkpoint on disk. Nothing in a subclass comes from arsd: it is what arsd is compared with.

    Args:
        kind: what it is recognised as.
        folder: where it is.
        size: (height, width) in pixels of the pictures that tests make.
        options: what ``from_pretrained`` must be told.
        sizes: more sizes, for the tests of the grammar.
        parts: what the methods need: tensors by published key and so on.
    """

    kind: str
    folder: Path
    size: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    parts: dict[str, Any] = field(default_factory=dict)

    def load(self, **options: Any) -> TokenImagePipeline:
        """The pipeline, in float64 unless told otherwise, without a progress bar."""
        options = {"dtype": torch.float64} | self.options | options
        pipe: Any = AutoARPipeline.from_pretrained(self.folder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @abstractmethod
    def logits(self, prompt: list[int], picture: list[int]) -> Tensor:
        """[N, C] float64 logits of every token of a picture (words of the model, marks included), by another forward."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """[B, 3, H, W] pictures of codes [B, h, w], nominally in [-1, 1], by another decoder."""

    @abstractmethod
    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Ids of the conditional and the unconditional stream, word by word from the published description."""

    @abstractmethod
    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        """Whether ids (words of the model) are a whole picture by upstream's rules, token by token."""


class Samples:
    """All of them, each written and loaded when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sample: Callable[[str], Sample] = cache(lambda kind: write(kind, root / kind))
        self.pipe: Callable[[str], Any] = cache(lambda kind: self.sample(kind).load())


def write(kind: str, folder: Path) -> Sample:
    """A checkpoint of this kind in ``folder``."""
    module = next(module for module, kinds in FAMILY_MODULES.items() if kind in kinds)
    sample: Sample = importlib.import_module(module).write_sample(kind, folder)
    return sample
