"""Clips to tokens for emoji-video: few frames on white, each a grid of codes that stay while nothing moves.

A code is chosen by distance and by what it costs to say (entropy-constrained quantisation, as the pictures of emoji-128):
the code that stood at the same place one frame earlier is cheap, as the skipped blocks of a video codec are. Without this,
the encoder's group norms carry every movement to the whole frame, and half of the still places flicker among codes that look
alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from arsd.provenance import weights_hash
from arsd.tokenizers.vq import VQTokenizer
from arsd.training.clips import FRAMES, ClipData
from arsd.training.vq import fit

CLIP_FRAMES, SIDE = 8, 96
VIDEO_VQ: dict[str, Any] = {
    "codebook_size": 1024,
    "codebook_dim": 8,
    "latent_channels": 64,
    "base_channels": 32,
    "channel_multiplier": [2, 2],
    "num_res_blocks": 1,
    "norm_groups": 16,
    "patch_size": 4,
}
RATE = 0.02  # squared distance between unit vectors that is worth a nat
STAY = 0.7  # probability that a place keeps its code, as the price list has it


def clip_pixels(clip: np.ndarray, frames: int = CLIP_FRAMES, side: int = SIDE) -> Tensor:
    """A clip [n, h, w, 4] uint8 as ``frames`` evenly spaced frames on white, [T, 3, side, side] in [-1, 1].

    The frames are those of a loop: the one that would follow the last is the first.
    """
    chosen = clip[np.arange(frames) * len(clip) // frames].astype(np.float32) / 255
    opaque = torch.from_numpy(chosen[..., :3] * chosen[..., 3:] + 1 - chosen[..., 3:]).permute(0, 3, 1, 2)
    if opaque.shape[-1] != side:
        opaque = F.interpolate(opaque, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return opaque * 2 - 1


def quantise_clips(latents: Tensor, codebook: Tensor, counts: Tensor, begin: Tensor | None = None) -> Tensor:
    """Codes [N, T, P] of unit vectors ``latents`` [N, T, P, C], frame after frame.

    The code c at place p of frame t is the one with the least |z - c|^2 - RATE * log q(c), where q is STAY for the code of
    the frame before (and the rest of it by frequency for the others), and in the first frame goes by frequency alone.

    Args:
        latents: of the clips.
        codebook: unit vectors [K, C].
        counts: [K] how often each code is used.
        begin: [N, P] codes of the first frames, where they are known.
    """
    prices = -RATE * ((counts + 0.05) / (counts + 0.05).sum()).log()
    leave, stay = -RATE * math.log(1 - STAY), -RATE * math.log(STAY)
    found = torch.empty(latents.shape[:3], dtype=torch.int64)
    for t in range(latents.shape[1]):
        if t == 0 and begin is not None:
            found[:, 0] = begin
            continue
        near = -2 * latents[:, t] @ codebook.T
        costs = near + prices
        if t:
            before = found[:, t - 1, :, None]
            costs = (costs + leave).scatter_(-1, before, near.gather(-1, before) + stay)
        found[:, t] = costs.argmin(-1)
    return found


def train_video_vq(clips_dir: Path, out: Path, minutes: float = 30, batch: int = 16, seed: int = 0) -> VQTokenizer:
    """Train (or go on training) the frame tokenizer of emoji-video; see :func:`arsd.training.vq.fit`.

    Args:
        clips_dir: folder made by ``arsd train clips``.
        out: run folder; an existing ``checkpoint.pt`` in it is resumed.
        minutes: whole time budget, over all resumed runs.
        batch: frames per step.
        seed: seed of weights and batches.
    """
    data = ClipData.load(clips_dir)
    weights = torch.from_numpy(data.weights)

    def frames(clips: Tensor, moments: Tensor) -> Tensor:
        chosen = data.frames[clips.numpy(), moments.numpy()]
        return torch.cat([clip_pixels(frame[None], 1) for frame in chosen])

    def draw(generator: torch.Generator) -> Tensor:
        pick = torch.multinomial(weights, batch, replacement=True, generator=generator)
        return frames(pick, torch.randint(FRAMES, (batch,), generator=generator))

    held_out = torch.from_numpy(data.indices(True))
    return fit(VIDEO_VQ, draw, frames(held_out, 7 * torch.arange(len(held_out)) % FRAMES), out, minutes, seed=seed)


@dataclass
class ClipTokens:
    """Tokens of all clips of a data set.

    Args:
        tokens: [N, T, P] the codes, as above.
        plain: [N, T, P] the same behind a first frame as the tokenizer encodes it, which is how a given picture begins.
    """

    tokens: Tensor
    plain: Tensor


@torch.no_grad()
def tokenise(data: ClipData, vq: VQTokenizer, folder: Path, rounds: int = 6) -> ClipTokens:
    """The tokens of all clips; frequencies are those of the clips that are trained on.

    They are kept in ``folder``, in a file whose name says which tokenizer made them.
    """
    cache = folder / f"tokens.{weights_hash(vq)[:12]}.npy"
    if cache.is_file() and len(np.load(cache, mmap_mode="r")) == 2 * len(data.info):
        both = torch.from_numpy(np.load(cache).astype(np.int64))
        return ClipTokens(*both.chunk(2))
    latents = torch.stack([vq.latents(clip_pixels(clip)).flatten(1, 2) for clip in data.frames])
    book, train = vq.codebook, torch.from_numpy(data.indices(False))
    nearest = (latents @ book.T).argmax(-1)
    counts = torch.bincount(nearest[train].flatten(), minlength=len(book)).float()
    for _ in range(rounds):
        tokens = torch.cat([quantise_clips(part, book, counts) for part in latents.split(64)])
        counts = torch.bincount(tokens[train].flatten(), minlength=len(book)).float()
    parts = zip(latents.split(64), nearest[:, 0].split(64), strict=True)
    plain = torch.cat([quantise_clips(part, book, counts, first) for part, first in parts])
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, torch.cat([tokens, plain]).numpy().astype(np.int16))
    return ClipTokens(tokens, plain)
