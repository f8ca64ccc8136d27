"""Tiny pipelines with random weights (4 x 4 tokens, 8 x 8 pixels) for the tests of everything around the decoding loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from arsd.decoding import DecodingStrategy
from arsd.models.llamagen import LlamaGenTransformer
from arsd.pipelines.llamagen import LlamaGenPipeline
from arsd.tokenizers.vq import VQTokenizer
from arsd.training.target import build_tokenizer

GRID, TOKENS, SIDE = 4, 16, 8
VOCAB = 32
CLASSES = 5
CONDITION_TOKENS, CAPTION_DIM = 6, 32
CAPTIONS = [["red apple"], ["green pear", "a pear"], ["dog face"], ["blue heart"]]


def tiny_transformer(condition: str, seed: int = 0, grid: int = GRID) -> LlamaGenTransformer:
    """Two layers of width 64 whose random laws are far from uniform and depend on the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaGenTransformer(
            vocab_size=VOCAB,
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            intermediate_size=128,
            grid=grid,
            condition=condition,
            condition_tokens=1 if condition == "class" else CONDITION_TOKENS,
            caption_dim=CAPTION_DIM,
            num_classes=CLASSES,
            sampling={"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        )
        for name, p in model.named_parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=(1.5 if "lm_head" in name else 1.0) / p.shape[-1] ** 0.5)
    return model.eval()


def tiny_vq(seed: int = 0) -> VQTokenizer:
    """A tokenizer that halves each side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq = VQTokenizer(
            codebook_size=VOCAB,
            codebook_dim=8,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            norm_groups=8,
        )
    return vq.eval()


def class_pipeline(decoder: DecodingStrategy | None = None) -> LlamaGenPipeline:
    """A class-conditional pipeline (classes 0..4)."""
    return LlamaGenPipeline(transformer=tiny_transformer("class"), vq=tiny_vq(), decoder=decoder)


def text_pipeline(decoder: DecodingStrategy | None = None) -> LlamaGenPipeline:
    """A text-conditional pipeline that knows the words of ``CAPTIONS``."""
    tokenizer = build_tokenizer(CAPTIONS, rows=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=CAPTION_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0
        )
        text_encoder = T5EncoderModel(config).eval()
    transformer = tiny_transformer("text")
    return LlamaGenPipeline(transformer, tiny_vq(), decoder, tokenizer=tokenizer, text_encoder=text_encoder)


def saved(pipe: LlamaGenPipeline, folder: Path) -> Path:
    """Save a pipeline, quietly."""
    pipe.save_pretrained(folder)
    return folder


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def hushed(pipe: LlamaGenPipeline) -> LlamaGenPipeline:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def codes(pipe: LlamaGenPipeline, *args: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    """Tokens [B, N] of one call."""
    return pipe(*args, generator=seeded(seed), output_type="latent", **options).tokens


def one_clear_line(message: object, says: str) -> None:
    """Check the text of an error: it names the mistake, in one line that can be read."""
    assert says in str(message) and "\n" not in str(message) and len(str(message)) < 400, message
