"""emoji-video as it is shipped: in eight bits, and without the text encoder, which is that of emoji-128."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from arsd.errors import DataError
from arsd.pipelines.cosmos import CosmosARPipeline
from arsd.training.target import tidy

CAPTIONS = "emoji-128"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pack_float8(path: Path, largest: int = 8192) -> None:
    """Store the matrices of a safetensors file in float8 (e4m3, 3 bits of mantissa); small tensors in bfloat16.

    Such a file is read like any other, into the dtype that is asked for. Rounding loses 1 part in 16 at most, and 1/1024
    near zero.

    Args:
        path: of the file, which is replaced.
        largest: tensors of at most so many values stay in bfloat16 (norms, biases, the codebook).

    Raises:
        DataError: for values that float8 does not reach.
    """
    tensors = load_file(path)
    packed = {}
    for name, value in tensors.items():
        small = value.numel() <= largest or value.ndim < 2
        if not small and float(value.abs().max()) > float(torch.finfo(torch.float8_e4m3fn).max):
            raise DataError(f"{name} holds values that float8 does not reach")
        packed[name] = value.to(torch.bfloat16 if small else torch.float8_e4m3fn).contiguous()
    save_file(packed, path, metadata={"format": "pt"})


def ship_video(pipe: CosmosARPipeline, folder: Path) -> None:
    """Save a pipeline for distribution; its prompts will be read by the text encoder of emoji-128."""
    CosmosARPipeline(pipe.transformer, pipe.vq, pipe.decoder, captions=CAPTIONS).save_pretrained(folder)
    for part in ("transformer", "vq"):
        pack_float8(Path(folder) / part / WEIGHTS)
    tidy(folder)
