"""Chameleon's decoder over published key names, from the published description: plain functions over a state dict.

Shares no code with ``arsd`` or transformers, so that agreement means something. Small and slow on purpose; it computes in
double precision. Two layouts: transformers' (norms of queries and keys [shards, d] or [heads, d]; channel j turns with
j + d / 2), and Meta's (norms [d] or [shards, d]; channel 2j turns with 2j + 1), which ``tok_embeddings`` tells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]

META = {
    "embed": "tok_embeddings",
    "norm": "norm",
    "head": "output",
    "layer": "layers.{}.",
    **{name: f"attention.w{name}" for name in "qkvo"},
    **{f"{name}_norm": f"attention.{name}_normalization" for name in "qk"},
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
    "first": "attention_norm",
    "second": "ffn_norm",
}
HF = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "first": "input_layernorm",
    "second": "post_attention_layernorm",
}


def chameleon_state(
    *,
    meta: bool = False,
    vocab: int = 400,
    width: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    layers: int = 2,
    hidden: int = 192,
    norm_rows: int = 1,
    seed: int = 0,
) -> State:
    """Random float32 weights with published names and shapes, whose laws are peaked and depend on the context.

    ``norm_rows`` is the number of rows of the norms of queries and keys: shards, or heads.
    """
    generator = torch.Generator().manual_seed(seed)
    name = META if meta else HF
    d = width // heads
    kv_width = d * (kv_heads or heads)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def near_one(*shape: int) -> Tensor:
        return 1 + 0.2 * torch.randn(shape, generator=generator)

    state = {f"{name['embed']}.weight": draw(vocab, width, std=width**0.5)}
    for i in range(layers):
        p = name["layer"].format(i)
        rows = {"q": width, "k": kv_width, "v": kv_width, "o": width, "gate": hidden, "up": hidden}
        state |= {f"{p}{name[part]}.weight": draw(count, width) for part, count in rows.items()}
        state[f"{p}{name['down']}.weight"] = draw(width, hidden)
        state |= {f"{p}{name[part]}.weight": near_one(width) for part in ("first", "second")}
        for part, count in (("q_norm", heads), ("k_norm", kv_heads or heads)):
            count = count if norm_rows == heads else norm_rows
            state[f"{p}{name[part]}.weight"] = near_one(count, d)
            state[f"{p}{name[part]}.bias"] = 0.3 * torch.randn(count, d, generator=generator)
    state[f"{name['norm']}.weight"] = near_one(width)
    state[f"{name['head']}.weight"] = draw(vocab, width, std=1.5)
    return state


def logits(
    state: State, ids: Tensor, *, heads: int = 4, theta: float = 1e4, eps: float = 1e-5, swin: bool = False
) -> Tensor:
    """[B, N, V] after each of ``ids`` [B, N], in double precision."""
    state = {key: value.double() for key, value in state.items()}
    meta = "tok_embeddings.weight" in state
    name = META if meta else HF
    x = state[f"{name['embed']}.weight"][ids]
    d = x.shape[-1] // heads
    turns = _turns(ids.shape[1], d, theta)
    i = 0
    while f"{name['layer'].format(i)}{name['q']}.weight" in state:
        prefix = name["layer"].format(i)
        part = {
            which: state[f"{prefix}{name[which]}.weight"]
            for which in ("q", "k", "v", "o", "gate", "up", "down", "first", "second")
        }
        norms = {
            which: [state[f"{prefix}{name[which]}.{end}"].reshape(-1, d) for end in ("weight", "bias")]
            for which in ("q_norm", "k_norm")
        }
        attended = _attend(x if swin else _rms(x, part["first"], eps), part, norms, turns, d, meta)
        x = x + (_rms(attended, part["first"], eps) if swin else attended)
        y = x if swin else _rms(x, part["second"], eps)
        y = (F.silu(y @ part["gate"].T) * (y @ part["up"].T)) @ part["down"].T
        x = x + (_rms(y, part["second"], eps) if swin else y)
        i += 1
    return _rms(x, state[f"{name['norm']}.weight"], eps) @ state[f"{name['head']}.weight"].T


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turns(count: int, d: int, theta: float) -> Tensor:
    """Complex factors [count, d / 2]."""
    speeds = theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * speeds
    return torch.polar(torch.ones_like(angles), angles)


def _attend(y: Tensor, part: State, norms: dict[str, list[Tensor]], turns: Tensor, d: int, meta: bool) -> Tensor:
    q, k, v = ((y @ part[which].T).unflatten(-1, (-1, d)) for which in "qkv")
    q = _turned(_head_norm(q, *norms["q_norm"]), turns, meta)
    k = _turned(_head_norm(k, *norms["k_norm"]), turns, meta)
    groups = q.shape[2] // k.shape[2]
    out = torch.empty_like(q)
    later = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).triu(1)
    for h in range(q.shape[2]):
        scores = q[:, :, h] @ k[:, :, h // groups].transpose(1, 2) / d**0.5
        out[:, :, h] = scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, :, h // groups]
    return out.flatten(2) @ part["o"].T


def _head_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over d of [B, N, heads, d]; head h is of shard h // (heads / shards)."""
    shards = len(weight)
    per_shard = x.shape[2] // shards
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return torch.stack([x[:, :, h] * weight[h // per_shard] + bias[h // per_shard] for h in range(x.shape[2])], dim=2)


def _turned(x: Tensor, turns: Tensor, meta: bool) -> Tensor:
    """Rotate channel pairs of [B, N, heads, d]."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if meta else (x[..., :half], x[..., half:])
    turned = torch.complex(first.contiguous(), second.contiguous()) * turns[:, None]
    parts = [turned.real, turned.imag]
    return torch.stack(parts, dim=-1).flatten(-2) if meta else torch.cat(parts, dim=-1)
