"""Tiny pipelines for clips (6 frames of 4 x 6 tokens, 8 x 12 pixels) with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_pipeline import CAPTION_DIM, CONDITION_TOKENS, VOCAB, text_pipeline, tiny_vq

from arsd import CosmosARPipeline, CosmosTransformer
from arsd.decoding import DecodingStrategy

FRAMES, ROWS, COLUMNS = 6, 4, 6
FRAME = ROWS * COLUMNS
CLIP = FRAMES * FRAME
SIZE = (2 * ROWS, 2 * COLUMNS)  # pixels


def tiny_transformer(captions: bool, seed: int = 0, frames: int = FRAMES) -> CosmosTransformer:
    """Two layers of width 48 whose random laws are far from uniform and depend on the context."""
    more = {"condition_tokens": CONDITION_TOKENS, "caption_dim": CAPTION_DIM} if captions else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CosmosTransformer(
            vocab_size=VOCAB,
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=96,
            frames=frames,
            rows=ROWS,
            columns=COLUMNS,
            rope_base=100.0,
            sampling={"guidance_scale": 2.0 if captions else 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            **more,
        )
        for name, p in model.named_parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=(1.5 if "embed" in name or "lm_head" in name else 1.0) / p.shape[-1] ** 0.5)
    return model.eval()


def clip_pipeline(captions: bool = True, decoder: DecodingStrategy | None = None) -> CosmosARPipeline:
    """With captions as emoji-video has them, or without as NVIDIA's models are."""
    if not captions:
        return CosmosARPipeline(tiny_transformer(False), tiny_vq(), decoder)
    text = text_pipeline()
    parts = {"tokenizer": text.tokenizer, "text_encoder": text.text_encoder}
    return CosmosARPipeline(tiny_transformer(True), tiny_vq(), decoder, **parts)


def picture(seed: int = 0) -> Image.Image:
    """Random pixels of the size of a frame."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def tokens_of(pipe: Any, *args: Any, seed: int = 5, **options: Any) -> torch.Tensor:
    """Tokens [B, N] of one call."""
    return pipe(*args, generator=torch.Generator().manual_seed(seed), output_type="latent", **options).tokens
