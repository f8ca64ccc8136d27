"""Published files of MineWorld (arXiv 2504.08388): ``*.ckpt`` of the models, and ``vae.ckpt`` of the tokenizer they share.

A model's file is a lightning checkpoint whose ``state_dict`` has a stock Llama under ``transformer.`` and, because
Microsoft's program insists on it, the tokenizer under ``tokenizer.``. That is a ``VQModel`` of diffusers under ``model.``,
in ``vae.ckpt`` as well. Neither carries a configuration: sizes follow from shapes, the heads from the published sizes, and
how many frames a clip has from the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsd.errors import CheckpointError, InputError
from arsd.models.folders import config_of
from arsd.models.mineworld import ACTION_IDS, SAMPLING, MineWorldTransformer
from arsd.models.weight_files import (
    check_keys,
    check_tensors,
    count_indices,
    read_state_dict,
    shape_of,
    write_state_dict,
)
from arsd.tokenizers.amused import AmusedTokenizer

PUBLISHED_HEADS = {(1024, 20): 16, (2048, 20): 32}
"""Attention heads of the published sizes (300M; 700M and 1200M) by (width, layers)."""

VAE_FILES = ("vae.ckpt", "vae.safetensors")
"""Names of the tokenizer in its folder; the first one there is read."""

_MODEL, _VAE, _NET = "transformer.", "tokenizer.", "model."
_FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_num_groups": 32, "norm_type": "group"}


def mineworld_kind(path: str | Path) -> str | None:
    """``"mineworld"`` for a model's file, ``"mineworld-vae"`` for the tokenizer's, or ``None`` for any other.

    Reads no more of the weights than their names.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        return None
    keys = read_state_dict(path)
    if {"transformer.model.embed_tokens.weight", "transformer.lm_head.weight"} <= keys.keys():
        return "mineworld"
    return "mineworld-vae" if {"model.quantize.embedding.weight", "model.encoder.conv_in.weight"} <= keys.keys() else None


