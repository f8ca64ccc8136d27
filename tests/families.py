"""One tiny published checkpoint of each family whose codes are words, and what a test must know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import published_chameleon as published
import reference_chameleon
import reference_vqgan
import torch
from torch import Tensor

from arsd import AutoARPipeline
from arsd.pipelines.token_images import TokenImagePipeline

F16 = {"ch": 32, "mult": (1, 1, 1, 1, 1), "blocks": 1, "z": 16, "dim": 8, "codes": published.CODES}
F8 = {"ch": 32, "mult": (1, 1, 1, 1), "blocks": 1, "codes": published.CODES}
PROMPTS = ["a cat", "a red apple on a table in the sun"]


@dataclass
class Sample:
    """A checkpoint on disk.

    Args:
        kind: what it is recognised as.
        folder: where it is.
        state: its network, by published key.
        vq: its image tokenizer, by published key.
        size: (height, width) in pixels of the pictures that tests make.
        options: what ``from_pretrained`` must be told.
    """

    kind: str
    folder: Path
    state: dict[str, Tensor]
    vq: dict[str, Tensor]
    size: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, **options: Any) -> TokenImagePipeline:
        """The pipeline, in float64 unless told otherwise, without a progress bar."""
        options = {"dtype": torch.float64} | self.options | options
        pipe: Any = AutoARPipeline.from_pretrained(self.folder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def logits(self, ids: Tensor) -> Tensor:
        """[B, N, V] of the independent forward, float64."""
        return reference_chameleon.logits({key: value.double() for key, value in self.state.items()}, ids)


def write(kind: str, folder: Path) -> Sample:
    """A checkpoint of this kind in ``folder``."""
    vq = reference_vqgan.movq_state(**F8) if kind == "lumina-mgpt-2" else reference_vqgan.vqgan_state(**F16)
    writers: dict[str, Any] = {
        "lumina-mgpt": published.write_lumina,
        "lumina-mgpt-2": lambda path, vq_state: published.write_lumina2(path, vq_state=vq_state),
        "anole": published.write_anole,
        "anole-meta": published.write_anole_meta,
        "chameleon": published.write_chameleon,
    }
    state = writers[kind](folder, vq_state=vq)
    if kind == "anole":  # lies among the network's weights, in their dtype
        vq = {key: value.bfloat16() for key, value in vq.items()}
    options: dict[str, Any] = {} if kind.startswith("lumina") else {"image_size": 64}
    if kind == "chameleon":
        torch.save({"state_dict": vq}, folder / "vqgan.ckpt")
    return Sample(kind, folder, state, vq, (64, 96) if kind.startswith("lumina") else (64, 64), options)


CODES_OF_STATE = published.CODES
KINDS = ("lumina-mgpt", "lumina-mgpt-2", "anole", "anole-meta", "chameleon")


class Samples:
    """All of them, each written and loaded when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sample = cache(lambda kind: write(kind, root / kind))
        self.pipe = cache(lambda kind: self.sample(kind).load())


def legal(kind: str, ids: list[int], words: dict[str, int], codes: int, first_code: int, size: tuple[int, int]) -> bool:
    """Whether ids are a whole picture by upstream's rules; written from their description, token by token."""
    end, line = words["<eoss>"], words.get("<reserved08799>")
    factor = 8 if kind == "lumina-mgpt-2" else 16
    rows, columns = size[0] // factor, size[1] // factor

    def is_code(number: int) -> bool:
        return first_code <= number < first_code + codes

    if kind.startswith("lumina"):
        for k, number in enumerate(ids):  # k tokens behind the size words so far
            if k + 1 == rows * (columns + 1) + 1:
                right = number == end
            elif (k + 1) % (columns + 1) == 0:
                right = number == line
            else:
                right = is_code(number)
            if not right:
                return False
        return len(ids) == rows * (columns + 1) + 1
    return len(ids) == rows * columns + 1 and all(is_code(number) for number in ids[:-1]) and ids[-1] == end
