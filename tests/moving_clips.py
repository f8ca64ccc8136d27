"""Small clips, the files they are kept in, and a network with the calling convention of the I3D of FVD."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def noise(count=1, frames=6, height=10, width=12, seed=0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, frames, height, width, 3), dtype=np.uint8))


def moving(seed: int, frames: int = 10, side: int = 24) -> np.ndarray:
    """A coloured square that wanders over a coloured ground, a step of its own at a time, and fades."""
    rng = np.random.default_rng(seed)
    clip = np.empty((frames, side, side, 3), dtype=np.uint8)
    clip[:], colour, step = rng.integers(0, 256, 3), rng.integers(0, 256, 3), rng.integers(1, 4, 2)
    for t in range(frames):
        y, x = (rng.integers(0, 2) + t * step) % (side - 8)
        clip[t, y : y + 8, x : x + 8] = colour * (1 - t / 16)
    return clip


def shuffled(clip: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(clip[np.random.default_rng(len(clip)).permutation(len(clip))])


def save(clip: np.ndarray, path: Path, duration: int = 50) -> None:
    first, *rest = map(Image.fromarray, clip)
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, format={".apng": "PNG"}.get(path.suffix), save_all=True, append_images=rest, duration=duration, **how)


def save_frames(clip: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{i}.png")  # in the order of numbers: 10 comes after 9


class Stub(torch.nn.Module):
    """The calling convention of the I3D of FVD, and features that show what it was given."""

    def __init__(self, features: int = 400) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(6, features, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert x.dtype == torch.float32
        if rescale:
            x = x / 255 * 2 - 1
        if resize:
            x = x[:, :, :, : x.shape[3] // 2]
        half = torch.cat([x[:, :, :4].mean([2, 3, 4]), x[:, :, 4:].mean([2, 3, 4])], dim=1) @ self.weight
        return half if return_features else half.softmax(-1)


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def script(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(module).save(str(path))
    return path
