"""Emu3's image tokenizer in BAAI's key layout, written from its description: random weights, decoding, encoding."""

from __future__ import annotations

from typing import Any

import torch
from published_files import State
from torch import Tensor
from torch.nn import functional as F

SIZES: dict[str, Any] = {
    "codes": 32,
    "dim": 4,
    "z": 4,
    "ch": 32,
    "mult": (1, 1, 2, 2),
    "blocks": 1,
    "attn": (3,),
    "frames": 4,
}


class Maker:
    """Draws weights by key."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(shape, generator=self.generator) * std

    def conv(self, key: str, into: int, out_of: int, *kernel: int) -> None:
        taps = torch.Size(kernel).numel() * out_of
        self.state[f"{key}.weight"] = self.draw(into, out_of, *kernel, std=taps**-0.5)
        self.state[f"{key}.bias"] = self.draw(into, std=0.1)

    def norm(self, key: str, width: int, codes: int | None = None) -> None:
        """A group norm; with ``codes`` channels of codes that scale and shift it."""
        inner = key if codes is None else f"{key}.norm_layer"
        self.state |= {f"{inner}.weight": self.draw(width, std=0.1, mean=1), f"{inner}.bias": self.draw(width, std=0.1)}
        for part in ("conv_y", "conv_b") if codes else ():
            self.conv(f"{key}.{part}", width, codes or 0, 1, 1)

    def batch_norm(self, key: str, width: int) -> None:
        self.state |= {f"{key}.weight": self.draw(width, std=0.1, mean=1), f"{key}.bias": self.draw(width, std=0.1)}
        self.state[f"{key}.running_mean"] = self.draw(width, std=0.1)
        self.state[f"{key}.running_var"] = self.draw(width, std=0.1, mean=1).abs()
        self.state[f"{key}.num_batches_tracked"] = torch.tensor(100)

    def block(self, key: str, out_of: int, into: int, codes: int | None) -> None:
        self.norm(f"{key}.norm1", out_of, codes)
        self.conv(f"{key}.conv1", into, out_of, 3, 3)
        self.norm(f"{key}.norm2", into, codes)
        self.conv(f"{key}.conv2", into, into, 3, 3)
        if into != out_of:
            self.conv(f"{key}.nin_shortcut", into, out_of, 1, 1)

    def attention(self, key: str, width: int, codes: int | None) -> None:
        self.norm(f"{key}.norm", width, codes)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{key}.{part}", width, width, 1, 1)

    def in_time(self, key: str, width: int, blocks: int, steps: int, taps: int) -> None:
        for i in range(blocks):
            for part in (1, 2):
                self.batch_norm(f"{key}.time_res_stack.{i}.norm{part}", width)
                self.conv(f"{key}.time_res_stack.{i}.conv{part}.conv", width, width, 3, 3, 3)
        for i in range(steps):
            self.conv(f"{key}.time_conv.{i}.conv.conv", width, width, taps, 3, 3)


def emu3_vq_state(seed: int = 0, **changed: Any) -> State:
    """Random weights, float32."""
    n = SIZES | changed
    make, widths, steps = Maker(seed), [n["ch"] * factor for factor in n["mult"]], n["frames"].bit_length() - 1
    top, blocks = widths[-1], n["blocks"]
    for side, codes, key in (("encoder", None, "down"), ("decoder", n["dim"], "up")):
        levels = list(enumerate(widths))
        width = widths[0] if side == "encoder" else top
        make.conv(f"{side}.conv_in", width, 3 if side == "encoder" else n["z"], 3, 3)
        for level, out in levels if side == "encoder" else reversed(levels):
            for i in range(blocks + (side == "decoder")):
                make.block(f"{side}.{key}.{level}.block.{i}", width, out, codes)
                width = out
                if level in n["attn"]:
                    make.attention(f"{side}.{key}.{level}.attn.{i}", width, codes)
            sample, last = ("downsample", len(widths) - 1) if side == "encoder" else ("upsample", 0)
            if level != last:
                make.conv(f"{side}.{key}.{level}.{sample}.conv", width, width, 3, 3)
        for part in (1, 2):
            make.block(f"{side}.mid.block_{part}", top, top, codes)
        make.attention(f"{side}.mid.attn_1", top, codes)
        make.norm(f"{side}.norm_out", width, codes)
        make.conv(f"{side}.conv_out", n["z"] if side == "encoder" else 3, width, 3, 3)
        make.in_time(side, n["z"], blocks, steps, 4 if side == "encoder" else 3)
    make.conv("quant_conv.conv", n["dim"], n["z"], 3, 1, 1)
    make.state["quant_conv.conv.weight"] *= 100  # or all latents of random weights had one code
    make.conv("post_quant_conv.conv", n["z"], n["dim"], 3, 1, 1)
    make.state["quantize.embedding.weight"] = make.draw(n["codes"], n["dim"], std=1.0)
    return make.state


class Net:
    """The forward of both sides, over [B, C, T, H, W] in time and [B T, C, H, W] in space."""

    def __init__(self, state: State, side: str) -> None:
        self.state, self.side = state, side

    def conv(self, x: Tensor, key: str, padding: int = 1, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"], stride=stride, padding=padding)

    def norm(self, x: Tensor, key: str, zq: Tensor | None) -> Tensor:
        inner = key if zq is None else f"{key}.norm_layer"
        x = F.group_norm(x, 32, self.state[f"{inner}.weight"], self.state[f"{inner}.bias"], 1e-6)
        if zq is None:
            return x
        zq = F.interpolate(zq, size=x.shape[-2:], mode="nearest")
        return x * self.conv(zq, f"{key}.conv_y", 0) + self.conv(zq, f"{key}.conv_b", 0)

    def block(self, x: Tensor, key: str, zq: Tensor | None) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{key}.norm1", zq)), f"{key}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{key}.norm2", zq)), f"{key}.conv2")
        return h + (self.conv(x, f"{key}.nin_shortcut", 0) if f"{key}.nin_shortcut.weight" in self.state else x)

    def attention(self, x: Tensor, key: str, zq: Tensor | None) -> Tensor:
        h = self.norm(x, f"{key}.norm", zq)
        q, k, v = (self.conv(h, f"{key}.{part}", 0).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return x + self.conv(torch.einsum("bij,bcj->bci", weights, v).view(x.shape), f"{key}.proj_out", 0)

    def middle(self, x: Tensor, zq: Tensor | None) -> Tensor:
        x = self.attention(self.block(x, f"{self.side}.mid.block_1", zq), f"{self.side}.mid.attn_1", zq)
        return self.block(x, f"{self.side}.mid.block_2", zq)

    def level(self, x: Tensor, key: str, zq: Tensor | None) -> Tensor:
        i = 0
        while f"{key}.block.{i}.conv1.weight" in self.state:
            x = self.block(x, f"{key}.block.{i}", zq)
            if f"{key}.attn.{i}.q.weight" in self.state:
                x = self.attention(x, f"{key}.attn.{i}", zq)
            i += 1
        return x

    def causal(self, x: Tensor, key: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        side = weight.shape[-1] // 2
        x = F.pad(x, (side, side, side, side, 2, 0))
        return F.conv3d(x, weight, self.state[f"{key}.bias"], stride=(stride, 1, 1))

    def in_time(self, x: Tensor) -> Tensor:
        i = 0
        while f"{self.side}.time_res_stack.{i}.norm1.weight" in self.state:
            key, h = f"{self.side}.time_res_stack.{i}", x
            for part in (1, 2):
                names = (f"{key}.norm{part}.{name}" for name in ("running_mean", "running_var", "weight", "bias"))
                h = self.causal(F.silu(F.batch_norm(h, *(self.state[name] for name in names))), f"{key}.conv{part}.conv")
            x, i = x + h, i + 1
        return x

    def steps(self) -> int:
        return sum(key.startswith(f"{self.side}.time_conv.") and key.endswith(".weight") for key in self.state)


def decode(state: State, codes: Tensor) -> Tensor:
    """[B, 3, H, W] of codes [B, h, w], in the dtype of the state."""
    net = Net(state, "decoder")
    zq = state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)[:, :, None]
    z = net.causal(zq, "post_quant_conv.conv")
    both = net.in_time(torch.cat([z, zq]))
    for i in range(net.steps()):
        both = F.silu(net.causal(both.repeat_interleave(2, dim=2), f"decoder.time_conv.{i}.conv.conv"))
    x, zq = (half.transpose(1, 2).flatten(0, 1) for half in both.chunk(2))
    x = net.middle(net.conv(x, "decoder.conv_in"), zq)
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up."))
    for level in reversed(range(levels)):
        x = net.level(x, f"decoder.up.{level}", zq)
        if level:
            x = net.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), f"decoder.up.{level}.upsample.conv")
    x = net.conv(F.silu(net.norm(x, "decoder.norm_out", zq)), "decoder.conv_out")
    return x.unflatten(0, (len(codes), -1))[:, 0]


def encode(state: State, images: Tensor) -> Tensor:
    """Codes [B, h, w] of pictures [B, 3, H, W]."""
    net = Net(state, "encoder")
    frames = 2 ** net.steps()
    x = net.conv(images.repeat_interleave(frames, dim=0), "encoder.conv_in")
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    for level in range(levels):
        x = net.level(x, f"encoder.down.{level}", None)
        if level != levels - 1:
            x = net.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", 0, 2)
    x = net.conv(F.silu(net.norm(net.middle(x, None), "encoder.norm_out", None)), "encoder.conv_out")
    x = x.unflatten(0, (len(images), frames)).transpose(1, 2)
    for i in range(net.steps()):
        x = F.silu(net.causal(x, f"encoder.time_conv.{i}.conv.conv", 2))
    x = net.causal(net.in_time(x), "quant_conv.conv")[:, :, 0].permute(0, 2, 3, 1)
    return torch.cdist(x.flatten(1, 2), state["quantize.embedding.weight"][None]).argmin(-1).view(x.shape[:3])
