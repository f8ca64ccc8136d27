"""Tiny files in MineWorld's layout, and what they compute: the Llama of :mod:`reference_llama`, taming's VQGAN."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import reference_llama
import reference_vqgan
import torch
from published_files import State, write_json
from torch import Tensor

CODES, ACTIONS, LENGTH = 32, 70, 11
VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN = CODES + ACTIONS, 32, 2, 4, 2, 48
FRAMES, GRID = 4, (2, 3)
OPTIONS: dict[str, Any] = {"num_heads": HEADS, "frames": FRAMES, "grid": GRID}
_RENAMES = (  # taming's keys to those of diffusers; the levels of the decoder are counted the other way round
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def llama_state(seed: int = 0) -> State:
    """By transformers' keys; laws over the codes are far from uniform, and ids of actions would be drawn if they could."""
    sizes = (VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, WIDTH // HEADS, HIDDEN, False)
    state = reference_llama.llama_state(*sizes, seed=seed)
    state["lm_head.weight"] = state["lm_head.weight"] * 3
    return state


def logits(state: State, ids: Tensor) -> Tensor:
    """[T, V] of the tokens behind each of the ids [T], in float64."""
    return reference_llama.logits(state, ids, HEADS, KV_HEADS, theta=10000.0)


def vae_state(
    mid: bool = False, mult: tuple[int, ...] = (1, 1, 1, 1, 2), attention: tuple[int, ...] = (), seed: int = 0
) -> State:
    """By taming's keys; without ``mid`` its attention in the middle adds nothing, which is what none would do."""
    state = reference_vqgan.vqgan_state(mult=mult, blocks=1, attention=attention, z=8, dim=8, codes=CODES, seed=seed)
    for side in () if mid else ("encoder", "decoder"):
        for part in ("weight", "bias"):
            state[f"{side}.mid.attn_1.proj_out.{part}"] = torch.zeros_like(state[f"{side}.mid.attn_1.proj_out.{part}"])
    return state


def of_diffusers(state: State, mid: bool = False) -> State:
    """The same by diffusers' keys and in its shapes; without ``mid`` there is no attention in the middle at all."""
    top = max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    found = {}
    for key, value in state.items():
        if ".mid.attn_1." in key and not mid:
            continue
        key = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{top - int(match[1])}.", key)
        for old, new in _RENAMES:
            key = re.sub(old, new, key)
        found[key] = value[..., 0, 0] if ".attentions." in key and value.ndim == 4 else value
    return found


def vae_config(**more: Any) -> dict[str, Any]:
    """``vae/config.json`` as aMUSEd's, from which MineWorld's tokenizer comes."""
    sizes = {"block_out_channels": [32, 32, 32, 32, 64], "layers_per_block": 1, "latent_channels": 8}
    rest = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_num_groups": 32, "norm_type": "group"}
    rest |= {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
    flags = {"lookup_from_codebook": True, "mid_block_add_attention": False, "force_upcast": True, "vq_embed_dim": None}
    return {"_class_name": "VQModel", "num_vq_embeddings": CODES} | sizes | rest | flags | more


def write_vae(folder: Path, state: State, mid: bool = False) -> None:
    """``vae.ckpt`` with what its training leaves in it, and ``config.json``."""
    published = {f"model.{key}": value for key, value in of_diffusers(state, mid).items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"state_dict": published | {"loss.logvar": torch.zeros(()), "perceptual.w": torch.zeros(3)}}, folder / "vae.ckpt"
    )
    write_json(folder / "config.json", vae_config(mid_block_add_attention=mid))


def write_mineworld(folder: Path, name: str = "5M_4f.ckpt", vae: bool = True) -> tuple[State, State]:
    """A model's file and ``vae/``; returns the Llama's tensors by transformers' keys and the tokenizer's by taming's."""
    state, tokenizer = llama_state(), vae_state()
    published = {f"transformer.{key}": value for key, value in state.items()}
    if vae:
        published |= {f"tokenizer.model.{key}": value for key, value in of_diffusers(tokenizer).items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": published, "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.4.0", "loops": {}}
    torch.save(content, folder / name)
    write_vae(folder / "vae", tokenizer)
    return state, tokenizer
