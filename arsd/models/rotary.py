"""Rotary position tables that replace the rotary module of a stock transformers decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arsd.errors import InputError


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


def volume_rotary_angles(
    frames: int,
    rows: int,
    columns: int,
    head_dim: int,
    base: float = 500000.0,
    yarn_scale: float | None = None,
    yarn_betas: tuple[float, float] = (4.0, 1.0),
    yarn_lengths: tuple[int, int] = (3, 40),
) -> Tensor:
    """Angles [frames * rows * columns, head_dim / 2] of Cosmos' 3-D rotary embedding, in the order (t, y, x).

    Of d = head_dim channels, 2 (d // 6) belong to each of y and x, and the rest to t. An axis of d' channels has the
    frequencies f_k = base^(-2k / d'), k < d' // 2, and the token at (t, y, x) the angles [t f_t, y f_s, x f_s].

    Args:
        frames: latent frames.
        rows: of codes.
        columns: codes per row.
        head_dim: d, an even number of at least 6.
        base: rotary base.
        yarn_scale: stretches the low frequencies (YaRN, arXiv 2309.00071): f becomes f ((1 - m) / scale + m), where m goes
            from 0 at ``beta_slow`` turns within the original length to 1 at ``beta_fast``. ``None`` leaves them alone.
        yarn_betas: (beta_fast, beta_slow).
        yarn_lengths: original lengths of t and of y; that of y serves for x as well, as in NVIDIA's code.

    Raises:
        InputError: for a head that cannot be divided among the axes.
    """
    if head_dim < 6 or head_dim % 2:
        raise InputError(f"a head of {head_dim} channels cannot be divided among three axes: it needs an even number from 6")
    space = 2 * (head_dim // 6)

    def frequencies(channels: int, length: int) -> Tensor:
        found = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        if yarn_scale is None:
            return found
        high, low = (2 * torch.pi * beta / length for beta in yarn_betas)
        kept = ((found - low) / (high - low)).clamp(0, 1)
        return found * ((1 - kept) / yarn_scale + kept)

    of_time, of_space = frequencies(head_dim - 2 * space, yarn_lengths[0]), frequencies(space, yarn_lengths[1])
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, rows, columns)), indexing="ij")
    angles = [t[..., None] * of_time, y[..., None] * of_space, x[..., None] * of_space]
    return torch.cat(angles, dim=-1).reshape(frames * rows * columns, head_dim // 2)


class VolumeRotaryTable(nn.Module):
    """Looks cos and sin up by absolute position: ``prefix`` condition slots at angle 0, then a clip in raster order.

    Args:
        prefix: number of condition slots.
        angles: [N, head_dim / 2] see :func:`volume_rotary_angles`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, prefix: int, angles: Tensor) -> None:
        super().__init__()
        angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])
        doubled = torch.cat([angles, angles], dim=-1)  # transformers pairs channel j with j + head_dim / 2
        self.register_buffer("cos", doubled.cos().float(), persistent=False)
        self.register_buffer("sin", doubled.sin().float(), persistent=False)

    forward = GridRotaryTable.forward
