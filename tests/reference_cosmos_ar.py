"""Tiny files in the layout of Cosmos-Predict1's base models, and their forward written from the published description."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from published_files import State, write_json
from torch import Tensor
from torch.nn import functional as F

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 48, 40, 2, 4, 2, 12, 56
GRID = (3, 3, 4)
YARN = {"apply_yarn": True, "yarn_scale": 2, "yarn_beta_fast": 4, "yarn_beta_slow": 1, "original_latent_shape": [2, 3, 4]}


def cosmos_state(head_dim: int = HEAD_DIM, layers: int = LAYERS, seed: int = 0) -> State:
    """Random weights by NVIDIA's keys, float32; the width is not that of the heads together, as in the 12B model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    state = {"tok_embeddings.weight": draw(VOCAB, WIDTH, std=0.7), "output.weight": draw(VOCAB, WIDTH, std=0.2)}
    state["norm.weight"] = 1 + draw(WIDTH, std=0.1)
    for i in range(layers):
        name = f"layers.{i}."
        for part, heads in (("wq", HEADS), ("wk", KV_HEADS), ("wv", KV_HEADS)):
            state[f"{name}attention.{part}.weight"] = draw(heads * head_dim, WIDTH, std=WIDTH**-0.5)
        state[f"{name}attention.wo.weight"] = draw(WIDTH, HEADS * head_dim, std=(HEADS * head_dim) ** -0.5)
        for part in "qk":
            state[f"{name}attention.{part}_norm.weight"] = 1.5 + draw(head_dim, std=0.3)
        for part, shape in (("w1", (HIDDEN, WIDTH)), ("w3", (HIDDEN, WIDTH)), ("w2", (WIDTH, HIDDEN))):
            state[f"{name}feed_forward.{part}.weight"] = draw(*shape, std=shape[1] ** -0.5)
        for norm in ("attention_norm", "ffn_norm"):
            state[f"{name}{norm}.weight"] = 1 + draw(WIDTH, std=0.1)
    return state


def config_of(yarn: bool = False, **more: Any) -> dict[str, Any]:
    """As NVIDIA's code names these things."""
    sizes = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    sizes |= {"vocab_size": VOCAB, "ffn_hidden_size": HIDDEN, "norm_eps": 1e-5, "rope_theta": 500000}
    rotary = {"rope_dim": "3D", "video_latent_shape": list(GRID), "apply_yarn": False, "apply_abs_pos_emb": False}
    return sizes | rotary | (YARN if yarn else {}) | more


def write_cosmos_ar(folder: Path, yarn: bool = False, state: State | None = None) -> State:
    """``model.pt`` as it is published, bfloat16 apart, and ``config.json``; returns the tensors by NVIDIA's key."""
    state = cosmos_state() if state is None else state
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {f"model.{key}": value for key, value in state.items()}}, folder / "model.pt")
    write_json(folder / "config.json", config_of(yarn))
    return state


def angles(grid: tuple[int, int, int], head_dim: int, base: float, yarn: dict[str, Any] | None) -> Tensor:
    """[N, d / 2], one token after the other, one channel after the other."""
    space = head_dim // 6 * 2
    axes = (("t", head_dim - 2 * space, 0), ("y", space, 1), ("x", space, 1))

    def frequency(k: int, channels: int, axis: int) -> float:
        f = 1 / base ** (2 * k / channels)
        if not yarn:
            return f
        length = yarn["original_latent_shape"][axis]
        high, low = (2 * math.pi * yarn[f"yarn_beta_{which}"] / length for which in ("fast", "slow"))
        m = min(1.0, max(0.0, (f - low) / (high - low)))
        return (1 - m) * f / yarn["yarn_scale"] + m * f

    rows = []
    for t in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                at = {"t": t, "y": y, "x": x}
                rows.append([at[name] * frequency(k, n, axis) for name, n, axis in axes for k in range(n // 2)])
    return torch.tensor(rows, dtype=torch.float64)


def logits(
    state: State,
    ids: Tensor,
    yarn: bool = False,
    grid: tuple[int, int, int] = GRID,
    base: float = 500000.0,
    eps: float = 1e-5,
) -> Tensor:
    """[T, V] of the codes behind each of the ids [T], in float64."""
    weights = {key: value.double() for key, value in state.items()}
    head_dim = len(weights["layers.0.attention.q_norm.weight"])
    turn = angles(grid, head_dim, base, YARN if yarn else None)[: len(ids), None]

    def norm(x: Tensor, key: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[key]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * turn.cos() - second * turn.sin(), second * turn.cos() + first * turn.sin()], -1)

    x, count = weights["tok_embeddings.weight"][ids], len(ids)
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    for i in range(layers):
        name = f"layers.{i}."
        h = norm(x, f"{name}attention_norm.weight")
        q, k, v = (
            (h @ weights[f"{name}attention.{part}.weight"].T).unflatten(1, (-1, head_dim)) for part in ("wq", "wk", "wv")
        )
        q = turned(norm(q, f"{name}attention.q_norm.weight"))
        k = turned(norm(k, f"{name}attention.k_norm.weight"))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / head_dim**0.5
        closed = torch.ones(count, count).triu(1).bool()
        seen = torch.einsum("hij,jhd->ihd", scores.masked_fill(closed, -torch.inf).softmax(-1), v).flatten(1)
        x = x + seen @ weights[f"{name}attention.wo.weight"].T
        h = norm(x, f"{name}ffn_norm.weight")
        gate, up = (h @ weights[f"{name}feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ weights[f"{name}feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ weights["output.weight"].T
