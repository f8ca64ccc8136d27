"""Published LlamaGen weight files (arXiv 2406.06525), transformer and VQ tokenizer, read and written in their own layout.

The files carry no config: everything but the grid, and the heads of sizes that were never published, follows from
tensor shapes. A folder of the hub (upstream's ``TransformerHF`` and ``VQModelHF``) holds the same keys, and a
``config.json`` that tells the rest. Upstream fuses q, k and v and rotates interleaved channel pairs; here the fused
matrix is split and the rows of q and k are reordered, which leaves every attention score as it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arsd.errors import CheckpointError, InputError
from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.rotary import GridRotaryTable
from arsd.models.weight_files import (
    check_keys,
    check_tensors,
    count_indices,
    keys_of,
    read_state_dict,
    shape_of,
    to_half,
    to_interleaved,
    write_state_dict,
)
from arsd.tokenizers.vq import VQTokenizer

Layout = dict[str, tuple[str, ...]]  # upstream key -> our parameters, whose rows stacked make the upstream tensor

PUBLISHED_HEADS = {
    (768, 12): 12,  # B
    (1024, 24): 16,  # L
    (1280, 36): 20,  # XL
    (1536, 48): 24,  # XXL
    (2560, 48): 40,  # XXXL
    (2048, 22): 32,  # 1B
    (3200, 24): 32,  # 3B
    (4096, 32): 32,  # 7B
}
"""Attention heads of the published sizes by (width, layers)."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder of the hub; the first one there is read."""

_CLASS_TABLE = "cls_embedding.embedding_table.weight"
_NULL_CAPTION = "cls_embedding.uncond_embedding"
STEM_KEYS = {
    "tok_embeddings.weight": "lm.model.embed_tokens.weight",
    "norm.weight": "lm.model.norm.weight",
    "output.weight": "lm.lm_head.weight",
}
_TEXT_KEYS = {
    _NULL_CAPTION: "uncond_embedding",
    "cls_embedding.cap_proj.fc1.weight": "caption_projection.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "caption_projection.fc2.weight",
}
LAYER_KEYS = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_VQ_RENAMES = (
    (".down.", ".conv_blocks."),
    (".up.", ".conv_blocks."),  # both lists start at the lowest resolution
    (".block.", ".res."),
    (".mid.block_1.", ".mid.0."),
    (".mid.attn_1.", ".mid.1."),
    (".mid.block_2.", ".mid.2."),
)
_CONFIG_NUMBERS: dict[str, Any] = {"block_size": int, "n_head": int, "rope_base": (int, float), "norm_eps": (int, float)}
_CONFIG_SIZES = {"dim": "hidden_size", "n_layer": "num_layers", "vocab_size": "vocab_size"}
_CODES_USED = "quantize.codebook_used"  # training statistics, which upstream insists on when it loads a VQ file


