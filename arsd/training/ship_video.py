"""emoji-video as it is shipped: small, and with the parts that it shares with emoji-128 linked instead of copied."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pack_float8(path: Path, largest: int = 4096) -> None:
    """Store the matrices of a safetensors file in float8 (e4m3, 3 bits of mantissa); small tensors in bfloat16.

    Such a file is read like any other, into the dtype that is asked for. Rounding is the loss of 1 part in 16 at most, and of
    1/512 near zero.

    Args:
        path: of the file, which is replaced.
        largest: tensors of at most so many values stay in bfloat16.
    """
    tensors = load_file(path)
    packed = {}
    for name, value in tensors.items():
        small = value.numel() <= largest or value.ndim < 2
        if not small and float(value.abs().max()) > float(torch.finfo(torch.float8_e4m3fn).max):
            raise ValueError(f"{name} holds values that float8 does not reach")
        packed[name] = value.to(torch.bfloat16 if small else torch.float8_e4m3fn).contiguous()
    save_file(packed, path, metadata={"format": "pt"})
