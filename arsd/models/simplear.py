"""SimpleAR (arXiv 2504.11455): a stock Qwen2 with the 64,000 codes of NVIDIA's Cosmos tokenizer behind its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from arsd.errors import CheckpointError
from arsd.models.appended import AppendedProtocol, is_stock
from arsd.models.folders import PublishedFiles, config_of, load_config, load_fast_tokenizer, load_network
from arsd.tokenizers.cosmos import HUB, CosmosTokenizer

BEGIN, IMAGE = "<|t2i|>", "<|soi|>"
OPENING = "A highly realistic image of "
NEGATIVE = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad eyes, "
    "bad limbs, distortion"
)
"""How upstream's script begins a caption, and the caption of its unconditional stream."""
_SLOW = ("vocab.json", "merges.txt")


class SimpleARProtocol(AppendedProtocol):
    """SimpleAR 0.5B and 1.5B. Arguments and errors are those of :class:`AppendedProtocol`.

    Upstream's sampling keeps the 64,000 most likely of words and codes together, and reads a word as code 0; here words are
    excluded, as nothing but a code can be drawn.
    """

    negative_prompt = NEGATIVE
    special = (BEGIN, IMAGE)
    published = {"guidance_scale": 6.0, "temperature": 1.0}

    def asked(self, prompt: str) -> list[int]:
        """See :class:`AppendedProtocol`: the caption with :data:`OPENING` before it, if it does not begin so."""
        return self._caption(prompt if prompt.startswith(OPENING) else OPENING + prompt)

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """See :class:`TokenProtocol`; no words at all (``""``) are what captions were replaced by in training."""
        return self._caption(NEGATIVE if negative_prompt is None else negative_prompt)

    def _caption(self, text: str) -> list[int]:
        begin, image = self.special_ids
        return [begin, *self.words(text), image]


def find_kind(folder: str | Path) -> str | None:
    """``simplear``, or ``None``; other models of Qwen2's kind do not have the special words."""
    return "simplear" if is_stock(folder, "qwen2", (BEGIN, IMAGE)) else None


def load_simplear(folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """The network of a published folder; see :func:`arsd.models.folders.load_network` for options and errors."""
    folder = Path(folder)
    config = load_config(Qwen2Config, config_of(folder), folder / "config.json")
    return load_network(Qwen2ForCausalLM, folder, config, dtype=dtype, **options)


def load_tokenizer(folder: str | Path) -> Any:
    """The text tokenizer of a published folder: ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file() or not all((folder / name).is_file() for name in _SLOW):
        return load_fast_tokenizer(folder)
    try:
        return Qwen2Tokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(
            f"{folder / _SLOW[0]} and {_SLOW[1]} are no readable tokenizer: download them again"
        ) from error


def vq_source(folder: str | Path) -> Path:
    """The folder ``Cosmos-1.0-Tokenizer-DV8x16x16`` beside this one; what lies in it is not run without being asked for.

    Raises:
        CheckpointError: when there is none; the message says what to fetch.
    """
    found = Path(folder).absolute().parent / Path(HUB).name
    if (found / "decoder.jit").is_file():
        return found
    raise CheckpointError(f"{folder} comes without an image tokenizer: give vq=..., the folder of {HUB}")


SIMPLEAR = PublishedFiles(
    kinds=("simplear",),
    find_kind=find_kind,
    network=load_simplear,
    tokenizer=load_tokenizer,
    vq_source=vq_source,
    vq=CosmosTokenizer.from_pretrained,
    vq_class=CosmosTokenizer,
)
