"""Rotary position tables that replace the rotary module of a stock transformers decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grid_rotary_angles(grid: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Angles [grid * grid, head_dim / 2] of LlamaGen's 2-D rotary embedding, in raster order.

    With p = head_dim / 2 pairs and f_k = base^(-2k/p), the token at (row, column) has the angles
    [row * f_0 ... row * f_(p/2-1), column * f_0 ... column * f_(p/2-1)].
    """
    pairs = head_dim // 2
    frequencies = base ** (-2.0 * torch.arange(pairs // 2, dtype=torch.float64) / pairs)
    steps = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    rows = steps[:, None, :].expand(grid, grid, -1)
    columns = steps[None, :, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, pairs)


class GridRotaryTable(nn.Module):
    """Looks cos and sin up by absolute position: ``prefix`` condition slots, then the image in raster order.

    Condition slots have cos = sin = 0, so their queries and keys become zero vectors: every token reads their plain
    mean. Upstream LlamaGen does so and its weights were trained with it. With ``condition_keys`` they have the angle 0
    (cos = 1), and a token can choose what it reads of the condition by what it holds and where it stands.

    Args:
        prefix: number of condition slots.
        grid: tokens along one side of the image.
        head_dim: dimension of an attention head, a multiple of 4.
        base: rotary base.
        condition_keys: whether condition slots keep their queries and keys.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, prefix: int, grid: int, head_dim: int, base: float = 10000.0, condition_keys: bool = False) -> None:
        super().__init__()
        self.prefix, self.grid, self.head_dim, self.base, self.condition_keys = prefix, grid, head_dim, base, condition_keys
        angles = grid_rotary_angles(grid, head_dim, base)
        zeros = torch.zeros(prefix, head_dim)
        for name, table, first in (("cos", angles.cos(), zeros + condition_keys), ("sin", angles.sin(), zeros)):
            doubled = torch.cat([table, table], dim=-1)  # transformers pairs channel j with j + head_dim / 2
            self.register_buffer(name, torch.cat([first.double(), doubled]).float(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, T, head_dim] in the dtype of ``x``; positions past the end read the last row (junk slots)."""
        index = position_ids.clamp_max(len(self.cos) - 1)
        return self.cos[index].to(x.dtype), self.sin[index].to(x.dtype)
