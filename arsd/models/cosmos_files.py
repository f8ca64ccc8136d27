"""Published weights of Cosmos-Predict1's autoregressive base models, 4B and 12B (arXiv 2501.03575), read and written.

A folder holds ``model.pt`` (``{"model": state_dict}`` or flat, keys with or without ``model.`` in front) and
``config.json``. Shapes tell all sizes but the grid, the base of the rotary table and how it is stretched (YaRN). What
NVIDIA's code knows of these by the name of the model is known here by its width and depth. The Video2World models (5B and
13B) read text through cross-attention, which this network does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.cosmos import CosmosTransformer
from arsd.models.folders import config_of, first_file
from arsd.models.weight_files import (
    check_keys,
    check_tensors,
    count_indices,
    keys_of,
    read_state_dict,
    shape_of,
    write_state_dict,
)

PUBLISHED_YARN: dict[tuple[int, int], float | None] = {
    (4096, 16): None,  # 4B
    (5120, 40): 2.0,  # 12B
}
"""How far the rotary frequencies of the published sizes are stretched, by (width, layers)."""

SAMPLING = {"top_p": 0.8, "temperature": 1.0}
"""What NVIDIA's programs sample with; there is no guidance."""

GRID = (5, 40, 64)
"""Latent frames, rows and columns of all published models: 33 frames of 640 x 1024 pixels."""

WEIGHT_FILES = ("model.pt", "model.safetensors")
"""Names of the weights in a published folder; the first one there is read."""

_STEM_KEYS = {
    "tok_embeddings.weight": "lm.model.embed_tokens.weight",
    "norm.weight": "lm.model.norm.weight",
    "output.weight": "lm.lm_head.weight",
}
_LAYER_KEYS = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_TOLD = {"rope_theta": "rope_base", "norm_eps": "norm_eps"}  # in config.json, but not in the weights: NVIDIA's name to ours
_YARN = {
    "yarn_scale": "yarn_scale",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}  # where apply_yarn says so
_SIZES = {  # numbers in config.json that the weights tell, too
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
}
_SHAPES = {"video_latent_shape": "grid", "original_latent_shape": "original"}
_ALWAYS = {"rope_dim": "3D", "apply_abs_pos_emb": False, "pytorch_rope_version": "v2"}
_CROSS = "cross_attention"