def load_transformer(
    path: str | Path,
    *,
    frames: int | None = None,
    grid: tuple[int, int] = (14, 24),
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
) -> MineWorldTransformer:
    """Load a published model in evaluation mode on the CPU; each tensor is copied once, out of a mapped file.

    Args:
        path: ``*.ckpt``, or whatever :func:`arsd.models.weight_files.read_state_dict` reads.
        frames: of a clip, at most; by default what the file's name says (``_16f``, ``_32f``), else 16.
        grid: rows and columns of codes of a frame.
        num_heads: attention heads; needed unless width and layers are those of a published size
            (:data:`PUBLISHED_HEADS`).
        dtype: dtype of all parameters; by default that of the token embedding in the file.

    Raises:
        CheckpointError: when the file cannot be read, lacks keys, has other keys below ``transformer.``, a shape does not
            fit, or the heads are unknown.
        InputError: for an argument out of range.
    """
    named = re.search(r"_(\d{1,3})f(?![a-z0-9])", Path(path).name)
    frames = frames if frames is not None else int(named[1]) if named else 16
    for name, value in (("frames", frames), *zip(("rows", "columns"), grid, strict=True)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number above 0, not {value!r}")
    state = _below(read_state_dict(path), _MODEL)
    config = transformer_config(state, path, num_heads) | {"frames": frames, "rows": grid[0], "columns": grid[1]}
    with torch.device("meta"):
        model = MineWorldTransformer(**config)
    _assign(model, state, "lm.", "MineWorld", path, dtype or state["model.embed_tokens.weight"].dtype)
    fresh: Any = type(model.lm.model.rotary_emb)(model.lm.config)  # in no file, so the network's own is on the meta device
    model.lm.model.rotary_emb = fresh
    return model.eval()


def transformer_config(state: Mapping[str, Tensor], path: str | Path, num_heads: int | None = None) -> dict[str, Any]:
    """Arguments of :class:`MineWorldTransformer` for the tensors below ``transformer.`` (shapes only) of the file ``path``.

    Raises:
        CheckpointError: when a tensor that tells a size is missing or odd, or the heads are unknown or do not fit.
    """
    vocab_size, width = shape_of(state, "model.embed_tokens.weight", 2, path)
    layers = count_indices(state, r"model\.layers\.(\d+)\.")
    heads = num_heads or PUBLISHED_HEADS.get((width, layers))
    if heads is None:
        raise CheckpointError(f"{path}: width {width} with {layers} layers is no published size: say num_heads=...")
    rows = shape_of(state, "model.layers.0.self_attn.k_proj.weight", 2, path)[0]
    if heads < 1 or width % (2 * heads) or not rows or rows % (width // heads) or heads % (rows // (width // heads)):
        raise CheckpointError(f"{path}: width {width} and keys of {rows} channels do not fit {heads} heads: give num_heads")
    if vocab_size <= ACTION_IDS:
        raise CheckpointError(f"{path}: {vocab_size} ids are no more than those of actions: give a file of MineWorld")
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_key_value_heads": rows // (width // heads),
        "intermediate_size": shape_of(state, "model.layers.0.mlp.gate_proj.weight", 2, path)[0],
        "sampling": dict(SAMPLING),
    }


def save_transformer(model: MineWorldTransformer, path: str | Path, vq: AmusedTokenizer | None = None) -> None:
    """Write ``model`` in the upstream layout; the exact inverse of :func:`load_transformer`, bit for bit.

    Args:
        model: the network.
        path: the file is ``{"state_dict": ...}``, or flat if this ends in ``.safetensors``. It replaces an older one only
            when it is complete.
        vq: the tokenizer, which goes into the file where it is given; Microsoft's program wants it there.
    """
    state = {key.replace("lm.", _MODEL, 1): value.detach().cpu() for key, value in model.state_dict().items()}
    if vq is not None:
        state |= {_VAE + key: value for key, value in _published(vq).items()}
    write_state_dict({key: value.contiguous() for key, value in state.items()}, path, "state_dict")


def load_vae(source: str | Path, *, dtype: torch.dtype | None = None) -> AmusedTokenizer:
    """Load the published tokenizer in evaluation mode on the CPU.

    Args:
        source: ``vae.ckpt``, the folder that holds it, or a model's file, which has the tokenizer in it.
        dtype: dtype of all parameters; by default that of the codebook in the file.

    Raises:
        CheckpointError: when the file cannot be read, lacks keys or has other keys below ``model.`` (others are those of the
            training, and dropped), a shape does not fit, or ``config.json`` is that of another network.
    """
    path = Path(source)
    if path.is_dir():
        found = next((path / name for name in VAE_FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} holds no {' or '.join(VAE_FILES)}: give MineWorld's folder vae/, or the file")
        path = found
    notes = config_of(path.parent) if path.name in VAE_FILES else {}
    odd = next((name for name, value in _FIXED.items() if notes.get(name, value) != value), None)
    if odd is not None:
        raise CheckpointError(f"{path}: {odd} {notes[odd]!r} in config.json is not supported: give MineWorld's tokenizer")
    state = read_state_dict(path)
    if any(key.startswith(_VAE) for key in state):
        state = _below(state, _VAE)
    elif any(key.startswith(_MODEL) for key in state):
        raise CheckpointError(f"{path} is a model without its tokenizer: give vq=..., vae.ckpt")
    state = _below(state, _NET) if any(key.startswith(_NET) for key in state) else state
    config = vae_config(state, path)
    with torch.device("meta"):
        tokenizer = AmusedTokenizer(**config)
    _assign(tokenizer, state, "net.", "MineWorld's tokenizer", path, dtype or state["quantize.embedding.weight"].dtype)
    return tokenizer.eval()


def vae_config(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Arguments of :class:`AmusedTokenizer` for the tensors of diffusers' network (shapes only) of the file ``path``.

    Raises:
        CheckpointError: when a tensor that tells a size is missing or odd.
    """
    codes, code_dim = shape_of(state, "quantize.embedding.weight", 2, path)
    levels = range(count_indices(state, r"encoder\.down_blocks\.(\d+)\."))
    widths = [shape_of(state, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4, path)[0] for i in levels]
    if not widths or any(width < 32 or width % 32 for width in widths):
        raise CheckpointError(f"{path}: encoder channels {widths} are no VQModel's of MineWorld: give its vae.ckpt")
    return {
        "codebook_size": codes,
        "codebook_dim": code_dim,
        "latent_channels": shape_of(state, "encoder.conv_out.weight", 4, path)[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": count_indices(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "attention_levels": tuple(i for i in levels if f"encoder.down_blocks.{i}.attentions.0.to_q.weight" in state),
        "mid_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
    }


def holds_vae(path: str | Path) -> bool:
    """Whether a model's file has its tokenizer in it."""
    return any(key.startswith(_VAE) for key in read_state_dict(path))


def save_vae(tokenizer: AmusedTokenizer, path: str | Path) -> None:
    """Write ``tokenizer`` in the upstream layout; the exact inverse of :func:`load_vae`, bit for bit.

    The file is ``{"state_dict": ...}``, or flat if ``path`` ends in ``.safetensors``.
    """
    write_state_dict(_published(tokenizer), path, "state_dict")


def _published(tokenizer: AmusedTokenizer) -> dict[str, Tensor]:
    state = tokenizer.state_dict().items()
    return {key.replace("net.", _NET, 1): value.detach().cpu().contiguous() for key, value in state}


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _assign(
    module: nn.Module, state: dict[str, Tensor], prefix: str, kind: str, path: str | Path, dtype: torch.dtype
) -> None:
    """Copies of ``state`` into a module on the meta device, whose keys are the same behind ``prefix``."""
    ours = {key.removeprefix(prefix): value.shape for key, value in module.state_dict().items()}
    check_keys(state, ours, path, kind)
    check_tensors(state, ours, path)
    copies = {}
    for key in ours:
        copies[prefix + key] = state.pop(key).detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    module.load_state_dict(copies, assign=True)
