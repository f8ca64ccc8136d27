"""Captions to condition slots: LlamaGen's text recipe, shared by the pipeline and by training."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from arsd.errors import InputError


def clean_caption(text: str) -> str:
    """The caption that LlamaGen's text encoder reads: two passes of the cleaner of DeepFloyd IF and PixArt.

    Turns to lower case, strips addresses, markup, nicknames, ideographs, article numbers, file names and shop talk, and
    makes quotes and dashes plain. The result may be empty. Source: ``language/t5.py`` of LlamaGen.

    Raises:
        InputError: when a package that this needs is not installed.
    """
    if missing := [name for name in ("bs4", "ftfy") if find_spec(name) is None]:
        raise InputError(f"cleaning captions needs {' and '.join(missing)}: pip install 'arsd[captions]'")
    from bs4 import MarkupResemblesLocatorWarning

    clean = _cleaner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption may well look like a path or a URL
        return clean(clean(text))


@cache
def _cleaner() -> Callable[[str], str]:
    """One pass: the function that pipelines of diffusers have, with the strip() after ``html.unescape`` that they lack."""
    from diffusers import PixArtAlphaPipeline

    theirs: Any = PixArtAlphaPipeline._clean_caption
    stripping = SimpleNamespace(unescape=lambda text: html.unescape(text).strip())
    ours = FunctionType(theirs.__code__, {**theirs.__globals__, "html": stripping})
    return lambda text: ours(PixArtAlphaPipeline, text)


def left_align(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn right padding into left padding: each row's valid features come last, the others are zero.

    Args:
        features: [B, T, C].
        mask: [B, T], 1 at valid tokens, which come first.

    Returns:
        features and mask of the same shapes.
    """
    length = mask.shape[1]
    valid = mask.long().sum(1, keepdim=True)
    source = (torch.arange(length, device=mask.device)[None] + valid) % length
    rolled = features.gather(1, source[..., None].expand_as(features))
    kept = mask.gather(1, source)
    return rolled * kept[..., None].to(features.dtype), kept


def tokenize_captions(
    tokenizer: Any, captions: Sequence[str], length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, length], padded on the right and cut at ``length``."""
    batch = tokenizer(
        list(captions),
        max_length=length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def encode_captions(tokenizer: Any, text_encoder: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Left-padded caption features [B, length, C] of a T5 encoder, and their mask [B, length]."""
    ids, mask = tokenize_captions(tokenizer, captions, length, text_encoder.device)
    features = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return left_align(features, mask)


def unknown_words(tokenizer: Any, caption: str) -> list[str]:
    """The words of a caption that a word-level tokenizer does not know (none for tokenizers without an unknown token)."""
    unknown = tokenizer.unk_token_id
    if unknown is None or not getattr(tokenizer, "is_fast", False):
        return []
    batch = tokenizer(caption, return_offsets_mapping=True, add_special_tokens=False)
    pairs = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    return [caption[start:stop] for token, (start, stop) in pairs if token == unknown]
