"""Published EAGLE drafters of image models (LANTERN, arXiv 2410.03355), read and written in their own layout.

A drafter is ``model.safetensors`` or ``pytorch_model.bin``, mostly beside a ``config.json``. There are two kinds, which the
keys tell apart. LlamaGen's has no norms of queries and keys, rotates interleaved channel pairs (the rows of q and k are
reordered here, which leaves every attention score as it was), reads token 0 in the place of the text and reads padded text.
Chameleon's (Lumina-mGPT, Anole) has these norms, once per shard of the model instead of once per head, and an input norm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.eagle import EagleDrafter
from arsd.models.llamagen_files import PUBLISHED_HEADS, WEIGHT_FILES
from arsd.models.weight_files import (
    check_keys,
    check_tensors,
    count_indices,
    read_state_dict,
    shape_of,
    to_half,
    to_interleaved,
    write_state_dict,
)

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_KIND = "a published EAGLE drafter"
_EMBEDDING = "embed_tokens.weight"
_LAYER = "layers.0."
_Q, _K, _V, _O = (f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkvo")
_GATE, _UP, _DOWN = (f"{_LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
_INPUT_NORM, _NORM = f"{_LAYER}input_layernorm.weight", f"{_LAYER}post_attention_layernorm.weight"
_Q_NORM, _K_NORM = ([f"{_LAYER}self_attn.{part}_norm.{name}" for name in ("weight", "bias")] for part in "qk")
_KEYS = (_EMBEDDING, "fc.weight", _Q, _K, _V, _O, _GATE, _UP, _DOWN, _NORM)
_HEADS = {width: heads for (width, _), heads in PUBLISHED_HEADS.items()}
_EPSILON = {"llama": 1e-6, "chameleon": 1e-5}  # of the published config files
_PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {"input_norm": False, "condition_inputs": "zero-token", "see_padding": True, "see_first": False},
    "chameleon": {"input_norm": True, "condition_inputs": "embedding", "see_padding": False, "see_first": False},
}


def load_eagle(
    path: str | Path, *, lm: Any = None, num_heads: int | None = None, dtype: torch.dtype | None = None
) -> EagleDrafter:
    """Load a published drafter, in evaluation mode on the CPU.

    The heads come from ``num_heads``, else from the norms of queries and keys, else from ``config.json``, else from ``lm``,
    else from the width, if it is that of a published LlamaGen. ``config.json`` may also hold ``embed_upscale``, which
    LANTERN notes only in the names of its runs.

    Args:
        path: a weight file, or the folder of one (:data:`WEIGHT_FILES`); a ``config.json`` beside it is read too.
        lm: the target, a transformers decoder with head, or a :class:`arsd.LlamaGenTransformer`. The drafter is checked
            against it, and an embedding that equals the target's (in the dtype of the file) is dropped. Without it the
            drafter keeps its own.
        num_heads: attention heads.
        dtype: dtype of all parameters; by default the target's, or without ``lm`` that of the file.

    Raises:
        CheckpointError: when a file is missing, damaged or has other keys or shapes, there is more than one layer, the heads
            are unknown, ``config.json`` contradicts the weights, or the drafter does not fit ``lm``.
    """
    weights = _weight_file(Path(path))
    notes = _Notes(weights.parent / "config.json")
    lm = getattr(lm, "lm", lm)
    state = read_state_dict(weights)
    config, shapes = _config(state, weights, notes, lm, num_heads)
    if lm is not None:
        _check_fit(config, shapes[_EMBEDDING][0], lm, weights)
    if lm is None or not _equal(state[_EMBEDDING], lm.get_input_embeddings().weight):
        config["vocab_size"] = shapes[_EMBEDDING][0]
    with torch.device("meta"):
        drafter = EagleDrafter(**config)
    dtype = dtype or (state["fc.weight"].dtype if lm is None else lm.get_input_embeddings().weight.dtype)
    parts = {name: _to_ours(key, state[key], config) for name, key in _names(shapes).items() if _has(config, key)}
    drafter.load_state_dict({name: _copied(part, dtype) for name, part in parts.items()}, assign=True)
    return drafter.eval()


def save_eagle(drafter: EagleDrafter, path: str | Path, *, lm: Any = None) -> None:
    """Write ``drafter`` in the published layout; the inverse of :func:`load_eagle`, bit for bit in the same dtype.

    LANTERN also wants ``input_type`` in the ``config.json`` of a LlamaGen drafter: ``t2i`` (16 x 16 tokens), ``t2i2``
    (32 x 32) or ``c2i``.

    Args:
        drafter: one that reads its inputs as the published ones do.
        path: a file (``.safetensors``, ``.bin``, ``.pt``, ``.pth``), or a folder, which also gets a ``config.json``.
        lm: the target, whose embedding is written for a drafter that has none of its own.

    Raises:
        InputError: for a drafter that this layout cannot hold, or without an embedding.
    """
    config, lm, path = drafter.config, getattr(lm, "lm", lm), Path(path)
    wanted = _PUBLISHED[config["block"]]
    if different := [name for name, value in wanted.items() if config[name] != value]:
        raise InputError(f"a published drafter has other {', '.join(different)} than this one: use save_pretrained")
    ours = {name: part.detach().cpu() for name, part in drafter.state_dict().items()}
    if drafter.embed_tokens is None:
        if lm is None:
            raise InputError("the drafter reads the target's embedding, which the file must hold: give lm=...")
        ours["embed_tokens.weight"] = lm.get_input_embeddings().weight.detach().cpu().to(ours["fc.weight"].dtype)
    keys = _keys(config["block"], config["bias"], config["input_norm"])
    shards = _shards([ours[name] for name, key in _names(keys).items() if key in (*_Q_NORM, *_K_NORM)])
    state = {key: _to_published(key, ours[name], config, shards) for name, key in _names(keys).items()}
    if path.suffix in _SUFFIXES:
        write_state_dict(state, path)
    else:
        write_state_dict(state, path / WEIGHT_FILES[0])
        content = _config_file(config, len(state[_EMBEDDING]), shards)
        (path / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _Notes:
    """What a ``config.json`` says, if there is one."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, {}
        if path.is_file():
            try:
                self.values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is no readable JSON: repair it, or move the weights elsewhere") from error
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{path} holds no JSON object: repair it, or move the weights elsewhere")

    def whole(self, name: str) -> int | None:
        """A whole number >= 1, or ``None`` where it is not given."""
        value = self.values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{self.path}: {name} must be a whole number >= 1, not {value!r}")
        return value

    def positive(self, name: str, default: float) -> float:
        """A number > 0."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.path}: {name} must be a number > 0, not {value!r}")
        return float(value)

    def agree(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the weights are those that the file speaks of."""
        kv_heads = config["num_key_value_heads"] or config["num_heads"]
        found = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"]}
        found |= {"num_key_value_heads": kv_heads, "vocab_size": shapes[_EMBEDDING][0]}
        for name, value in found.items():
            if self.whole(name) not in (None, value):
                raise CheckpointError(
                    f"{self.path}: {name} is {self.values[name]}, but {value} in the weights: give their own"
                )
        if self.values.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{self.path}: hidden_act must be 'silu', not {self.values['hidden_act']!r}")


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    names = " nor ".join(WEIGHT_FILES)
    raise CheckpointError(f"{path} holds neither {names}: give the folder of a published drafter (or use from_pretrained)")