def cosmos_kind(path: str | Path) -> str | None:
    """``"cosmos"`` for a base model's file or folder, ``"cosmos-video2world"``, or ``None`` for any other.

    Reads no more of the weights than their names.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    path = Path(path)
    path = first_file([path], WEIGHT_FILES) or path
    if not path.is_file():
        return None
    keys = {key.removeprefix("model.") for key in keys_of(path)}
    if not keys >= {"tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.attention.q_norm.weight"}:
        return None
    return "cosmos-video2world" if any(_CROSS in key for key in keys) else "cosmos"


def transformer_config(
    state: Mapping[str, Tensor],
    path: str | Path,
    notes: Mapping[str, Any] | None = None,
    *,
    grid: tuple[int, int, int] | None = None,
    rope_base: float | None = None,
    yarn_scale: float | None = None,
) -> dict[str, Any]:
    """Arguments of :class:`CosmosTransformer` for the upstream tensors ``state`` of the file ``path``.

    Only shapes are looked at; ``notes`` is the content of ``config.json``, the rest as :func:`load_transformer` takes it.

    Raises:
        CheckpointError: when a tensor that tells a size is missing or odd, or nothing tells whether there is YaRN.
        InputError: for an argument out of range.
    """
    notes, sizes = notes or {}, _sizes(state, path)
    told, known = _told(notes, path), (sizes["hidden_size"], sizes["num_layers"])
    for name, value in (("grid", grid), ("rope_base", rope_base), ("yarn_scale", yarn_scale)):
        if value is not None and not (_is_volume(value) if name == "grid" else _is_number(value)):
            wanted = "(latent frames, rows, columns)" if name == "grid" else "a positive number"
            raise InputError(f"{name} must be {wanted}, not {value!r}")
        told |= {} if value is None else {name: value}
    if "yarn_scale" not in told and known not in PUBLISHED_YARN:
        what = f"{path}: width {known[0]} with {known[1]} layers is no published size"
        raise CheckpointError(f"{what}: say yarn_scale=..., 1 for rotary positions that are not stretched")
    for theirs, ours in _SIZES.items():
        if notes.get(theirs) not in (None, sizes[ours]):
            what = f"{theirs} is {notes[theirs]!r} in config.json, but {sizes[ours]} in the weights"
            raise CheckpointError(f"{path}: {what}: give the config.json that belongs to them")
    scale = told.get("yarn_scale", PUBLISHED_YARN.get(known))
    rest = {
        **dict(zip(("frames", "rows", "columns"), told.get("grid", GRID), strict=True)),
        "yarn_scale": None if scale == 1 else scale,
        "yarn_betas": (told.get("beta_fast", 4.0), told.get("beta_slow", 1.0)),
        "yarn_lengths": tuple(told.get("original", (3, 40)))[:2],
        "sampling": dict(SAMPLING),
    }
    return sizes | rest | {name: told[name] for name in ("rope_base", "norm_eps") if name in told}


def load_transformer(
    path: str | Path,
    *,
    grid: tuple[int, int, int] | None = None,
    rope_base: float | None = None,
    yarn_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> CosmosTransformer:
    """Load a published base model in evaluation mode on the CPU; each tensor is copied once, out of a mapped file.

    Args:
        path: the folder, or its ``model.pt`` (or ``.safetensors``).
        grid: latent frames, rows and columns of a clip; by default what ``config.json`` says (``video_latent_shape``), else
            :data:`GRID`.
        rope_base: base of the rotary table; by default what ``config.json`` says, else 500,000.
        yarn_scale: how far its frequencies are stretched, 1 for not at all; by default what ``config.json`` says, else what
            the published size has (:data:`PUBLISHED_YARN`).
        dtype: dtype of all parameters; by default that of the token embedding in the file. The rotary table stays in
            float32.

    Raises:
        CheckpointError: when the file cannot be read, lacks keys, has other keys (``*_extra_state`` are ignored), a shape
            does not fit, ``config.json`` is not that of the weights, or it is a Video2World model.
        InputError: for an argument out of range.
    """
    path = Path(path)
    file = first_file([path], WEIGHT_FILES) if path.is_dir() else path
    if file is None:
        raise CheckpointError(f"{path} holds no {' or '.join(WEIGHT_FILES)}: give a folder of Cosmos-Predict1, or the file")
    notes = config_of(file.parent) if file.name in WEIGHT_FILES else {}
    read = read_state_dict(file).items()
    state = {key.removeprefix("model."): value for key, value in read if not key.endswith("_extra_state")}
    del read
    if any(_CROSS in key for key in state) or notes.get("insert_cross_attn"):
        what = f"{file} is a Video2World model (5B or 13B), which reads text through cross-attention: that is not supported"
        raise CheckpointError(f"{what}, give Cosmos-Predict1-4B or -12B")
    config = transformer_config(state, file, notes, grid=grid, rope_base=rope_base, yarn_scale=yarn_scale)
    with torch.device("meta"):
        model = CosmosTransformer(**config)
    layout, ours = _layout(config["num_layers"]), model.state_dict()
    check_keys(state, layout, file, "Cosmos-Predict1")
    check_tensors(state, {key: ours[name].shape for key, name in layout.items()}, file)
    dtype = dtype or state["tok_embeddings.weight"].dtype
    copies = {}
    for key, name in layout.items():
        copies[name] = state.pop(key).detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(copies, assign=True)
    rotary: Any = model.rotary_table()  # in no file, so the network's own is still on the meta device
    model.lm.model.rotary_emb = rotary
    return model.eval()


def save_transformer(model: CosmosTransformer, path: str | Path) -> None:
    """Write ``model`` in the upstream layout; the exact inverse of :func:`load_transformer`, bit for bit.

    The file is ``{"model": state_dict}``, or flat if ``path`` ends in ``.safetensors``. It replaces an older one only when
    it is complete. Grid, rotary base and YaRN are not part of the layout: remember them for loading.

    Raises:
        InputError: for a model with captions, which upstream does not have.
    """
    if model.config["caption_dim"] is not None:
        raise InputError("upstream models have no captions: use save_pretrained")
    ours = model.state_dict()
    layout = _layout(model.config["num_layers"])
    write_state_dict({key: ours[name].detach().cpu().contiguous() for key, name in layout.items()}, path, "model")


def _layout(layers: int) -> dict[str, str]:
    """Our parameter by upstream key."""
    layout = dict(_STEM_KEYS)
    for i in range(layers):
        layout |= {f"layers.{i}.{key}": f"lm.model.layers.{i}.{name}" for key, name in _LAYER_KEYS.items()}
    return layout


def _sizes(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """What the shapes tell."""
    vocab_size, width = shape_of(state, "tok_embeddings.weight", 2, path)
    head_dim = shape_of(state, "layers.0.attention.q_norm.weight", 1, path)[0]
    rows = [shape_of(state, f"layers.0.attention.{name}.weight", 2, path)[0] for name in ("wq", "wk")]
    if head_dim < 6 or head_dim % 2 or any(n % head_dim or not n for n in rows) or rows[0] % rows[1]:
        what = f"{path}: queries of {rows[0]} and keys of {rows[1]} channels in heads of {head_dim} make no Cosmos-Predict1"
        raise CheckpointError(f"{what}: give an upstream file")
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": count_indices(state, r"layers\.(\d+)\."),
        "num_heads": rows[0] // head_dim,
        "num_key_value_heads": rows[1] // head_dim,
        "head_dim": head_dim,
        "intermediate_size": shape_of(state, "layers.0.feed_forward.w1.weight", 2, path)[0],
    }


def _told(notes: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What ``config.json`` tells that the weights do not, by our names."""

    def value(name: str, fits: Callable[[Any], bool]) -> Any:
        if not fits(notes.get(name)):
            raise CheckpointError(f"{path}: {name} in config.json cannot be {notes.get(name)!r}: give the published file")
        return notes[name]

    def known(names: Iterable[str]) -> list[str]:
        return [name for name in names if notes.get(name) is not None]

    for name in known(_ALWAYS):
        value(name, lambda found, name=name: found == _ALWAYS[name])  # type: ignore[misc]
    found = {_TOLD[name]: value(name, _is_number) for name in known(_TOLD)}
    found |= {_SHAPES[name]: tuple(value(name, _is_volume)) for name in known(_SHAPES)}
    if notes.get("apply_yarn") is not None:
        stretched = value("apply_yarn", lambda found: isinstance(found, bool))
        found |= {_YARN[name]: value(name, _is_number) for name in _YARN} if stretched else {"yarn_scale": 1.0}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_volume(value: Any) -> bool:
    whole = isinstance(value, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    return whole and len(value) == 3 and min(value) > 0
