"""A tiny image tokenizer as TorchScript with the signatures of NVIDIA's DV files, and the same in plain tensor functions.

As in NVIDIA's network, the encoder gives ``(ids [B, t, h, w] int32, codes [B, c, t, h, w], loss)``, the decoder takes ids. A
code is c numbers; digit i of an id counts in steps of ``prod(levels[:i])``, and stands for ``(digit - l // 2) / (l // 2)``.
In time, the first frame has ids of its own, and then each group of 8 frames: here those of the frames' mean, and on the way
back the k-th frame of a group has k / 8 of its contrast.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from published_files import State, write_json
from torch import Tensor, nn

LEVELS, SIDE, STEP = (4, 2, 4), 16, 8


class Quantizer(nn.Module):
    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("basis", torch.tensor((1, *levels[:-1]), dtype=torch.int32).cumprod(0), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[..., c] to ids [...] and codes [..., c]."""
        half = self.levels // 2
        digits = (torch.sigmoid(z) * self.levels).floor().clamp_min(0).minimum(self.levels - 1)
        return (digits.float() * self.basis).sum(-1).to(torch.int32), (digits - half) / half


class Encoder(nn.Module):
    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.quantizer = nn.Conv3d(3, len(levels), (1, SIDE, SIDE), (1, SIDE, SIDE)), Quantizer(levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, c, t, h, w = x.shape
        means = x[:, :, 1:].reshape(b, c, (t - 1) // 8, 8, h, w).mean(3)
        ids, codes = self.quantizer(self.conv(torch.cat([x[:, :, :1], means], 2)).permute(0, 2, 3, 4, 1))
        return ids, codes.permute(0, 4, 1, 2, 3).to(x.dtype), x.new_zeros(1)


class Decoder(nn.Module):
    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(len(levels), 3, (1, SIDE, SIDE), (1, SIDE, SIDE))
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("basis", torch.tensor((1, *levels[:-1]), dtype=torch.int32).cumprod(0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        half = self.levels // 2
        codes = ((ids[..., None] // self.basis) % self.levels - half) / half
        x = self.conv(codes.permute(0, 4, 1, 2, 3).to(self.conv.weight.dtype))
        share = torch.arange(1, 9, device=x.device, dtype=x.dtype)[:, None, None] / 8
        return torch.tanh(torch.cat([x[:, :, :1], (x[:, :, 1:, None] * share).flatten(2, 3)], 2))


def write_cosmos(
    folder: Path, levels: tuple[int, ...] = LEVELS, dtype: torch.dtype = torch.float32, seed: int = 0, config: bool = True
) -> State:
    """``encoder.jit`` and ``decoder.jit``; returns the weights by name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, module in (("encoder", Encoder(levels)), ("decoder", Decoder(levels))):
        with torch.no_grad():
            for key, value in module.named_parameters():
                std = 0.3 if name == "decoder" else 5 / value[0].numel() ** 0.5
                value.copy_(torch.randn(value.shape, generator=generator) * std)
                state[f"{name}.{key}"] = value.detach().to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(module.to(dtype).eval()), folder / f"{name}.jit")
    if config:
        write_json(folder / "config.json", {"architectures": ["CosmosTokenizer"], "levels": list(levels)})
    return state


def code_of(number: int, levels: tuple[int, ...] = LEVELS) -> list[float]:
    """The code of an id, digit by digit."""
    found = []
    for level in levels:
        number, digit = divmod(number, level)
        found.append((digit - level // 2) / (level // 2))
    return found


def decode(state: State, ids: Tensor, levels: tuple[int, ...] = LEVELS) -> Tensor:
    """[B, 3, H, W] pictures of ids [B, h, w], patch by patch, in double precision."""
    return torch.tanh(_contrast(state, ids, levels))


def decode_video(state: State, ids: Tensor, levels: tuple[int, ...] = LEVELS) -> Tensor:
    """[B, 3, T, H, W] videos of ids [B, t, h, w], frame by frame."""
    groups = [_contrast(state, ids[:, i], levels) for i in range(ids.shape[1])]
    frames = [groups[0], *(group * k / STEP for group in groups[1:] for k in range(1, STEP + 1))]
    return torch.tanh(torch.stack(frames, 2))


def _contrast(state: State, ids: Tensor, levels: tuple[int, ...]) -> Tensor:
    weight, bias = state["decoder.conv.weight"].double(), state["decoder.conv.bias"].double()
    table = torch.tensor([code_of(n, levels) for n in range(int(ids.max()) + 1)], dtype=torch.float64)
    patches = torch.einsum("bhwc,cdij->bdhiwj", table[ids], weight[:, :, 0])
    return patches.flatten(4, 5).flatten(2, 3) + bias[:, None, None]


def encode_video(state: State, frames: Tensor, levels: tuple[int, ...] = LEVELS) -> Tensor:
    """Ids [B, t, h, w] of videos [B, 3, T, H, W]."""
    groups = [frames[:, :, 0], *(group.double().mean(2) for group in frames[:, :, 1:].split(STEP, dim=2) if group.numel())]
    return torch.stack([encode(state, group, levels) for group in groups], 1)


def encode(state: State, images: Tensor, levels: tuple[int, ...] = LEVELS) -> Tensor:
    """Ids [B, h, w] of pictures [B, 3, H, W]."""
    weight, bias = state["encoder.conv.weight"].double(), state["encoder.conv.bias"].double()
    patches = images.double().unflatten(2, (-1, SIDE)).unflatten(4, (-1, SIDE))
    z = torch.einsum("bdhiwj,cdij->bhwc", patches, weight[:, :, 0]) + bias
    ids, step = torch.zeros(z.shape[:3], dtype=torch.int64), 1
    for i, level in enumerate(levels):
        ids += step * (torch.sigmoid(z[..., i]) * level).floor().long().clamp(0, level - 1)
        step *= level
    return ids
