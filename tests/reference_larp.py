"""LARP in its own key layout, written from the published formulas: plain functions over a state dict, in float64.

Shares no code with ``arsd``, so that agreement of the two means something. Small and slow on purpose.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from published_files import State, write_json, write_weights
from torch import Tensor

CODES, CLASSES, TOKENS, WIDTH, LAYERS, HEADS, HIDDEN = 24, 5, 16, 32, 2, 2, 48
FRAMES, SIDE, PATCH, DEPTH = 8, 16, 8, 4  # clips of 8 pictures of 16 x 16 pixels, in patches of 4 x 8 x 8
READS, PAINTS, CODE_DIM = 32, 48, 4  # widths of encoder and decoder


class Draw:
    """Random tensors, one after another."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float | None = None) -> Tensor:
        std = std or shape[-1] ** -0.5
        return torch.randn(shape, generator=self.generator) * std


# ------------------------------------------------------------------------------------------------------- the transformer


def transformer_state(frames: bool = False, kv_heads: int = HEADS, seed: int = 0) -> State:
    """Random weights, whose laws are far from uniform and depend on where a code stands."""
    draw, rows = Draw(seed), WIDTH + 2 * kv_heads * WIDTH // HEADS
    slots = 2 * TOKENS if frames else TOKENS
    state = {"abs_pe": draw(1, slots, WIDTH, std=0.4), "output.weight": 2.5 * draw(CODES, WIDTH)}
    state["tok_embeddings.weight"] = draw(CODES + frames, WIDTH, std=0.5)
    if not frames:
        state["cls_embedding.embedding_table.weight"] = draw(CLASSES + 1, WIDTH, std=0.5)
    for i in range(LAYERS):
        block = {
            "attention.wqkv": draw(rows, WIDTH),
            "attention.wo": draw(WIDTH, WIDTH),
            "feed_forward.w2": draw(WIDTH, HIDDEN),
        }
        block |= {f"feed_forward.w{n}": draw(HIDDEN, WIDTH) for n in (1, 3)}
        block |= {name: 1 + draw(WIDTH, std=0.2) for name in ("attention_norm", "ffn_norm")}
        state |= {f"layers.{i}.{name}.weight": value for name, value in block.items()}
    return state | {"norm.weight": 1 + draw(WIDTH, std=0.2)}


def transformer_config(frames: bool = False, **changes: Any) -> dict[str, Any]:
    """As huggingface_hub's mixin writes the arguments of a dataclass."""
    config = {"attn_dropout_p": 0.0, "class_dropout_prob": 0.1, "cls_token_num": TOKENS + 1 if frames else 1, "dim": WIDTH}
    config |= {"drop_path_rate": 0.0, "ffn_dim_multiplier": None, "ffn_dropout_p": 0.1, "frame_prediction": frames}
    config |= {"initializer_range": 0.02, "max_batch_size": 32, "max_seq_len": TOKENS, "model_type": "class_cond"}
    config |= {"multiple_of": 16, "n_head": HEADS, "n_kv_head": None, "n_layer": LAYERS, "norm_eps": 1e-05}
    config |= {"num_classes": CLASSES, "resid_dropout_p": 0.1, "rope_base": 10000, "token_dropout_p": 0.1}
    return config | {"use_fixed_pe": False, "vocab_size": CODES} | changes


def write_transformer(folder: Path, frames: bool = False, state: State | None = None, **config: Any) -> State:
    state = transformer_state(frames) if state is None else state
    write_weights(folder, state, shards=1)
    write_json(folder / "config.json", transformer_config(frames, **config))
    (folder / "README.md").write_text("---\ntags:\n- model_hub_mixin\n---\n")
    return state


