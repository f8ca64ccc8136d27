"""What every image tokenizer checks of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from arsd.errors import InputError


def check_pictures(images: Tensor, factor: int) -> None:
    """Raise InputError unless these are pictures [B, 3, H, W] with sides in multiples of ``factor``."""
    sides_fit = images.ndim == 4 and images.numel() and not (images.shape[2] % factor or images.shape[3] % factor)
    if not sides_fit or images.shape[1] != 3:
        raise InputError(f"pictures must be [B, 3, H, W] with sides in multiples of {factor}, not {tuple(images.shape)}")


def check_ids(ids: Tensor, codes: int) -> None:
    """Raise InputError unless these are a grid [B, h, w] of ids below ``codes``."""
    is_grid = ids.ndim == 3 and ids.numel() and ids.dtype in (torch.int32, torch.int64)
    if not is_grid or int(ids.min()) < 0 or int(ids.max()) >= codes:
        raise InputError(f"ids must be a [B, h, w] grid of whole numbers from 0 to {codes - 1}")