def transformer_config(
    state: Mapping[str, Tensor], path: str | Path, *, grid: int | None = None, num_heads: int | None = None
) -> dict[str, Any]:
    """Arguments of :class:`LlamaGenTransformer` for the upstream tensors ``state`` of the file ``path``.

    Only shapes are looked at; ``grid`` and ``num_heads`` are those of :func:`load_transformer`.

    Raises:
        CheckpointError: when a tensor that tells a size is missing or odd, or the heads are unknown or do not fit.
        InputError: for a grid below 1.
    """
    vocab_size, width = shape_of(state, "tok_embeddings.weight", 2, path)
    layers = count_indices(state, r"layers\.(\d+)\.")
    heads = num_heads or PUBLISHED_HEADS.get((width, layers))
    if heads is None:
        raise CheckpointError(f"{path}: width {width} with {layers} layers is no published size: say num_heads=...")
    if heads < 1 or width % (4 * heads):
        raise CheckpointError(f"{path}: width {width} is no multiple of 4 * {heads} heads: give the right num_heads")
    rows = shape_of(state, "layers.0.attention.wqkv.weight", 2, path)[0]
    kv_heads, rest = divmod(rows - width, 2 * (width // heads))
    if rest or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(f"{path}: wqkv with {rows} rows does not fit {heads} heads: give the right num_heads")
    grid = _grid_of_name(Path(path).name) if grid is None else grid
    if grid < 1:
        raise InputError(f"grid must be at least 1, not {grid}")
    config: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "intermediate_size": shape_of(state, "layers.0.feed_forward.w1.weight", 2, path)[0],
        "num_key_value_heads": None if kv_heads == heads else kv_heads,
        "grid": grid,
    }
    if _CLASS_TABLE in state:
        return config | {"condition": "class", "num_classes": shape_of(state, _CLASS_TABLE, 2, path)[0] - 1}
    slots, caption_dim = shape_of(state, _NULL_CAPTION, 2, path)
    return config | {"condition": "text", "condition_tokens": slots, "caption_dim": caption_dim}


def load_transformer(
    path: str | Path, *, grid: int | None = None, num_heads: int | None = None, dtype: torch.dtype | None = None
) -> LlamaGenTransformer:
    """Load an upstream LlamaGen transformer, class- or text-conditional, in evaluation mode on the CPU.

    Args:
        path: ``.pt``/``.pth`` or ``.safetensors`` file, see :func:`read_state_dict`, or a folder of the hub.
        grid: tokens along one side, which the weights do not tell. By default the ``config.json`` of a folder does (its
            ``block_size``), else the file name: ``_256``, ``_384`` or ``_512`` is the side of the picture in pixels, 16
            pixels make a token, or 8 if the name contains ``ds8``. A name without a size counts as 256 pixels (so 16
            tokens), class or text.
        num_heads: attention heads; needed unless ``config.json`` tells, or width and layers are those of a published size
            (:data:`PUBLISHED_HEADS`).
        dtype: dtype of all parameters; by default that of the token embedding in the file. The rotary table stays in
            float32.

    Raises:
        CheckpointError: when the file cannot be read, lacks keys, has other keys (``freqs_cis`` and ``*.kv_cache.*``
            are ignored), a shape does not fit, or ``config.json`` is not that of the weights.
        InputError: for a grid below 1.
    """
    path, notes = _located(Path(path))
    state = {k: v for k, v in read_state_dict(path).items() if k != "freqs_cis" and ".kv_cache." not in k}
    told = _config_numbers(notes, path)
    grid = math.isqrt(told["block_size"]) if grid is None and "block_size" in told else grid
    config = transformer_config(state, path, grid=grid, num_heads=num_heads or told.get("n_head"))
    _check_config(notes, {theirs: config[ours] for theirs, ours in _CONFIG_SIZES.items()}, path)
    config |= {name: told[name] for name in ("rope_base", "norm_eps") if name in told}
    with torch.device("meta"):
        model = LlamaGenTransformer(**config)
    layout = _transformer_layout(config["num_layers"], config["condition"])
    _check(state, layout, model, path)
    _assign(model, state, layout, dtype or state["tok_embeddings.weight"].dtype, config["num_heads"])
    table: Any = model.lm.model.rotary_emb  # in no file, so still on the meta device
    model.lm.model.rotary_emb = GridRotaryTable(table.prefix, table.grid, table.head_dim, table.base)
    return model.eval()


def save_transformer(model: LlamaGenTransformer, path: str | Path) -> None:
    """Write ``model`` in the upstream layout; the exact inverse of :func:`load_transformer`, bit for bit.

    The file is ``{"model": state_dict}``, or flat if ``path`` ends in ``.safetensors``. It replaces an older one only
    when it is complete. Grid and heads are not part of the layout: name or remember them for loading.

    Raises:
        InputError: for a model with ``condition_keys``, which upstream does not have.
    """
    if model.config["condition_keys"]:
        raise InputError("upstream models have no condition_keys: use save_pretrained")
    ours = model.state_dict()
    heads = model.config["num_heads"]
    kv_heads = model.config["num_key_value_heads"] or heads
    state = {}
    for key, names in _transformer_layout(model.config["num_layers"], model.config["condition"]).items():
        parts = [ours[name].detach().cpu() for name in names]
        if len(parts) == 3:
            parts = [to_interleaved(parts[0], heads), to_interleaved(parts[1], kv_heads), parts[2]]
        state[key] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    write_state_dict(state, path, "model")


def vq_config(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Arguments of :class:`VQTokenizer` for the upstream tensors ``state`` (shapes only) of the file ``path``.

    Raises:
        CheckpointError: when a tensor that tells a size is missing, or the channels are no multiples as they must be.
    """
    codes, code_dim = shape_of(state, "quantize.embedding.weight", 2, path)
    base = shape_of(state, "encoder.conv_in.weight", 4, path)[0]
    levels = count_indices(state, r"encoder\.conv_blocks\.(\d+)\.")
    channels = [shape_of(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4, path)[0] for i in range(levels)]
    if not channels or base % 32 or any(count % base for count in channels):
        raise CheckpointError(
            f"{path}: encoder channels {[base, *channels]} are no LlamaGen tokenizer's: give a vq_*.pt file"
        )
    return {
        "codebook_size": codes,
        "codebook_dim": code_dim,
        "latent_channels": shape_of(state, "encoder.conv_out.weight", 4, path)[0],
        "base_channels": base,
        "channel_multiplier": tuple(count // base for count in channels),
        "num_res_blocks": count_indices(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
    }


def load_vq(source: str | Path | Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> VQTokenizer:
    """Load an upstream VQ tokenizer (``vq_ds16_c2i.pt`` and its siblings) in evaluation mode on the CPU.

    Args:
        source: ``.pt``/``.pth`` or ``.safetensors`` file, see :func:`read_state_dict`, or a folder of the hub; or tensors by
            upstream's keys or those of transformers' ``JanusVQVAE``. They are copied.
        dtype: dtype of all parameters, by default that of the codebook in the file.

    Raises:
        CheckpointError: when the file cannot be read, lacks keys, has other keys (``quantize.codebook_used`` is
            dropped), a shape does not fit, or ``config.json`` is not that of the weights.
    """
    path: str | Path = "the image tokenizer"
    notes: dict[str, Any] = {}
    if isinstance(source, Mapping):
        tensors = {_upstream_vq(key): value for key, value in source.items()}
    else:
        path, notes = _located(Path(source))
        tensors = read_state_dict(path)
    state = {key: value for key, value in tensors.items() if key != _CODES_USED}
    config = vq_config(state, path)
    sizes = {"codebook_size": config["codebook_size"], "codebook_embed_dim": config["codebook_dim"]}
    _check_config(notes, sizes | {"codebook_l2_norm": True}, Path(path))
    with torch.device("meta"):
        tokenizer = VQTokenizer(**config)
    layout = _vq_layout(tokenizer)
    _check(state, layout, tokenizer, path)
    _assign(tokenizer, state, layout, dtype or state["quantize.embedding.weight"].dtype)
    return tokenizer.eval()


def save_vq(vq: VQTokenizer, path: str | Path) -> None:
    """Write ``vq`` in the upstream layout; the exact inverse of :func:`load_vq`, bit for bit.

    The container is that of :func:`save_transformer`. An empty ``quantize.codebook_used`` goes with it, because
    upstream loads the file strictly.
    """
    if (vq.config["norm_groups"], vq.config["patch_size"]) != (32, 1):
        raise InputError("the published layout has norm_groups 32 and patch_size 1: use save_pretrained")
    ours = vq.state_dict()
    state = {key: ours[name].detach().cpu().contiguous() for key, (name,) in _vq_layout(vq).items()}
    write_state_dict(state | {_CODES_USED: torch.zeros(65536)}, path, "model")


def llamagen_kind(path: str | Path) -> Literal["transformer", "vq"] | None:
    """Which LlamaGen weights a file or a folder of the hub holds, by its keys alone; ``None`` for any others.

    Reads no more of the weights than their names, unless the file is a pickle from before torch 1.6.

    Raises:
        CheckpointError: when there is no such path, or the file cannot be read.
    """
    path = Path(path)
    if path.is_dir() and not _hub_files(path):
        return None
    keys = keys_of(_hub_files(path)[0] if path.is_dir() else path)
    if "layers.0.attention.wqkv.weight" in keys and any(key.startswith("cls_embedding.") for key in keys):
        return "transformer"
    if "quantize.embedding.weight" in keys and any(key.startswith("encoder.conv_blocks.") for key in keys):
        return "vq"
    return None


def _hub_files(folder: Path) -> list[Path]:
    return [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]


def _located(path: Path) -> tuple[Path, dict[str, Any]]:
    """The weight file that ``path`` is or holds, and the content of the ``config.json`` beside a hub's file."""
    if path.is_dir():
        if not _hub_files(path):
            wanted = " or ".join(WEIGHT_FILES)
            raise CheckpointError(f"{path} is not a file and holds no {wanted}: give a weight file (or use from_pretrained)")
        path = _hub_files(path)[0]
    notes = path.with_name("config.json")
    if path.name not in WEIGHT_FILES or not notes.is_file():
        return path, {}
    try:
        values = json.loads(notes.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{notes} is no readable JSON: repair it, or move the weights elsewhere") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{notes} holds no JSON object: repair it, or move the weights elsewhere")
    return path, values


def _config_numbers(notes: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the ``config.json`` of a transformer tells that its weights do not, as far as it does."""
    told = {name: notes[name] for name in _CONFIG_NUMBERS if notes.get(name) is not None}
    for name, value in told.items():
        number = isinstance(value, _CONFIG_NUMBERS[name]) and not isinstance(value, bool) and 0 < value < math.inf
        if not number or (name == "block_size" and math.isqrt(value) ** 2 != value):
            raise CheckpointError(f"{path.with_name('config.json')}: {name} cannot be {value!r}: repair the file")
    return told


def _check_config(notes: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Check that the weights are those that a ``config.json`` speaks of."""
    for name, value in found.items():
        if notes.get(name) not in (None, value):
            file = path.with_name("config.json")
            raise CheckpointError(f"{file}: {name} is {notes[name]!r}, but {value} in the weights: give their own")


def _grid_of_name(name: str) -> int:
    size = re.search(r"_(256|384|512)(?!\d)", name)
    return int(size[1] if size else 256) // (8 if "ds8" in name else 16)


def _transformer_layout(layers: int, condition: str) -> Layout:
    condition_keys = {_CLASS_TABLE: "class_embedding.weight"} if condition == "class" else _TEXT_KEYS
    layout: Layout = {key: (name,) for key, name in (STEM_KEYS | condition_keys).items()}
    for i in range(layers):
        theirs, mine = f"layers.{i}.", f"lm.model.layers.{i}."
        layout[theirs + "attention.wqkv.weight"] = tuple(f"{mine}self_attn.{part}_proj.weight" for part in "qkv")
        layout |= {theirs + key: (mine + name,) for key, name in LAYER_KEYS.items()}
    return layout


def _vq_layout(vq: VQTokenizer) -> Layout:
    return {_upstream_vq(name.removeprefix("net.")): (name,) for name in vq.state_dict()}


def _upstream_vq(key: str) -> str:
    for mine, theirs in _VQ_RENAMES:
        key = key.replace(mine, theirs)
    return key


def _check(state: Mapping[str, Tensor], layout: Layout, model: nn.Module, path: str | Path) -> None:
    check_keys(state, layout, path, "LlamaGen")
    ours = model.state_dict()
    parts = {key: [ours[name] for name in names] for key, names in layout.items()}
    shapes = {key: [sum(map(len, tensors)), *tensors[0].shape[1:]] for key, tensors in parts.items()}
    check_tensors(state, shapes, path)


def _assign(model: nn.Module, state: dict[str, Tensor], layout: Layout, dtype: torch.dtype, heads: int = 1) -> None:
    """Move ``state`` into a meta ``model``, copying each tensor once and dropping it from ``state`` as it goes."""
    ours = model.state_dict()
    copies = {}
    for key, names in layout.items():
        parts = state.pop(key).detach().split([len(ours[name]) for name in names])
        if len(parts) == 3:
            kv_heads = heads * len(parts[1]) // len(parts[0])
            parts = (to_half(parts[0], heads), to_half(parts[1], kv_heads), parts[2])
        for name, part in zip(names, parts, strict=True):
            copies[name] = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(copies, assign=True)