def logits(state: State, prompt: Tensor, ids: list[int], eps: float = 1e-5) -> Tensor:
    """[N, V] logits of a clip's codes after a prompt [P, D] of embeddings."""
    w = {key: value.double() for key, value in state.items()}

    def norm(x: Tensor, key: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[key]

    x = torch.cat([prompt.double(), w["tok_embeddings.weight"][ids[:-1]]])
    x = x + w["abs_pe"][0, : len(x)]
    later = torch.ones(len(x), len(x)).triu(1).bool()
    for i in range(LAYERS):
        name, dim = f"layers.{i}.", WIDTH // HEADS
        qkv = norm(x, f"{name}attention_norm.weight") @ w[f"{name}attention.wqkv.weight"].T
        kv_heads = (qkv.shape[1] - WIDTH) // (2 * dim)
        q, k, v = qkv.split([WIDTH, kv_heads * dim, kv_heads * dim], dim=1)
        seen = []
        for head in range(HEADS):
            own, other = slice(head * dim, (head + 1) * dim), head * kv_heads // HEADS
            shared = slice(other * dim, (other + 1) * dim)
            scores = (q[:, own] @ k[:, shared].T / math.sqrt(dim)).masked_fill(later, -torch.inf)
            seen.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(seen, 1) @ w[f"{name}attention.wo.weight"].T
        h = norm(x, f"{name}ffn_norm.weight")
        gate, up = (h @ w[f"{name}feed_forward.w{n}.weight"].T for n in (1, 3))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{name}feed_forward.w2.weight"].T
    return (norm(x, "norm.weight") @ w["output.weight"].T)[len(prompt) - 1 :]


def class_prompt(state: State, label: int) -> Tensor:
    """[1, D] of a class; the null class is the last row."""
    return state["cls_embedding.embedding_table.weight"][label : label + 1]


def frames_prompt(state: State, codes: list[int]) -> Tensor:
    """[N + 1, D] of the codes of given frames, and the separator."""
    return state["tok_embeddings.weight"][[*codes, CODES]]


# --------------------------------------------------------------------------------------------------------- the tokenizer


def tokenizer_state(learned: bool = False, prior: bool = True, seed: int = 0) -> State:
    """Random weights; codes of any length. ``learned`` tables are those of all flags set, else of the published ones."""
    draw, t, h = Draw(seed), FRAMES // DEPTH, SIDE // PATCH
    state = {
        "x_embedder.proj.weight": draw(READS, 3, DEPTH, PATCH, PATCH, std=0.1),
        "x_embedder.proj.bias": draw(READS, std=0.1),
    }
    state |= {"encoder_latent_query_embed": draw(TOKENS, READS, std=1.0)}
    state |= {"decoder_latent_pe": draw(1, TOKENS, PAINTS, std=0.5)}
    state |= {"decoder_patch_query_token_type_embed": draw(1, 1, PAINTS, std=0.5)}
    if learned:
        shapes = {"h": (1, 1, h, 1), "w": (1, 1, 1, h), "t": (1, t, 1, 1)}
        state |= {f"decoder_{axis}_embed": draw(*shape, PAINTS, std=0.5) for axis, shape in shapes.items()}
        names = {"h": "encoder_h_embed", "w": "encode_w_embed", "t": "encoder_t_embed"}  # upstream's spelling
        state |= {names[axis]: draw(*shape, READS, std=0.5) for axis, shape in shapes.items()}
        state |= {f"encoder_{name}_token_type_embed": draw(1, 1, READS, std=0.5) for name in ("patch", "latent_query")}
        state |= {"decoder_latent_token_type_embed": draw(1, 1, PAINTS, std=0.5)}
    else:
        state |= {"encoder_patch_pe": draw(1, t * h * h, READS, std=0.5)}
        state |= {"decoder_patch_query_embed": draw(1, t * h * h, PAINTS, std=0.5)}
    for side, width in (("encoder", READS), ("decoder", PAINTS)):
        for i in range(LAYERS):
            block = {"attn.qkv.weight": 1.5 * draw(3 * width, width), "attn.proj.weight": draw(width, width)}
            block |= {"mlp.fc1.weight": draw(4 * width, width), "mlp.fc2.weight": draw(width, 4 * width)}
            biases = {"attn.proj": width, "mlp.fc1": 4 * width, "mlp.fc2": width, "norm1": width, "norm2": width}
            block |= {f"{name}.bias": draw(count, std=0.2) for name, count in biases.items()}
            block |= {f"{name}.weight": 1 + draw(width, std=0.2) for name in ("norm1", "norm2")}
            state |= {f"{side}.blocks.{i}.{name}": value for name, value in block.items()}
    pixels = 3 * DEPTH * PATCH**2
    layers = {"bottleneck.in_linear": (CODE_DIM, READS), "bottleneck.out_linear": (PAINTS, CODE_DIM)}
    layers |= {"final_layer.linear": (pixels, PAINTS)}
    for name, shape in layers.items():
        state |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0], std=0.2)}
    state |= {
        "final_layer.norm_final.weight": 1 + draw(PAINTS, std=0.2),
        "final_layer.norm_final.bias": draw(PAINTS, std=0.2),
    }
    state["bottleneck.regularizer.embedding.weight"] = draw(CODES, CODE_DIM, std=1.0)
    if prior:
        state |= {"prior_model.pos_emb": torch.ones(1, 1024, 8), "prior_model.head.weight": torch.ones(CODE_DIM, 8)}
    return state


