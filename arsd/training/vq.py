"""Stage ``vq``: train the tokenizer of emoji-128 (L1 + L2 + gradient loss, codebook by moving averages on the sphere)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arsd.devices import has_fast_bfloat16
from arsd.errors import DataError
from arsd.tokenizers.vq import VQTokenizer
from arsd.training.common import (
    Muon,
    Run,
)
from arsd.training.data import EmojiData

EMOJI_VQ: dict[str, Any] = {
    "codebook_size": 1024,
    "codebook_dim": 8,
    "latent_channels": 64,
    "base_channels": 64,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "norm_groups": 16,
    "patch_size": 4,
}
COMMITMENT = 0.25
CODE_DECAY = 0.98
CHECKPOINT_MINUTES = 4
MAX_SHIFT = 6
WARMUP_STEPS = 250  # steps without quantisation, so that the codebook starts at latents that mean something


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def shifted(images: Tensor, dx: int, dy: int, flip: bool) -> Tensor:
    """Pictures moved by (dx, dy) pixels over white, mirrored when ``flip``."""
    pad = MAX_SHIFT
    height, width = images.shape[-2:]
    out = F.pad(images, (pad, pad, pad, pad), value=1.0)[..., pad + dy : pad + dy + height, pad + dx : pad + dx + width]
    return out.flip(-1) if flip else out


class Codebook:
    """Moving-average codes on the unit sphere; codes that fall out of use restart at latents of the batch."""

    def __init__(self, vq: VQTokenizer) -> None:
        self.weight = vq.net.quantize.embedding.weight
        self.sums = F.normalize(self.weight.detach(), dim=-1).clone()
        self.counts = torch.ones(len(self.weight))

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Begin at random latents ``z`` [n, d]."""
        pick = z[torch.randint(len(z), (len(self.weight),))]
        self.weight.copy_(F.normalize(pick + 0.01 * torch.randn_like(pick), dim=-1))
        self.sums.copy_(self.weight)
        self.counts.fill_(1)

    @torch.no_grad()
    def update(self, z: Tensor, ids: Tensor) -> None:
        """Follow the latents ``z`` [n, d] that were assigned to ``ids`` [n]."""
        hits = torch.bincount(ids, minlength=len(self.weight)).float()
        self.counts.lerp_(hits, 1 - CODE_DECAY)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, ids, z), 1 - CODE_DECAY)
        dead = torch.nonzero(self.counts < 0.03).flatten()
        if len(dead):
            self.sums[dead] = z[torch.randint(len(z), (len(dead),))]
            self.counts[dead] = 1.0
        self.weight.copy_(F.normalize(self.sums, dim=-1))


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 + 2 L2, L1 of the finite differences (edges), L1 of 8x8 averages (colour)."""
    error = out - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colour = F.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + colour


@torch.no_grad()
def psnr(vq: VQTokenizer, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of a round trip through the codes."""
    errors = []
    for part in images.split(16):
        out = vq.decode(vq.encode(part)).float().clamp(-1, 1)
        errors.append(((out - part) / 2).square().flatten(1).mean(1))
    return float((-10 * torch.cat(errors).clamp_min(1e-8).log10()).mean())


