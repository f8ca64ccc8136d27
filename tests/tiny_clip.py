"""A tiny CLIP with random weights, and an extractor without a network, for the tests of what is built on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast


def saved_clip(folder: Path, words: Sequence[str] = (), seed: int = 0, dim: int = 8) -> Path:
    """Write a CLIPModel of ``dim`` features with a word-level tokenizer and a 32-pixel image processor."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=12, **names).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    text = {**size, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = {**size, "image_size": 32, "patch_size": 16}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))
    model.eval().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


class Colours:
    """Mean and spread of each channel as features; a score that is the mean brightness."""

    name, dim = "colours", 6

    def describe(self) -> dict[str, Any]:
        """For the card."""
        return {"name": self.name, "dim": self.dim, "weights_sha256": None}

    def features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """[B, 6]."""
        stack = [np.concatenate([p.mean((0, 1)), p.std((0, 1))]) for p in pictures]
        return torch.tensor(np.stack(stack) / 255, dtype=torch.float32)

    def score(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], prefix: str | None = None) -> torch.Tensor:
        """[B]."""
        return self.features(pictures)[:, :3].mean(1) * 100