def tokenizer_config(learned: bool = False, **changes: Any) -> dict[str, Any]:
    """As huggingface_hub's mixin writes them."""
    args = {"codebook_loss_weight": 1.0, "codebook_size": CODES, "commitment_loss_weight": 0.25, "l2_normalized": True}
    args |= {
        "entropy_loss_temperature": 0.01,
        "entropy_loss_weight": 0.0,
        "stochastic": True,
        "stochastic_temperature": 0.03,
    }
    bottleneck = {"bottleneck_dim": CODE_DIM, "norm": "none", "regularizer": {"args": args, "name": "vq"}}
    config: dict[str, Any] = {"bottleneck": {"args": bottleneck, "name": "bottleneck"}, "bottleneck_token_num": TOKENS}
    for side, width in (("encoder", READS), ("decoder", PAINTS)):
        config |= {f"{side}_depth": LAYERS, f"{side}_hidden_size": width, f"{side}_name": "none", f"{side}_num_heads": HEADS}
    config |= {"decoder_patch_size": PATCH, "decoder_temporal_patch_size": DEPTH, "patch_size": PATCH}
    config |= {"temporal_patch_size": DEPTH, "encoder_query_gaussian_init": True, "frame_num": FRAMES, "in_channels": 3}
    config |= {"input_size": SIDE, "latent_pe_scale_factor": 10000, "query_init_std": 0.02}
    config |= {"transformer_name": "transformer_encoder_parallel", "learned_encoder_latent_query_embed": True}
    flags = ("learned_decoder_latent_pe", "learned_decoder_patch_query_embed", "learned_encoder_patch_pe")
    flags += ("use_decoder_latent_token_type_embed", "use_encoder_latent_query_token_type_embed")
    config |= dict.fromkeys((*flags, "use_encoder_patch_token_type_embed"), learned)
    config |= {"use_decoder_patch_query_token_type_embed": True}
    config |= {"prior_model": {"args": {"l2_normalized": True}, "name": "gptc-S", "n_rounds": 2}}
    return config | changes


def write_tokenizer(folder: Path, learned: bool = False, state: State | None = None, **config: Any) -> State:
    state = tokenizer_state(learned) if state is None else state
    write_weights(folder, state, shards=1)
    write_json(folder / "config.json", tokenizer_config(learned, **config))
    return state


def _layer(w: State, name: str, x: Tensor, bias: bool = True) -> Tensor:
    return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias else 0)


