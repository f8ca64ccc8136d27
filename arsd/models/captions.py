"""Captions to condition slots: LlamaGen's text recipe, shared by the pipeline and by training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