def _keys(block: str, bias: bool, input_norm: bool) -> list[str]:
    optional = {"fc.bias": bias, _INPUT_NORM: input_norm}
    norms = [*_Q_NORM, *_K_NORM] if block == "chameleon" else []
    return [*_KEYS, *norms, *(key for key, there in optional.items() if there)]


def _names(keys: Any) -> dict[str, str]:
    """Our parameter -> published key."""
    return {key.replace(_LAYER, "layer."): key for key in keys}


def _has(config: Mapping[str, Any], key: str) -> bool:
    return key != _EMBEDDING or "vocab_size" in config


def _config(
    state: Mapping[str, Tensor], path: Path, notes: _Notes, lm: Any, num_heads: int | None
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Arguments of :class:`EagleDrafter` without ``vocab_size``, and the shape that every tensor must have."""
    layers = count_indices(state, r"layers\.(\d+)\.")
    if layers > 1:
        raise CheckpointError(f"{path} has {layers} decoder layers, a drafter has one: give the weights of the drafter")
    block = "chameleon" if any(key in state for key in (*_Q_NORM, *_K_NORM)) else "llama"
    bias = notes.values.get("bias", "fc.bias" in state) is not False
    check_keys(state, _keys(block, bias, _PUBLISHED[block]["input_norm"]), path, _KIND)
    vocab, width = shape_of(state, _EMBEDDING, 2, path)
    heads = _heads(state, path, notes, lm, num_heads)
    kv_heads, rest = divmod(shape_of(state, _K, 2, path)[0] * heads, width)
    if rest or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(f"{path}: {_K} does not fit {heads} heads of width {width // heads}: give the right num_heads")
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": shape_of(state, _GATE, 2, path)[0],
        "num_key_value_heads": None if kv_heads == heads else kv_heads,
        "norm_eps": notes.positive("rms_norm_eps", _EPSILON[block]),
        "block": block,
        "bias": bias,
        "embed_upscale": notes.positive("embed_upscale", 1.0),
        **_PUBLISHED[block],
    }
    shapes = _shapes(config, vocab, _norm_rows(state, path, heads, kv_heads) if block == "chameleon" else 0)
    check_tensors(state, shapes, path)
    notes.agree(config, shapes)
    return config, shapes


def _heads(state: Mapping[str, Tensor], path: Path, notes: _Notes, lm: Any, num_heads: int | None) -> int:
    width = state[_EMBEDDING].shape[1]
    named = num_heads if num_heads is not None else notes.whole("num_attention_heads")
    if _Q_NORM[0] in state:
        head_dim = shape_of(state, _Q_NORM[0], 2, path)[1]
        told = width // head_dim if head_dim and width % head_dim == 0 else -1
        if named not in (None, told):
            misfit = f"{_Q_NORM[0]} is {head_dim} wide, which does not fit {named} heads"
            raise CheckpointError(f"{path}: {misfit}: give the config.json of these weights, or no num_heads")
        named = told
    elif named is None:
        named = _HEADS.get(width) if lm is None else lm.config.num_attention_heads
    if named is None:
        raise CheckpointError(f"{path}: width {width} is no published size, and no config.json tells: say num_heads=...")
    if named < 1 or width % (2 * named):
        raise CheckpointError(f"{path}: width {width} is no multiple of 2 * {named} heads: give the right num_heads")
    return named


def _norm_rows(state: Mapping[str, Tensor], path: Path, heads: int, kv_heads: int) -> int:
    rows = shape_of(state, _Q_NORM[0], 2, path)[0]
    if rows < 1 or heads % rows or kv_heads % rows:
        raise CheckpointError(f"{path}: {_Q_NORM[0]} has {rows} rows, no divisor of {heads} heads: give an upstream file")
    return rows


def _shapes(config: Mapping[str, Any], vocab: int, norm_rows: int) -> dict[str, tuple[int, ...]]:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head_dim = width // config["num_heads"]
    kv_width = head_dim * (config["num_key_value_heads"] or config["num_heads"])
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (vocab, width),
        "fc.weight": (width, 2 * width),
        "fc.bias": (width,),
        _Q: (width, width),
        _K: (kv_width, width),
        _V: (kv_width, width),
        _O: (width, width),
        _GATE: (hidden, width),
        _UP: (hidden, width),
        _DOWN: (width, hidden),
        _NORM: (width,),
        _INPUT_NORM: (width,),
        **dict.fromkeys((*_Q_NORM, *_K_NORM), (norm_rows, head_dim)),
    }
    return {key: shapes[key] for key in _keys(config["block"], config["bias"], config["input_norm"])}


def _check_fit(config: Mapping[str, Any], vocab: int, lm: Any, path: Path) -> None:
    block = "chameleon" if lm.config.model_type == "chameleon" else "llama"
    theirs = {"width": lm.config.hidden_size, "heads": lm.config.num_attention_heads, "kind": block}
    ours = {"width": config["hidden_size"], "heads": config["num_heads"], "kind": config["block"]}
    for name, value in ours.items():
        if value != theirs[name]:
            raise CheckpointError(
                f"{path}: the drafter's {name} is {value}, the target's {theirs[name]}: it belongs to another model"
            )
    if vocab < lm.config.vocab_size:
        raise CheckpointError(
            f"{path}: the drafter has {vocab} ids, the target {lm.config.vocab_size}: give its own drafter"
        )


def _equal(embedding: Tensor, target: Tensor) -> bool:
    return embedding.shape == target.shape and torch.equal(embedding, target.detach().to("cpu", embedding.dtype))


def _copied(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _to_ours(key: str, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    heads = config["num_heads"]
    if key in (_K, *_K_NORM):
        heads = config["num_key_value_heads"] or heads
    if key in (_Q, _K) and config["block"] == "llama":
        return to_half(weight, heads)
    if key in (*_Q_NORM, *_K_NORM):
        return weight.repeat_interleave(heads // len(weight), dim=0)
    return weight


def _to_published(key: str, weight: Tensor, config: Mapping[str, Any], shards: int) -> Tensor:
    if key in (_Q, _K) and config["block"] == "llama":
        kv_heads = config["num_key_value_heads"] or config["num_heads"]
        weight = to_interleaved(weight, kv_heads if key == _K else config["num_heads"])
    elif key in (*_Q_NORM, *_K_NORM):
        weight = weight[:: len(weight) // shards]
    return weight.contiguous()


def _shards(norms: list[Tensor]) -> int:
    """The fewest rows that tell all of ``norms`` [heads, head_dim] when each is repeated."""
    for rows in range(1, min((len(norm) for norm in norms), default=1) + 1):
        if all(len(norm) % rows == 0 and _told_by(norm, rows) for norm in norms):
            return rows
    raise InputError(
        "a published drafter shares the norms of queries as those of keys, this one does not: use save_pretrained"
    )


def _told_by(norm: Tensor, rows: int) -> bool:
    repeats = len(norm) // rows
    return torch.equal(norm, norm[::repeats].repeat_interleave(repeats, dim=0))


def _config_file(config: Mapping[str, Any], vocab: int, shards: int) -> dict[str, Any]:
    chameleon = config["block"] == "chameleon"
    content = {
        "architectures": ["ChameleonForConditionalGeneration" if chameleon else "LlamaForCausalLM"],
        "model_type": config["block"],
        "bias": config["bias"],
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": config["num_heads"],
        "num_hidden_layers": 1,
        "num_key_value_heads": config["num_key_value_heads"] or config["num_heads"],
        "rms_norm_eps": config["norm_eps"],
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    if config["embed_upscale"] != 1:
        content["embed_upscale"] = config["embed_upscale"]
    return content | {"model_parallel_size": shards} if chameleon else content
