"""Models that the benchmarks run on: the shipped one, and random weights of published sizes.

What a pass costs does not depend on what the weights know, so the larger sizes are timed with random ones. Those say nothing
about tokens per pass, which depend on what a model has learnt.
"""

from __future__ import annotations

from typing import Any

import torch

import arsd
from arsd.cli.common import quiet
from arsd.tokenizers.vq import VQTokenizer

Size = dict[str, int]

SMALL: Size = {
    "vocab_size": 1024,
    "hidden_size": 384,
    "num_layers": 6,
    "num_heads": 6,
    "intermediate_size": 1024,
    "grid": 16,
}
XL: Size = {
    "vocab_size": 16384,
    "hidden_size": 1280,
    "num_layers": 36,
    "num_heads": 20,
    "intermediate_size": 3456,
    "grid": 24,
}
LARGE: Size = {
    "vocab_size": 16384,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "intermediate_size": 11008,
    "grid": 24,
}
RANDOM = {"small": SMALL, "775m": XL, "7b": LARGE}  # emoji-128's size, LlamaGen XL, a Llama of 7B size


def make_model(size: Size, device: str | torch.device, dtype: torch.dtype) -> arsd.LlamaGenTransformer:
    """A class-conditional LlamaGen (10 classes) with random weights, made on the device in its dtype."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = arsd.LlamaGenTransformer(**size, condition="class", num_classes=10).eval()
            model.lm.lm_head.weight.data.mul_(8)  # peaked laws, as a trained model has
            return model
    finally:
        torch.set_default_dtype(previous)


def make_drafter(model: arsd.LlamaGenTransformer) -> arsd.EagleDrafter:
    """An EAGLE drafter of the model's size, with random weights."""
    torch.manual_seed(1)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device(model.device):
            return arsd.EagleDrafter.for_transformer(model.lm).eval()
    finally:
        torch.set_default_dtype(previous)


def load(model: str, device: str | torch.device, dtype: torch.dtype, grid: int | None = None) -> Any:
    """A pipeline: random weights and drafter for a name in :data:`RANDOM`, else what ``AutoARPipeline`` finds under it.

    Args:
        model: a name.
        device: where it runs.
        dtype: of the weights.
        grid: tokens along one side, for random weights; ``None`` is the size's own.
    """
    if model in RANDOM:
        size = RANDOM[model] if grid is None else {**RANDOM[model], "grid": grid}
        vq = VQTokenizer(size["vocab_size"], 8, 32, 32, [1, 1], 1, 8)  # no pixels are drawn: any tokenizer will do
        with quiet():
            transformer = make_model(size, device, dtype)
            drafter = make_drafter(transformer)
            pipe = arsd.LlamaGenPipeline(transformer, vq.eval().to(device, dtype), drafter=drafter)
    else:
        with quiet():
            pipe = arsd.AutoARPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
