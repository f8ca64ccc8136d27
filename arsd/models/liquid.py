"""Liquid (arXiv 2412.04332): a stock Gemma with the 8,192 codes of Chameleon's image tokenizer behind its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GemmaConfig, GemmaForCausalLM

from arsd.errors import CheckpointError
from arsd.models.appended import AppendedProtocol, is_stock
from arsd.models.folders import PublishedFiles, config_of, first_file, load_config, load_fast_tokenizer, load_network
from arsd.models.vqgan_files import load_vqgan
from arsd.tokenizers.vqgan import VQGANTokenizer

FIRST, IMAGE, UNCONDITIONAL = "<bos>", "<boi>", "<unconditional>"
REQUEST = " Generate an image based on this description."
"""What upstream's scripts append to every prompt."""
_VQ = ("vqgan.ckpt", "chameleon/vqgan.ckpt", "tokenizer/vqgan.ckpt")
_VQ_FROM = "vqgan.ckpt (of Meta's Chameleon, or chameleon/vqgan.ckpt of huggingface.co/spaces/Junfeng5/Liquid_demo)"


class LiquidProtocol(AppendedProtocol):
    """Liquid 7B. Arguments and errors are those of :class:`AppendedProtocol`."""

    special = (FIRST, UNCONDITIONAL, IMAGE)
    published = {"guidance_scale": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}

    def asked(self, prompt: str) -> list[int]:
        """See :class:`AppendedProtocol`: :data:`REQUEST` is appended where the prompt does not end so."""
        text = prompt if prompt.endswith(REQUEST) else prompt + REQUEST
        return [self.special_ids[0], *self.words(text), self.special_ids[-1]]

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """See :class:`TokenProtocol`."""
        return list(self.special_ids)


def find_kind(folder: str | Path) -> str | None:
    """``liquid``, or ``None``; other models of Gemma's kind do not have the special words."""
    return "liquid" if is_stock(folder, "gemma", (IMAGE, UNCONDITIONAL)) else None


def load_liquid(folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """The network of a published folder; see :func:`arsd.models.folders.load_network` for options and errors.

    Its configuration says ``"hidden_act": "gelu"``, as Gemma's first ones did, and no ``hidden_activation``; what it was
    trained with is the tanh approximation, which not every version of transformers makes of that.
    """
    folder = Path(folder)
    content = config_of(folder)
    content |= {"hidden_act": content.get("hidden_activation") or "gelu_pytorch_tanh"}
    config = load_config(GemmaConfig, content, folder / "config.json")
    return load_network(GemmaForCausalLM, folder, config, dtype=dtype, **options)


def vq_source(folder: str | Path) -> Path:
    """Where the image tokenizer is: ``vqgan.ckpt`` in the folder or ``chameleon/vqgan.ckpt`` in or beside it.

    Raises:
        CheckpointError: when there is none; the message says which file to fetch.
    """
    folder = Path(folder).absolute()
    if (found := first_file([folder, folder.parent], _VQ)) is not None:
        return found
    raise CheckpointError(f"{folder} holds no image tokenizer: put {_VQ_FROM} into it, or give its path as vq=...")


LIQUID = PublishedFiles(
    kinds=("liquid",),
    find_kind=find_kind,
    network=load_liquid,
    tokenizer=load_fast_tokenizer,
    vq_source=vq_source,
    vq=load_vqgan,
    vq_class=VQGANTokenizer,
)
