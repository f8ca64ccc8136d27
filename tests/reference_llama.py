"""A Llama's forward written from its description, optionally with norms of queries and keys per head (Qwen3, Emu3.5)."""

from __future__ import annotations

import torch
from published_files import State
from torch import Tensor
from torch.nn import functional as F


def llama_state(
    vocab: int, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, hidden: int, qk_norm: bool, seed: int = 0
) -> State:
    """Random weights by transformers' keys, float32; the logits vary by about 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    state = {"model.embed_tokens.weight": draw(vocab, width, std=0.5), "lm_head.weight": draw(vocab, width, std=0.12)}
    state["model.norm.weight"] = 1 + draw(width, std=0.1)
    for i in range(layers):
        name = f"model.layers.{i}."
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            state[f"{name}self_attn.{part}_proj.weight"] = draw(rows * head_dim, width, std=width**-0.5)
        state[f"{name}self_attn.o_proj.weight"] = draw(width, heads * head_dim, std=width**-0.5)
        for part, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            state[f"{name}mlp.{part}_proj.weight"] = draw(*shape, std=shape[1] ** -0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{name}{norm}.weight"] = 1 + draw(width, std=0.1)
        for part in "qk" if qk_norm else "":
            state[f"{name}self_attn.{part}_norm.weight"] = 1 + draw(head_dim, std=0.1)
    return state


def logits(state: State, ids: Tensor, heads: int, kv_heads: int, theta: float = 1e6, eps: float = 1e-5) -> Tensor:
    """[N, V] of ids [N], in float64."""
    weights = {key: value.double() for key, value in state.items() if value.is_floating_point()}

    def norm(x: Tensor, key: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[key]

    x = weights["model.embed_tokens.weight"][ids]
    count = len(ids)
    closed = torch.ones(count, count).triu(1).bool()
    layers = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("model.layers."))
    for i in range(layers):
        name = f"model.layers.{i}."
        h = norm(x, f"{name}input_layernorm.weight")
        head_dim = len(weights[f"{name}self_attn.q_proj.weight"]) // heads
        parts = (h @ weights[f"{name}self_attn.{part}_proj.weight"].T for part in "qkv")
        q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
        if f"{name}self_attn.q_norm.weight" in weights:
            q, k = norm(q, f"{name}self_attn.q_norm.weight"), norm(k, f"{name}self_attn.k_norm.weight")
        q, k = _turned(q, theta), _turned(k, theta)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        seen = torch.einsum("hij,jhd->ihd", scores.masked_fill(closed, -torch.inf).softmax(-1), v)
        x = x + seen.flatten(1) @ weights[f"{name}self_attn.o_proj.weight"].T
        h = norm(x, f"{name}post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[f"{name}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def _turned(x: Tensor, theta: float) -> Tensor:
    """[N, H, d]: channel j turns with channel j + d/2."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin, (first, second) = angles.cos()[:, None], angles.sin()[:, None], x.split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
