"""Upstream LlamaGen in its own key layout, written from the published formulas: plain functions over a state dict.

Shares no code with ``arsd``, so that agreement of the two means something. Small and slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def transformer_state(
    *, text: bool = False, width: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 4, slots: int = 5, seed: int = 0
) -> State:
    """Random weights with 48 codes, 10 classes or captions of width 24, and an MLP of width 96."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {"tok_embeddings.weight": draw(48, width), "output.weight": 3 * draw(48, width)}
    if text:
        state["cls_embedding.uncond_embedding"] = draw(slots, 24)
        state["cls_embedding.cap_proj.fc1.weight"] = 3 * draw(width, 24)
        state["cls_embedding.cap_proj.fc2.weight"] = draw(width, width)
    else:
        state["cls_embedding.embedding_table.weight"] = draw(11, width)
    for i in range(layers):
        block = {"attention.wqkv": draw(width + 2 * kv_heads * width // heads, width), "attention.wo": draw(width, width)}
        block |= {"feed_forward.w1": draw(96, width), "feed_forward.w3": draw(96, width), "feed_forward.w2": draw(width, 96)}
        block |= {name: 1 + 0.3 * draw(width) * width**0.5 for name in ("attention_norm", "ffn_norm")}
        state |= {f"layers.{i}.{name}.weight": weight for name, weight in block.items()}
    return state | {"norm.weight": 1 + 0.3 * draw(width) * width**0.5}


def class_slots(state: State, labels: Tensor) -> Tensor:
    return state["cls_embedding.embedding_table.weight"][labels].unsqueeze(1)


def caption_slots(state: State, features: Tensor) -> Tensor:
    inner = F.gelu(features @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return inner @ state["cls_embedding.cap_proj.fc2.weight"].T


def logits(state: State, heads: int, grid: int, slots: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of ids [B, T] after condition slots [B, P, D]; ``keep`` [B, P] is False at padding."""
    x = torch.cat([slots, F.embedding(ids[:, :-1], state["tok_embeddings.weight"])], dim=1)
    batch, length, width = x.shape
    prefix, d = slots.shape[1], width // heads
    rotation = torch.zeros(prefix + grid * grid, d // 2, dtype=torch.complex64)  # 0, not 1, at condition slots
    for t in range(grid * grid):
        for j in range(d // 2):
            along, k = (t // grid, j) if j < d // 4 else (t % grid, j - d // 4)
            angle = torch.tensor(along * 10000.0 ** (-2 * k / (d // 2)), dtype=torch.float64)
            rotation[prefix + t, j] = torch.polar(torch.ones_like(angle), angle)
    allowed = torch.ones(length, length).tril().bool().repeat(batch, 1, 1)
    if keep is not None:
        allowed[:, :, :prefix] &= keep.bool()[:, None]
        allowed |= torch.eye(length).bool()

    def norm(value: Tensor, key: str) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[key]

    def rotate(value: Tensor) -> Tensor:  # [B, L, heads, d], neighbouring channels as one complex number
        turned = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) * rotation[:length, None]
        return torch.view_as_real(turned).flatten(-2)

    for i in range(sum(key.endswith("wqkv.weight") for key in state)):
        p = f"layers.{i}."
        qkv = (norm(x, p + "attention_norm.weight") @ state[p + "attention.wqkv.weight"].T).unflatten(-1, (-1, d))
        kv_heads = (qkv.shape[2] - heads) // 2
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        group = [h // (heads // kv_heads) for h in range(heads)]
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)[:, :, group]) / d**0.5
        weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
        x = x + torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :, group]).flatten(2) @ state[p + "attention.wo.weight"].T
        y = norm(x, p + "ffn_norm.weight")
        gate, up = y @ state[p + "feed_forward.w1.weight"].T, y @ state[p + "feed_forward.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ state[p + "feed_forward.w2.weight"].T
    return (norm(x, "norm.weight") @ state["output.weight"].T)[:, prefix - 1 :]


def vq_state(*, base: int = 32, multiplier: tuple[int, ...] = (1, 2), blocks: int = 1, z: int = 16, seed: int = 0) -> State:
    """Random tokenizer weights with 40 codes of dimension 8, whose lengths are far from 1."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def layer(key: str, out: int, inside: int = 0, kernel: int = 1) -> None:
        shape = (out, inside, kernel, kernel) if inside else (out,)
        weight = torch.randn(shape, generator=generator) * 0.8 / max(inside * kernel**2, 16) ** 0.5
        state[key + ".weight"] = weight if inside else 1 + weight
        state[key + ".bias"] = 0.1 * torch.randn(out, generator=generator)

    def residual(key: str, inside: int, out: int) -> int:
        for name, arguments in (
            ("norm1", (inside,)),
            ("conv1", (out, inside, 3)),
            ("norm2", (out,)),
            ("conv2", (out, out, 3)),
        ):
            layer(f"{key}.{name}", *arguments)
        if inside != out:
            layer(f"{key}.nin_shortcut", out, inside)
        return out

    def attention(key: str, width: int) -> None:
        layer(f"{key}.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            layer(f"{key}.{name}", width, width)

    def stack(
        side: str, inside: int, first: int, out: int, levels: list[int], depth: int, resample: str, lowest: int
    ) -> None:
        layer(f"{side}.conv_in", first, inside, 3)
        width = first
        for i, wanted in enumerate(levels):
            for j in range(depth):
                width = residual(f"{side}.conv_blocks.{i}.res.{j}", width, wanted)
                if i == lowest:
                    attention(f"{side}.conv_blocks.{i}.attn.{j}", width)
            if i < len(levels) - 1:
                layer(f"{side}.conv_blocks.{i}.{resample}.conv", width, width, 3)
        middle = levels[lowest]
        for j in (0, 2):
            residual(f"{side}.mid.{j}", middle, middle)
        attention(f"{side}.mid.1", middle)
        layer(f"{side}.norm_out", width)
        layer(f"{side}.conv_out", out, width, 3)

    levels = [base * m for m in multiplier]
    stack("encoder", 3, base, z, levels, blocks, "downsample", len(levels) - 1)
    stack("decoder", z, levels[-1], 3, levels[::-1], blocks + 1, "upsample", 0)
    layer("quant_conv", 8, z)
    layer("post_quant_conv", z, 8)
    state["quantize.embedding.weight"] = torch.randn(40, 8, generator=generator) * torch.rand(40, 1, generator=generator) * 5
    return state | {"quantize.codebook_used": torch.zeros(65536)}


def _run(state: State, side: str, x: Tensor) -> Tensor:
    def conv(key: str, value: Tensor, stride: int = 1) -> Tensor:
        weight = state[key + ".weight"]
        return F.conv2d(value, weight, state[key + ".bias"], stride, 0 if stride > 1 else weight.shape[-1] // 2)

    def norm(key: str, value: Tensor, swish: bool = True) -> Tensor:
        value = F.group_norm(value, 32, state[key + ".weight"], state[key + ".bias"], 1e-6)
        return F.silu(value) if swish else value

    def residual(key: str, value: Tensor) -> Tensor:
        inner = conv(f"{key}.conv1", norm(f"{key}.norm1", value))
        inner = conv(f"{key}.conv2", norm(f"{key}.norm2", inner))
        return inner + (conv(f"{key}.nin_shortcut", value) if f"{key}.nin_shortcut.weight" in state else value)

    def attention(key: str, value: Tensor) -> Tensor:
        normed = norm(f"{key}.norm", value, swish=False)
        q, k, v = (conv(f"{key}.{name}", normed).flatten(2) for name in "qkv")
        weights = (torch.einsum("bcq,bck->bqk", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return value + conv(f"{key}.proj_out", torch.einsum("bqk,bck->bcq", weights, v).reshape(value.shape))

    def middle(value: Tensor) -> Tensor:
        return residual(f"{side}.mid.2", attention(f"{side}.mid.1", residual(f"{side}.mid.0", value)))

    x = conv(f"{side}.conv_in", x)
    x = middle(x) if side == "decoder" else x
    i = 0
    while f"{side}.conv_blocks.{i}.res.0.conv1.weight" in state:
        here, j = f"{side}.conv_blocks.{i}", 0
        while f"{here}.res.{j}.conv1.weight" in state:
            x = residual(f"{here}.res.{j}", x)
            x = attention(f"{here}.attn.{j}", x) if f"{here}.attn.{j}.q.weight" in state else x
            j += 1
        if f"{here}.downsample.conv.weight" in state:  # padded at the right and the bottom only
            x = conv(f"{here}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{here}.upsample.conv.weight" in state:
            x = conv(f"{here}.upsample.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2))
        i += 1
    x = middle(x) if side == "encoder" else x
    return conv(f"{side}.conv_out", norm(f"{side}.norm_out", x))


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def vq_encode(state: State, images: Tensor, normalise: bool = True) -> Tensor:
    """Ids [B, h, w] of the codes nearest to the latents of images [B, 3, H, W], both scaled to length 1."""
    z = F.conv2d(_run(state, "encoder", images), state["quant_conv.weight"], state["quant_conv.bias"]).permute(0, 2, 3, 1)
    codes = state["quantize.embedding.weight"]
    z, codes = (unit(z), unit(codes)) if normalise else (z, codes)
    return (z[..., None, :] - codes).square().sum(-1).argmin(-1)


def vq_decode(state: State, ids: Tensor) -> Tensor:
    codes = unit(state["quantize.embedding.weight"])[ids].permute(0, 3, 1, 2)
    return _run(state, "decoder", F.conv2d(codes, state["post_quant_conv.weight"], state["post_quant_conv.bias"]))
