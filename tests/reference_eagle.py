"""A published EAGLE drafter in its own key layout, written from the published formulas: plain functions over a state dict.

Shares no code with ``arsd``, so that agreement of the two means something. Small and slow on purpose. Slots are numbered as
the publication does: slot i holds the token x_{i+1} and the target's feature h_i, and predicts h_{i+1}.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def drafter_state(
    *,
    chameleon: bool = False,
    width: int = 64,
    heads: int = 2,
    kv_heads: int | None = None,
    hidden: int = 96,
    vocab: int = 32,
    bias: bool = True,
    shards: int = 1,
    seed: int = 0,
) -> State:
    """Random weights with the published names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    kv_width = width // heads * (kv_heads or heads)

    def draw(*shape: int) -> Tensor:
        return 1.5 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def around_one(*shape: int) -> Tensor:
        return 1 + 0.3 * torch.randn(shape, generator=generator)

    p, a = "layers.0.", "layers.0.self_attn."
    state = {"embed_tokens.weight": draw(vocab, width) * width**0.5, "fc.weight": draw(width, 2 * width)}
    state |= {"fc.bias": draw(width)} if bias else {}
    state |= {f"{a}{name}_proj.weight": draw(rows, width) for name, rows in (("q", width), ("k", kv_width), ("v", kv_width))}
    state |= {f"{a}o_proj.weight": draw(width, width), f"{p}mlp.gate_proj.weight": draw(hidden, width)}
    state |= {f"{p}mlp.up_proj.weight": draw(hidden, width), f"{p}mlp.down_proj.weight": draw(width, hidden)}
    state[f"{p}post_attention_layernorm.weight"] = around_one(width)
    if chameleon:
        state[f"{p}input_layernorm.weight"] = around_one(width)
        for name in ("q", "k"):
            state[f"{a}{name}_norm.weight"] = around_one(shards, width // heads)
            state[f"{a}{name}_norm.bias"] = 0.3 * draw(shards, width // heads)
    return state


def grid_turns(slots: int, grid: int, head_dim: int) -> Tensor:
    """Complex factors [slots + grid * grid, head_dim / 2]: 0 at text slots, then those of every cell in raster order."""
    pairs = head_dim // 2
    turns = torch.zeros(slots + grid * grid, pairs, dtype=torch.complex128)
    for cell in range(grid * grid):
        for j in range(pairs):
            along, k = (cell // grid, j) if j < pairs // 2 else (cell % grid, j - pairs // 2)
            angle = torch.tensor(along * 10000.0 ** (-2 * k / pairs), dtype=torch.float64)
            cos, sin = angle.cos().float().double(), angle.sin().float().double()  # the table is kept in float32
            turns[slots + cell, j] = torch.complex(cos, sin)
    return turns


def line_turns(places: Tensor, head_dim: int) -> Tensor:
    """Complex factors [B, L, head_dim / 2] of places [B, L] along a line."""
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = places[..., None] * rates
    return torch.polar(torch.ones_like(angles), angles)


def predict(
    state: State, heads: int, eps: float, ids: Tensor, features: Tensor, turns: Tensor, seen: Tensor, upscale: float = 1.0
) -> Tensor:
    """Predicted features [B, L, D] of ids [B, L] beside features [B, L, D]; ``seen`` [B, L]: slots that others read."""
    embeds = upscale * F.embedding(ids, state["embed_tokens.weight"])
    x = torch.cat([embeds, features], dim=-1) @ state["fc.weight"].T
    if "fc.bias" in state:
        x = x + state["fc.bias"]
    p = "layers.0."

    def norm(value: Tensor, key: str) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + eps).sqrt() * state[p + key]

    chameleon = p + "self_attn.q_norm.weight" in state
    y = norm(x, "input_layernorm.weight") if chameleon else x
    x = x + _attend(state, heads, y, turns, seen, chameleon) @ state[p + "self_attn.o_proj.weight"].T
    y = norm(x, "post_attention_layernorm.weight")
    gate, up = y @ state[p + "mlp.gate_proj.weight"].T, y @ state[p + "mlp.up_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ state[p + "mlp.down_proj.weight"].T


def _attend(state: State, heads: int, y: Tensor, turns: Tensor, seen: Tensor, chameleon: bool) -> Tensor:
    length, width = y.shape[1:]
    d = width // heads
    a = "layers.0.self_attn."

    def turned(name: str) -> Tensor:  # [B, L, heads, d / 2] complex: pairs of channels
        value = (y @ state[f"{a}{name}_proj.weight"].T).unflatten(-1, (-1, d))
        if chameleon:
            value = (value - value.mean(-1, keepdim=True)) / (value.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            row = torch.arange(value.shape[2]) * len(state[f"{a}{name}_norm.weight"]) // value.shape[2]
            value = value * state[f"{a}{name}_norm.weight"][row] + state[f"{a}{name}_norm.bias"][row]
            real, imaginary = value[..., : d // 2], value[..., d // 2 :]  # halves make the pairs
        else:
            real, imaginary = value[..., 0::2], value[..., 1::2]  # neighbours make the pairs
        return torch.complex(real, imaginary) * turns[..., :length, None, :]

    q, k = turned("q"), turned("k")
    v = (y @ state[f"{a}v_proj.weight"].T).unflatten(-1, (-1, d))
    group = [h // (heads // k.shape[2]) for h in range(heads)]
    scores = torch.einsum("bqhj,bkhj->bhqk", q, k[:, :, group].conj()).real / d**0.5
    allowed = torch.ones(length, length).tril().bool() & seen[:, None] | torch.eye(length).bool()
    weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :, group]).flatten(2)