def _norm(w: State, name: str, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _blocks(w: State, side: str, x: Tensor) -> Tensor:
    """[n, D] through all layers; every slot attends to every other."""
    for i in range(LAYERS):
        name = f"{side}.blocks.{i}"
        q, k, v = _layer(w, f"{name}.attn.qkv", _norm(w, f"{name}.norm1", x, 1e-5), bias=False).chunk(3, dim=-1)
        dim, seen = x.shape[1] // HEADS, []
        for at in range(0, x.shape[1], dim):
            part = slice(at, at + dim)
            seen.append((q[:, part] @ k[:, part].T / math.sqrt(dim)).softmax(-1) @ v[:, part])
        x = x + _layer(w, f"{name}.attn.proj", torch.cat(seen, -1))
        h = _layer(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", x, 1e-5))
        x = x + _layer(w, f"{name}.mlp.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    return x


def _per_axis(w: State, side: str, width: int) -> Tensor:
    names = [f"{side}_h_embed", "encode_w_embed" if side == "encoder" else f"{side}_w_embed", f"{side}_t_embed"]
    return sum(w[name] for name in names).reshape(-1, width)  # type: ignore[union-attr]


def encode(state: State, clips: Tensor) -> Tensor:
    """Codes [B, N] of clips [B, 3, T, H, W] in [0, 1]."""
    w = {key: value.double() for key, value in state.items()}
    places = w["encoder_patch_pe"][0] if "encoder_patch_pe" in w else _per_axis(w, "encoder", READS)
    places = places + w.get("encoder_patch_token_type_embed", torch.zeros(1, 1, 1))[0]
    queries = w["encoder_latent_query_embed"] + w.get("encoder_latent_query_token_type_embed", torch.zeros(1, 1, 1))[0]
    found = []
    for clip in clips.double():
        cubes = clip.unfold(1, DEPTH, DEPTH).unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [3, t, h, w, 4, 8, 8]
        x = torch.einsum("cthwdij,ecdij->thwe", cubes, w["x_embedder.proj.weight"]).reshape(-1, READS)
        x = _blocks(w, "encoder", torch.cat([x + w["x_embedder.proj.bias"] + places, queries]))[-TOKENS:]
        z, codes = _layer(w, "bottleneck.in_linear", x), w["bottleneck.regularizer.embedding.weight"]
        z, codes = (v / v.norm(dim=-1, keepdim=True) for v in (z, codes))
        found.append((z[:, None] - codes).square().sum(-1).argmin(-1))
    return torch.stack(found)


def decode(state: State, ids: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W], nominally in [0, 1], of codes [B, N]."""
    w = {key: value.double() for key, value in state.items()}
    codes = w["bottleneck.regularizer.embedding.weight"]
    codes = codes / codes.norm(dim=-1, keepdim=True)
    places = w["decoder_latent_pe"][0] + w.get("decoder_latent_token_type_embed", torch.zeros(1, 1, 1))[0]
    queries = w["decoder_patch_query_embed"][0] if "decoder_patch_query_embed" in w else _per_axis(w, "decoder", PAINTS)
    queries = queries + w["decoder_patch_query_token_type_embed"][0]
    clips = torch.zeros(len(ids), 3, FRAMES, SIDE, SIDE, dtype=torch.float64)
    for clip, row in zip(clips, ids, strict=True):
        x = _blocks(w, "decoder", torch.cat([_layer(w, "bottleneck.out_linear", codes[row]) + places, queries]))
        x = _layer(w, "final_layer.linear", _norm(w, "final_layer.norm_final", x[-len(queries) :], 1e-6))
        for n, cube in enumerate(x.view(-1, DEPTH, PATCH, PATCH, 3)):
            t, rest = divmod(n, (SIDE // PATCH) ** 2)
            i, j = divmod(rest, SIDE // PATCH)
            where = (slice(t * DEPTH, (t + 1) * DEPTH), slice(i * PATCH, (i + 1) * PATCH), slice(j * PATCH, (j + 1) * PATCH))
            clip[(slice(None), *where)] = cube.permute(3, 0, 1, 2)
    return clips
