"""Published folders of LARP (arXiv 2410.21264): the autoregressive models of classes and of frames, and the video tokenizer.

All are written by huggingface_hub's mixin: ``model.safetensors`` with upstream's keys, and a flat ``config.json`` of the
arguments. The keys of the transformer are LlamaGen's, with ``abs_pe``; nothing is rotated, so no rows are reordered. Of the
tokenizer, the small prior that was trained with it (``prior_model.*``) is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsd.errors import CheckpointError, InputError
from arsd.models.folders import config_of, read_tensors, weight_map
from arsd.models.larp import LARPTransformer, PositionedLlama
from arsd.models.llamagen_files import LAYER_KEYS, STEM_KEYS, Layout
from arsd.models.weight_files import check_keys, check_tensors, count_indices, shape_of
from arsd.tokenizers.larp import LARPTokenizer

KINDS = ("larp", "larp-frames")
"""What :func:`find_kind` tells apart, besides ``"larp-tokenizer"``."""

HUB = "huggingface.co/hywang66/LARP-L-long-tokenizer"
SAMPLING = {"larp": {"guidance_scale": 1.25, "temperature": 1.0}, "larp-frames": {"guidance_scale": 1.0, "temperature": 1.0}}
"""What upstream's README samples with; a model of frames has no unconditional stream."""

_CLASSES = "cls_embedding.embedding_table.weight"
_TABLES = {  # ours to upstream's, which are added up: a table, or one per axis, and one vector for all
    "patch_positions": ("encoder_patch_pe", "encoder_patch_token_type_embed"),
    "queries": ("encoder_latent_query_embed", "encoder_latent_query_token_type_embed"),
    "code_positions": ("decoder_latent_pe", "decoder_latent_token_type_embed"),
    "patch_queries": ("decoder_patch_query_embed", "decoder_patch_query_token_type_embed"),
}
_AXES = {  # tables that may be learned per axis: row, column, time ("encode" is upstream's spelling)
    "encoder_patch_pe": ("encoder_h_embed", "encode_w_embed", "encoder_t_embed"),
    "decoder_patch_query_embed": ("decoder_h_embed", "decoder_w_embed", "decoder_t_embed"),
}
_RENAMES = {"encoder.blocks.": "encoder.", "decoder.blocks.": "decoder.", "bottleneck.regularizer.embedding.": "codes."}
_RENAMES |= {"bottleneck.in_linear.": "to_code.", "bottleneck.out_linear.": "from_code.", "x_embedder.proj.": "patches."}
_RENAMES |= {"final_layer.norm_final.": "norm.", "final_layer.linear.": "to_pixels."}


def find_kind(folder: str | Path) -> str | None:
    """Which of :data:`KINDS` a folder holds, ``"larp-tokenizer"``, or ``None``; only the names of tensors are read.

    Raises:
        CheckpointError: when its weights are damaged.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        return None
    keys = weight_map(folder).keys()
    if {"abs_pe", "layers.0.attention.wqkv.weight"} <= keys:
        return "larp" if _CLASSES in keys else "larp-frames"
    return "larp-tokenizer" if {"encoder_latent_query_embed", "x_embedder.proj.weight"} <= keys else None


def load_larp(folder: str | Path, *, dtype: torch.dtype | None = None) -> LARPTransformer:
    """The transformer of a published folder, in evaluation mode on the CPU.

    Args:
        folder: of hywang66/LARP-L-long-AR or LARP-L-long-AR-FP, or of the same layout.
        dtype: of all parameters; by default that of the files.

    Raises:
        CheckpointError: when it is another folder, files are missing or damaged, or have other keys or shapes.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind not in KINDS:
        what = "is the video tokenizer of LARP" if kind else "is no folder of LARP's autoregressive models"
        raise CheckpointError(f"{folder} {what}: give the folder of LARP-L-long-AR or LARP-L-long-AR-FP")
    state = read_tensors(folder)
    config = _transformer_config(state, config_of(folder), folder)
    with torch.device("meta"):
        model = LARPTransformer(**config, sampling=SAMPLING[kind])
    tables = {"abs_pe": "lm.model.positions.weight"} | ({_CLASSES: "class_embedding.weight"} if kind == "larp" else {})
    layout: Layout = {key: (name,) for key, name in (STEM_KEYS | tables).items()}
    for i in range(config["num_layers"]):
        theirs, mine = f"layers.{i}.", f"lm.model.layers.{i}."
        layout[theirs + "attention.wqkv.weight"] = tuple(f"{mine}self_attn.{part}_proj.weight" for part in "qkv")
        layout |= {theirs + key: (mine + name,) for key, name in LAYER_KEYS.items()}
    check_keys(state, layout, folder, "LARP")
    ours = model.state_dict()
    shapes = {key: [sum(len(ours[name]) for name in names), *ours[names[0]].shape[1:]] for key, names in layout.items()}
    shapes["abs_pe"].insert(0, 1)
    check_tensors(state, shapes, folder)
    found: dict[str, Tensor] = {}
    for key, names in layout.items():
        rows = state[key][0] if key == "abs_pe" else state[key]
        found |= dict(zip(names, rows.split([len(ours[name]) for name in names]), strict=True))
    _assign(model, found, dtype or state["tok_embeddings.weight"].dtype)
    inner = model.lm.model  # its table of angles is in no file, so still on the meta device
    assert isinstance(inner, PositionedLlama)
    inner.rotary_emb = inner.no_rotary()
    return model.eval()


