"""iVideoGPT in its own key layout, written from the published formulas: plain functions over a state dict, in float64.

Shares no code with ``arsd``, so that agreement of the two means something. Small and slow on purpose.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from published_files import State, write_json, write_weights
from reference_larp import Draw
from reference_llama import llama_state
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

CODES, CHANGES = 24, 20  # of context pictures and of later ones
WIDTHS, LATENT, PATCH, GROUPS = (32, 64), 4, 4, 32
SIZE = 16  # pixels; 8 x 8 latents, and 2 x 2 codes of a later picture
GRID, EACH = 8, 4
HEADS, WIDTH = 2, 32  # of the transformer
SCF, SDF = CODES + CHANGES, CODES + CHANGES + 1


# --------------------------------------------------------------------------------------------------------- writing folders


def tokenizer_config(context: int = 2, **changes: Any) -> dict[str, Any]:
    """As diffusers writes it for upstream's class."""
    config: dict[str, Any] = {"_class_name": "CompressiveVQModel", "_diffusers_version": "0.27.0", "act_fn": "silu"}
    config |= {"block_out_channels": list(WIDTHS), "context_length": context, "force_upcast": True, "in_channels": 3}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * len(WIDTHS), "latent_channels": LATENT, "layers_per_block": 1}
    config |= {"lookup_from_codebook": True, "max_att_resolution": 8, "mid_block_add_attention": False}
    config |= {"norm_num_groups": GROUPS, "norm_type": "group", "num_dyn_embeddings": CHANGES, "num_vq_embeddings": CODES}
    config |= {"out_channels": 3, "patch_size": PATCH, "resolution": SIZE, "sample_size": 32, "scaling_factor": 0.18215}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * len(WIDTHS), "vq_embed_dim": None}
    return config | changes


def tokenizer_state(config: dict[str, Any], seed: int = 0) -> State:
    """Random weights by upstream's keys."""
    draw, state = Draw(seed), {}
    widths, depth = config["block_out_channels"], config["layers_per_block"]
    size, context, largest = config["resolution"], config["context_length"], config["max_att_resolution"]
    side = size // 2 ** (len(widths) - 1)

    def layer(name: str, out: int, inside: int, kernel: int = 0) -> None:
        shape = (out, inside, kernel, kernel) if kernel else (out, inside)
        state[f"{name}.weight"] = draw(*shape, std=1.2 / (inside * max(kernel, 1) ** 2) ** 0.5)
        state[f"{name}.bias"] = draw(out, std=0.1)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width, std=0.2), draw(width, std=0.1)

    def residual(name: str, inside: int, out: int) -> None:
        norm(f"{name}.norm1", inside)
        layer(f"{name}.conv1", out, inside, 3)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3)
        if inside != out:
            layer(f"{name}.conv_shortcut", out, inside, 1)

    def middle(name: str, width: int, attends: bool) -> None:
        for i in (0, 1):
            residual(f"{name}.mid_block.resnets.{i}", width, width)
        if attends:
            norm(f"{name}.mid_block.attentions.0.group_norm", width)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                layer(f"{name}.mid_block.attentions.0.{part}", width, width)

    def cross(name: str, width: int, here: int) -> None:
        layer(f"{name}.att.out_proj", width, width)
        state[f"{name}.att.in_proj_weight"] = draw(3 * width, width)
        state[f"{name}.att.in_proj_bias"] = draw(3 * width, std=0.1)
        norm(f"{name}.kv_norm", width)
        norm(f"{name}.q_norm", width)
        state[f"{name}.kv_pos_emb"] = draw(context * here**2, width, std=0.5)
        state[f"{name}.q_pos_emb"] = draw(here**2, width, std=0.5)

    for name in ("encoder", "cond_encoder"):
        layer(f"{name}.conv_in", widths[0], 3, 3)
        inside, here, count = widths[0], size, 0
        for i, width in enumerate(widths):
            for j in range(depth):
                residual(f"{name}.down_blocks.{i}.resnets.{j}", inside, width)
                inside = width
            if i < len(widths) - 1:
                layer(f"{name}.down_blocks.{i}.downsamplers.0.conv", width, width, 3)
                here //= 2
            if name.startswith("cond") and here <= largest:
                cross(f"{name}.cross_att_blocks.{count}", width, here)
                count += 1
        middle(name, inside, name.startswith("cond") or config["mid_block_add_attention"])
        norm(f"{name}.conv_norm_out", inside)
        layer(f"{name}.conv_out", config["latent_channels"], inside, 3)
    for name in ("decoder", "cond_decoder"):
        inside, here, count = widths[-1], side, 1
        layer(f"{name}.conv_in", inside, config["latent_channels"], 3)
        middle(name, inside, name.startswith("cond") or config["mid_block_add_attention"])
        if name.startswith("cond"):
            cross(f"{name}.cross_att_blocks.0", inside, side)
        for i, width in enumerate(widths[::-1]):
            for j in range(depth + 1):
                residual(f"{name}.up_blocks.{i}.resnets.{j}", inside, width)
                inside = width
            if i < len(widths) - 1:
                layer(f"{name}.up_blocks.{i}.upsamplers.0.conv", width, width, 3)
                here *= 2
            if name.startswith("cond") and here <= largest:
                cross(f"{name}.cross_att_blocks.{count}", width, here)
                count += 1
        norm(f"{name}.conv_norm_out", inside)
        layer(f"{name}.conv_out", 3, inside, 3)
    latent, patch = config["latent_channels"], config["latent_channels"] * config["patch_size"] ** 2
    layer("quant_conv", latent, latent, 1)
    layer("post_quant_conv", latent, latent, 1)
    layer("quant_linear", latent, patch)
    layer("post_quant_linear", patch, latent)
    state["quantize.embedding.weight"] = draw(config["num_vq_embeddings"], latent, std=1.0)
    state["dynamics_quantize.embedding.weight"] = draw(config["num_dyn_embeddings"], latent, std=1.0)
    return state