def sample_sheet(vq: VQTokenizer, images: Tensor, path: Path) -> None:
    """A PNG with originals above reconstructions."""
    out = vq.decode(vq.encode(images)).float()
    rows = torch.cat([torch.cat(list(x), -1) for x in (images, out)], -2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


def _optimizers(vq: VQTokenizer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions, AdamW for the outer ones, norms and biases; the codebook has no gradient."""
    named = [(n, p) for n, p in vq.named_parameters() if "quantize" not in n]
    inner = [p for n, p in named if p.ndim == 4 and "conv_in" not in n and "conv_out" not in n and "quant_conv" not in n]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in chosen]
    return [Muon(inner, lr=lr, weight_decay=0.0), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)]


Draw = Callable[[torch.Generator], Tensor]  # a batch of pictures [B, 3, H, W] in [-1, 1]


def train_vq(data_dir: Path, out: Path, minutes: float = 60, batch: int = 8, lr: float = 4e-3, seed: int = 0) -> VQTokenizer:
    """Train (or go on training) the tokenizer; writes checkpoints, a log, sample sheets and ``out/vq``.

    Args:
        data_dir: folder made by ``arsd train data``.
        out: run folder; an existing ``checkpoint.pt`` in it is resumed.
        minutes: whole time budget, over all resumed runs; the learning rate is annealed over it.
        batch: pictures per step.
        lr: peak learning rate, of Muon and AdamW alike.
        seed: seed of weights and batches.
    """
    data = EmojiData.load(data_dir)
    train, test = data.subset(False), data.subset(True)
    weights = torch.from_numpy(train.weights)

    def draw(generator: torch.Generator) -> Tensor:
        pick = torch.multinomial(weights, batch, replacement=True, generator=generator)
        return to_tensor(train.images[pick.numpy()])

    return fit(EMOJI_VQ, draw, to_tensor(test.images[:48]), out, minutes, lr, seed)


def fit(
    config: dict[str, Any], draw: Draw, test: Tensor, out: Path, minutes: float, lr: float = 4e-3, seed: int = 0
) -> VQTokenizer:
    """Train (or go on training) a tokenizer on pictures from anywhere.

    Args:
        config: of the :class:`VQTokenizer`.
        draw: gives a batch; it is shifted and mirrored here.
        test: [n, 3, H, W] held-out pictures, for the log and the sample sheets.
        out: run folder; an existing ``checkpoint.pt`` in it is resumed.
        minutes: whole time budget, over all resumed runs.
        lr: peak learning rate.
        seed: seed of weights and batches.
    """
    if not minutes > 0:
        raise DataError(f"minutes must be positive, not {minutes}")
    torch.manual_seed(seed)
    vq = VQTokenizer(**config).train()
    run, book = Run(out, vq, _optimizers(vq, lr), lr, minutes), Codebook(vq)
    if run.restored:
        book.sums, book.counts = run.restored["sums"], run.restored["counts"]
    latents, pixels = torch.compile(vq.latents, dynamic=False), torch.compile(vq.pixels, dynamic=False)
    generator = torch.Generator().manual_seed(seed + run.step)
    while run.begin_step():
        dx, dy, flip = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,)).tolist() + [bool(torch.rand(()) < 0.5)]
        images = shifted(draw(generator), dx, dy, flip).contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            z = latents(images).float()
            flat = z.detach().flatten(0, 2)
            if run.step == WARMUP_STEPS:
                book.start(flat)
            ids = (flat @ book.weight.T).argmax(-1)
            codes = book.weight[ids].view_as(z).detach()
            if run.step < WARMUP_STEPS:
                loss = reconstruction_loss(pixels(z).float(), images)
            else:
                loss = reconstruction_loss(pixels(z + (codes - z).detach()).float(), images)
                loss = loss + COMMITMENT * (z - codes).square().sum(-1).mean()
        if run.step > WARMUP_STEPS:
            book.update(flat, ids)
        run.finish_step(loss, codes_used=int((book.counts > 0.05).sum()))
        if run.due(CHECKPOINT_MINUTES):
            run.save(sums=book.sums, counts=book.counts)
            now = _averaged(run, book, config)
            run.log(psnr_held_out=psnr(now, test))
            sample_sheet(now, test[:: max(1, len(test) // 12)][:12], out / "sheets" / f"{run.step:06d}.png")
    final = _averaged(run, book, config)
    final.save_pretrained(out / "vq")
    return final


def _averaged(run: Run, book: Codebook, config: dict[str, Any]) -> VQTokenizer:
    """The tokenizer with averaged weights and the present codes."""
    vq = VQTokenizer(**config).eval()
    vq.load_state_dict(run.average.values)
    vq.net.quantize.embedding.weight.data.copy_(book.weight)
    return vq