def load_larp_tokenizer(folder: str | Path, *, dtype: torch.dtype | None = None) -> LARPTokenizer:
    """The video tokenizer of a published folder, in evaluation mode on the CPU.

    Args:
        folder: of hywang66/LARP-L-long-tokenizer, or of the same layout.
        dtype: of all parameters; by default that of the files.

    Raises:
        CheckpointError: when it is another folder, files are missing or damaged, have other keys or shapes, or the tokenizer
            is of a kind that was not published.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind != "larp-tokenizer":
        what = "holds a transformer of LARP" if kind else "is no folder of LARP's video tokenizer"
        raise CheckpointError(f"{folder} {what}: give the folder of {HUB}")
    state = read_tensors(folder, lambda key: not key.startswith("prior_model."))
    config = _tokenizer_config(state, config_of(folder), folder)
    tables = {name: _table(state, *keys) for name, keys in _TABLES.items()}
    try:
        with torch.device("meta"):
            tokenizer = LARPTokenizer(**config)
    except InputError as error:
        raise CheckpointError(f"{folder / 'config.json'} does not fit ({error}): give the folder of {HUB}") from error
    ours = tokenizer.state_dict()
    layout = {_upstream(name): name for name in ours if name not in tables}
    used = {key for keys in _TABLES.values() for one in keys for key in (one, *_AXES.get(one, ())) if key in state}
    check_keys(state, {*layout, *used}, folder, "LARP's tokenizer")
    check_tensors(state, {key: ours[name].shape for key, name in layout.items()}, folder)
    for name, table in tables.items():
        if table is None or table.shape != ours[name].shape:
            found = "missing" if table is None else f"of shape {list(table.shape)}"
            wanted = f"{' + '.join(_TABLES[name])} must make {list(ours[name].shape)}"
            raise CheckpointError(f"{folder}: {wanted}, but is {found}: give the folder of {HUB}")
    found_tables = {name: table for name, table in tables.items() if table is not None}
    _assign(
        tokenizer,
        {name: state[key] for key, name in layout.items()} | found_tables,
        dtype or state[_upstream("codes.weight")].dtype,
    )
    return tokenizer.eval()


def _transformer_config(state: Mapping[str, Tensor], told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of :class:`LARPTransformer`: sizes from the tensors, and what only ``config.json`` tells."""
    codes, width = shape_of(state, "output.weight", 2, folder)
    rows = shape_of(state, "layers.0.attention.wqkv.weight", 2, folder)[0]
    slots = shape_of(state, "abs_pe", 3, folder)[1]
    heads, length = _number(told, "n_head", folder), _number(told, "max_seq_len", folder)
    kv_heads, rest = divmod(rows - width, 2 * max(1, width // heads))
    if width % (2 * heads) or rest or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(f"{folder}: n_head {heads} does not fit wqkv of {rows} rows: give its own config.json")
    by_class = _CLASSES in state
    if slots != length + (0 if by_class else length):
        what = f"abs_pe has {slots} slots, which {length} tokens per clip (max_seq_len) do not need"
        raise CheckpointError(f"{folder}: {what}: give its own config.json")
    config: dict[str, Any] = {
        "vocab_size": codes,
        "hidden_size": width,
        "num_layers": count_indices(state, r"layers\.(\d+)\."),
        "num_heads": heads,
        "num_key_value_heads": None if kv_heads == heads else kv_heads,
        "intermediate_size": shape_of(state, "layers.0.feed_forward.w1.weight", 2, folder)[0],
        "num_tokens": length,
        "norm_eps": _number(told, "norm_eps", folder, (int, float), 1e-5),
        "condition": "class" if by_class else "frames",
    }
    if by_class:
        config["num_classes"] = shape_of(state, _CLASSES, 2, folder)[0] - 1
        if told.get("num_classes", config["num_classes"]) != config["num_classes"]:
            what = f"num_classes {told['num_classes']} do not leave a null class among {config['num_classes'] + 1} rows"
            raise CheckpointError(f"{folder}: {what}: a model without one has no guidance, and is not supported")
    return config


def _tokenizer_config(state: Mapping[str, Tensor], told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of :class:`LARPTokenizer`."""
    regulariser = told.get("bottleneck")
    for name in ("args", "regularizer", "args"):
        regulariser = regulariser.get(name) if isinstance(regulariser, dict) else None
    norm = (told.get("bottleneck") or {}).get("args", {}).get("norm") if isinstance(regulariser, dict) else None
    if not isinstance(regulariser, dict) or regulariser.get("l2_normalized") is not True or norm not in (None, "no", "none"):
        what = "its codes are not looked up on the unit sphere, without a norm in front"
        raise CheckpointError(f"{folder / 'config.json'}: {what}: give the folder of {HUB}")
    sides = {name: _number(told, name, folder) for name in ("input_size", "frame_num", "patch_size", "temporal_patch_size")}
    painted = [told.get(f"decoder_{name}", sides[name]) for name in ("patch_size", "temporal_patch_size")]
    if painted != [sides["patch_size"], sides["temporal_patch_size"]] or sides["temporal_patch_size"] < 2:
        what = f"patches of {sides['temporal_patch_size']} frames that are read and {painted[1]} that are painted"
        raise CheckpointError(f"{folder / 'config.json'}: {what} are not supported: give the folder of {HUB}")
    codes, code_dim = shape_of(state, "bottleneck.regularizer.embedding.weight", 2, folder)
    return {
        "codebook_size": codes,
        "codebook_dim": code_dim,
        "num_tokens": shape_of(state, "encoder_latent_query_embed", 2, folder)[0],
        "size": sides["input_size"],
        "frames": sides["frame_num"],
        "patch_size": sides["patch_size"],
        "frame_patch_size": sides["temporal_patch_size"],
        "encoder_size": shape_of(state, "bottleneck.in_linear.weight", 2, folder)[1],
        "decoder_size": shape_of(state, "bottleneck.out_linear.weight", 2, folder)[0],
        "encoder_layers": count_indices(state, r"encoder\.blocks\.(\d+)\."),
        "decoder_layers": count_indices(state, r"decoder\.blocks\.(\d+)\."),
        "encoder_heads": _number(told, "encoder_num_heads", folder),
        "decoder_heads": _number(told, "decoder_num_heads", folder),
    }


def _number(told: dict[str, Any], name: str, folder: Path, kind: Any = int, default: Any = None) -> Any:
    value = told.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 1 << 30:
        raise CheckpointError(f"{folder / 'config.json'}: {name} cannot be {value!r}: download it with the weights")
    return value


def _table(state: Mapping[str, Tensor], main: str, for_all: str) -> Tensor | None:
    """[n, D] what is added to n slots, in upstream's order of additions; ``None`` where it is not all there."""
    if main in state:
        table = state[main].flatten(0, -2)
    elif all(axis in state for axis in _AXES.get(main, (main,))):
        row, column, time = (state[axis] for axis in _AXES[main])
        table = (row + column + time).flatten(0, -2)
    else:
        return None
    return table + state[for_all][0] if for_all in state else table


def _upstream(name: str) -> str:
    for theirs, mine in _RENAMES.items():
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return name


def _assign(model: nn.Module, found: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Copies of the tensors into a model on the meta device."""
    copies = {
        name: value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for name, value in found.items()
    }
    model.load_state_dict(copies, assign=True)