def write_tokenizer(folder: Path, state: State | None = None, context: int = 2, **config: Any) -> State:
    folder.mkdir(parents=True, exist_ok=True)
    told = tokenizer_config(context, **config)
    state = tokenizer_state(told) if state is None else state
    write_json(folder / "config.json", told)
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return state


def write_folder(folder: Path, context: int = 2, actions: bool = False) -> dict[str, State]:
    """``tokenizer/`` and ``transformer/``."""
    state = llama_state(CODES + CHANGES + 2, WIDTH, 2, HEADS, HEADS, WIDTH // HEADS, 48, qk_norm=False)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 50256, "eos_token_id": 50256}
    config |= {"hidden_act": "silu", "hidden_size": WIDTH, "initializer_range": 0.02, "intermediate_size": 48}
    config |= {"max_length": 1024, "max_position_embeddings": 1024, "model_type": "llama", "num_attention_heads": HEADS}
    config |= {"num_hidden_layers": 2, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    config |= {"torch_dtype": "float32", "transformers_version": "4.38.2", "use_cache": True, "vocab_size": SDF + 1}
    published = state
    if actions:
        published = {f"llm.{key}": value for key, value in state.items()}
        published |= {"action_linear.weight": torch.zeros(WIDTH, 4), "action_linear.bias": torch.zeros(WIDTH)}
    write_weights(folder / "transformer", published, shards=1)
    write_json(folder / "transformer" / "config.json", config)
    return {"transformer": state, "tokenizer": write_tokenizer(folder / "tokenizer", context=context)}


# ------------------------------------------------------------------------------------------------------------ the networks


def _conv(w: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride, 0 if stride > 1 else weight.shape[-1] // 2)


def _norm(w: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.group_norm(x, GROUPS, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _residual(w: State, name: str, x: Tensor) -> Tensor:
    h = _conv(w, f"{name}.conv1", F.silu(_norm(w, f"{name}.norm1", x)))
    h = _conv(w, f"{name}.conv2", F.silu(_norm(w, f"{name}.norm2", h)))
    return h + (_conv(w, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x)


def _middle(w: State, name: str, x: Tensor) -> Tensor:
    x = _residual(w, f"{name}.mid_block.resnets.0", x)
    attention = f"{name}.mid_block.attentions.0"
    if f"{attention}.to_q.weight" in w:
        h = _norm(w, f"{attention}.group_norm", x).flatten(2).transpose(1, 2)
        q, k, v = (
            h @ w[f"{attention}.{part}.weight"].T + w[f"{attention}.{part}.bias"] for part in ("to_q", "to_k", "to_v")
        )
        h = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = h @ w[f"{attention}.to_out.0.weight"].T + w[f"{attention}.to_out.0.bias"]
        x = x + h.transpose(1, 2).reshape(x.shape)
    return _residual(w, f"{name}.mid_block.resnets.1", x)


def _cross(w: State, name: str, x: Tensor, context: Tensor) -> Tensor:
    """One picture [C, h, w] reads the context [c, C, h, w]; one head after another."""
    channels, (weight, bias) = len(x), (w[f"{name}.att.in_proj_{part}"] for part in ("weight", "bias"))
    tall = torch.cat(list(context), dim=1)[None]  # one above the other: normalised together
    kv = _norm(w, f"{name}.kv_norm", tall, 1e-5)[0].flatten(1).T + w[f"{name}.kv_pos_emb"]
    q = _norm(w, f"{name}.q_norm", x[None], 1e-5)[0].flatten(1).T + w[f"{name}.q_pos_emb"]
    rows = [slice(i * channels, (i + 1) * channels) for i in range(3)]
    q, k, v = (source @ weight[part].T + bias[part] for source, part in zip((q, kv, kv), rows, strict=True))
    seen, dim = [], channels // 4
    for at in range(0, channels, dim):
        own = slice(at, at + dim)
        seen.append((q[:, own] @ k[:, own].T / math.sqrt(dim)).softmax(-1) @ v[:, own])
    h = torch.cat(seen, 1) @ w[f"{name}.att.out_proj.weight"].T + w[f"{name}.att.out_proj.bias"]
    return F.silu(x + h.T.reshape(x.shape))


def _run(w: State, name: str, x: Tensor, context: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """One picture [3, H, W] or latents [z, h, w] through a network; also features [C, h, w] as the other networks read them.

    ``context`` are lists of such features, [c, C, h, w] each.
    """
    x, features, count = _conv(w, f"{name}.conv_in", x[None]), [], 0
    reads = name.endswith("encoder")
    attends = len({key.split(".")[2] for key in w if key.startswith(f"{name}.cross_att_blocks.")})

    def attend(x: Tensor, level: int) -> Tensor:
        nonlocal count
        key = f"{name}.cross_att_blocks.{count}"
        if context is None or f"{key}.q_pos_emb" not in w or len(w[f"{key}.q_pos_emb"]) != x.shape[-1] * x.shape[-2]:
            return x
        count += 1
        return _cross(w, key, x[0], context[level])[None]

    if not reads:
        x = attend(_middle(w, name, x), 0)
        features.append(x[0])
    blocks, i = f"{name}.{'down' if reads else 'up'}_blocks", 0
    while f"{blocks}.{i}.resnets.0.conv1.weight" in w:
        j = 0
        while f"{blocks}.{i}.resnets.{j}.conv1.weight" in w:
            x = _residual(w, f"{blocks}.{i}.resnets.{j}", x)
            j += 1
        if f"{blocks}.{i}.downsamplers.0.conv.weight" in w:  # padded at the right and the bottom only
            x = _conv(w, f"{blocks}.{i}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{blocks}.{i}.upsamplers.0.conv.weight" in w:
            x = _conv(w, f"{blocks}.{i}.upsamplers.0.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2))
        i += 1
        x = attend(x, i - reads)
        features.append(x[0])
    x = _middle(w, name, x) if reads else x
    assert count == attends
    return _conv(w, f"{name}.conv_out", F.silu(_norm(w, f"{name}.conv_norm_out", x)))[0], features


def _context(found: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(level) for level in zip(*found, strict=True)]


def encode(state: State, clip: Tensor, context: int, patch: int = PATCH) -> list[int]:
    """Upstream's token ids of a clip [T, 3, H, W] in [0, 1], marks included."""
    w = {key: value.double() for key, value in state.items()}
    codes, changes = w["quantize.embedding.weight"], w["dynamics_quantize.embedding.weight"]
    tokens: list[int] = []
    found = [_run(w, "encoder", frame) for frame in clip[:context].double()]
    for latents, _ in found:
        z = _conv(w, "quant_conv", latents[None])[0].flatten(1).T
        ids = (z[:, None] - codes).square().sum(-1).argmin(-1)
        tokens += ([len(codes) + len(changes)] if tokens else []) + ids.tolist()
    features = _context([kept for _, kept in found])
    for frame in clip[context:].double():
        d, _ = _run(w, "cond_encoder", frame, features)
        tokens.append(len(codes) + len(changes) + 1)
        for i in range(0, d.shape[1], patch):
            for j in range(0, d.shape[2], patch):
                cut = d[:, i : i + patch, j : j + patch].permute(1, 2, 0).flatten()
                z = cut @ w["quant_linear.weight"].T + w["quant_linear.bias"]
                tokens.append(len(codes) + int((z - changes).square().sum(-1).argmin()))
    return tokens


def decode(state: State, tokens: list[int], context: int, side: int = GRID, patch: int = PATCH) -> Tensor:
    """Clip [T, 3, H, W], nominally in [0, 1], of upstream's token ids, marks included."""
    w = {key: value.double() for key, value in state.items()}
    codes, changes = w["quantize.embedding.weight"], w["dynamics_quantize.embedding.weight"]
    rows, at, each = side // patch, 0, (side // patch) ** 2
    found, frames = [], []
    for _ in range(context):
        ids = tokens[at : at + side**2]
        at += side**2 + 1
        z = codes[ids].T.reshape(-1, side, side)
        found.append(_run(w, "decoder", _conv(w, "post_quant_conv", z[None])[0]))
    frames = [picture for picture, _ in found]
    features = _context([kept for _, kept in found])
    while at + each <= len(tokens):
        d = torch.zeros(w["quant_conv.weight"].shape[1], side, side, dtype=torch.float64)
        for n, number in enumerate(tokens[at : at + each]):
            values = changes[number - len(codes)] @ w["post_quant_linear.weight"].T + w["post_quant_linear.bias"]
            i, j = patch * (n // rows), patch * (n % rows)
            d[:, i : i + patch, j : j + patch] = values.view(patch, patch, -1).permute(2, 0, 1)
        frames.append(_run(w, "cond_decoder", d, features)[0])
        at += each + 1
    return torch.stack(frames)
