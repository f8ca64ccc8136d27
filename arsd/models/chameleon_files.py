"""Published folders of Lumina-mGPT (1 and 2.0), Anole and Chameleon, read as they are into the network of transformers.

They hold one network in two layouts. That of transformers (Lumina-mGPT, Anole, Chameleon) has the norms of queries and keys
once per shard of the training (``[model_parallel_size, d]``) or once per head. Meta's own (``models/7b/consolidated.pth``:
Anole, Chameleon) has them once per file and rotates interleaved channel pairs, so the rows of q and k and these norms are
reordered, which leaves every attention score as it was. Weights are windows into the files until the parameter that they
make is needed, so loading takes the memory of the model and hardly more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ChameleonConfig, GenerationConfig, PreTrainedTokenizerFast

from arsd.errors import CheckpointError, InputError
from arsd.models.chameleon import ChameleonForImageGeneration
from arsd.models.folders import (
    PublishedFiles,
    config_of,
    first_file,
    load_fast_tokenizer,
    read_json,
    read_tensors,
    weight_map,
)
from arsd.models.vqgan_files import load_vqgan
from arsd.models.weight_files import check_keys, check_tensors, read_state_dict, to_half
from arsd.tokenizers.vqgan import VQGANTokenizer

State = dict[str, Tensor]
Layout = dict[str, tuple[str, ...]]  # published key -> our parameters, whose rows stacked make the published tensor

KINDS = ("lumina-mgpt", "lumina-mgpt-2", "anole", "anole-meta", "chameleon")
"""What :func:`find_kind` tells apart; ``anole-meta`` is Meta's own layout, of Anole or of Chameleon."""

_MODEL_TYPES = ("chameleon", "chameleon_xllmx")
_ENCODER, _DECODER = "model.vqmodel.", "model.vqmodel.decoder."
_CODE_0 = 155000  # id of code 0 in Lumina-mGPT 2.0; the vocabulary of the others ends at 65536
_TOKENIZERS = ("text_tokenizer.json", "tokenizer/text_tokenizer.json", "chameleon/tokenizer/text_tokenizer.json")
_SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
_PICTURE = "<reserved08707>"  # the word that transformers calls <image>
_VQGAN = ("vqgan.ckpt", "tokenizer/vqgan.ckpt", "chameleon/tokenizer/vqgan.ckpt")
_VQGAN_FROM = "vqgan.ckpt (of Meta's Chameleon, or tokenizer/vqgan.ckpt of huggingface.co/GAIR/Anole-7b-v0.1)"
_MOVQGAN = ("movqgan_270M.ckpt", "movqgan/270M/movqgan_270M.ckpt")
_MOVQGAN_FROM = "movqgan_270M.ckpt (of huggingface.co/ai-forever/MoVQGAN)"
_META_STEM = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_META_LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_normalization.weight": "self_attn.q_norm.weight",
    "attention.q_normalization.bias": "self_attn.q_norm.bias",
    "attention.k_normalization.weight": "self_attn.k_norm.weight",
    "attention.k_normalization.bias": "self_attn.k_norm.bias",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_META_FUSED = {  # a file has either the matrix of this name or its parts
    "attention.wqkv.weight": {f"attention.w{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkv"},
    "feed_forward.w13.weight": {
        "feed_forward.w1.weight": "mlp.gate_proj.weight",
        "feed_forward.w3.weight": "mlp.up_proj.weight",
    },
}
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight", "tok_embeddings.weight")  # how Meta's shards are cut
_IN_EVERY_SHARD = ("attention_norm.weight", "ffn_norm.weight", "norm.weight")


def find_kind(folder: str | Path) -> str | None:
    """Which of :data:`KINDS` a folder is, or ``None``; told by what is in its files, of which only headers are read.

    Raises:
        CheckpointError: for a Chameleon's ``config.json`` without weights, or a file that is damaged.
    """
    folder = Path(folder)
    if _meta_folders(folder):
        return "anole-meta"
    config = config_of(folder)
    if config.get("model_type") not in _MODEL_TYPES:
        return None
    keys = weight_map(folder)
    if any(key.startswith(_ENCODER) for key in keys):
        return "anole" if any(key.startswith(_DECODER) for key in keys) else "chameleon"
    words, size = config.get("vocabulary_map"), config.get("vocab_size")
    named = isinstance(words, dict) and any(word.startswith("<MOVQGAN") for word in words)
    return "lumina-mgpt-2" if named or (isinstance(size, int) and size > _CODE_0) else "lumina-mgpt"


def load_chameleon(folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> ChameleonForImageGeneration:
    """Load the network of a published folder, in evaluation mode; its weights are copies, not windows into the files.

    Args:
        folder: of a kind of :data:`KINDS`; in Meta's layout the one that holds ``models/``, or the one with the weights.
        dtype: dtype of all parameters; by default that of the embedding in the file.
        options: of transformers' ``from_pretrained``: ``device_map``, ``max_memory``, ``offload_folder``,
            ``quantization_config``, ``attn_implementation`` and so on.

    Raises:
        CheckpointError: when a file is missing, damaged or has other keys or shapes, or the config does not fit.
        InputError: when weights go to disk without an ``offload_folder``, or the folder holds several models.
    """
    path, config, ours, shards, layout = _opened(Path(folder))
    for state in shards:
        check_keys(state, layout, path, "Chameleon")
        check_tensors(state, _shapes(layout, state, ours, config, len(shards)), path)
    dtype = options.pop("torch_dtype", dtype)
    if dtype in (None, "auto"):
        dtype = shards[0][next(iter(layout))].dtype
    weights = dict(_weights(layout, shards, ours, dtype))
    if (notes := path / "generation_config.json").is_file():
        options.setdefault("generation_config", GenerationConfig.from_dict(read_json(notes)))
    try:
        model = ChameleonForImageGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **options)
    except ValueError as error:
        if "offload_folder" not in str(error):
            raise
        raise InputError("the device_map puts weights on disk: give offload_folder=..., a folder for them") from error
    model.config.name_or_path = str(folder)
    return model


def vqgan_source(folder: str | Path) -> Path | State:
    """Where the image tokenizer of a published folder is: a file, or its tensors ``model.vqmodel.*`` (mapped from the file).

    Files are looked for where upstream's layouts have them, in the folder and then in its parent.

    Raises:
        CheckpointError: when there is none; the message says which file to fetch.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind is None:
        raise CheckpointError(f"{folder} is no folder of Lumina-mGPT, Anole or Chameleon: give one")
    if kind == "anole":
        return read_tensors(folder, lambda key: key.startswith(_ENCODER))
    names, needed = (_MOVQGAN, _MOVQGAN_FROM) if kind == "lumina-mgpt-2" else (_VQGAN, _VQGAN_FROM)
    if (path := _first(folder, names)) is not None:
        return path
    what = "only the encoder of its image tokenizer, no decoder" if kind == "chameleon" else "no image tokenizer"
    raise CheckpointError(f"{folder} holds {what}: put {needed} into it, or give its path as vq=...")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The text tokenizer of a published folder: ``tokenizer.json``, or else Meta's ``text_tokenizer.json``.

    ``tokenizer.json`` is taken as it is: ``AutoTokenizer`` goes by the class that ``tokenizer_config.json`` names, and a
    LlamaTokenizer of transformers 5 cuts text otherwise. Meta's file is looked for as :func:`vqgan_source` does.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        return load_fast_tokenizer(folder)
    try:
        if (found := _first(folder, _TOKENIZERS)) is not None:
            path = found
            return PreTrainedTokenizerFast(
                tokenizer_file=str(path), **{f"{name}_token": word for name, word in _SPECIAL.items()}
            )
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{path} is no readable tokenizer: download it again") from error
    what = f"{folder} holds neither tokenizer.json nor {_TOKENIZERS[1]}"
    raise CheckpointError(f"{what}: download it with the weights, or give tokenizer=...")


CHAMELEON = partial(
    PublishedFiles,
    find_kind=find_kind,
    network=load_chameleon,
    tokenizer=load_tokenizer,
    vq_source=vqgan_source,
    vq=load_vqgan,
    vq_class=VQGANTokenizer,
)
"""What Lumina-mGPT and Anole share; each names its ``kinds``."""


@dataclass
class _Weight:
    """One parameter, made when it is indexed: transformers takes it in the place of a slice of a safetensors file."""

    parts: list[Tensor]  # windows into the files, joined along axis
    axis: int
    change: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        window = len(self.parts) == 1
        weight = self.parts[0] if window else torch.cat(self.parts, self.axis)
        weight = self.change(weight) if self.change else weight
        return weight.to(self.dtype, copy=window, memory_format=torch.contiguous_format)[index]


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    """The first file of these in the folder, or else around it."""
    here = folder.absolute()
    return first_file([here, here.parent, *([here.parent.parent] if (here / "params.json").is_file() else [])], names)


def _of_network(key: str) -> bool:
    return not key.startswith(_ENCODER) and ".rotary_emb." not in key


def _opened(folder: Path) -> tuple[Path, ChameleonConfig, State, list[State], Layout]:
    """The folder with the weights, its config, the network's parameters (on no device), the shards and their layout."""
    meta = _meta_folders(folder)
    if len(meta) > 1:
        raise InputError(f"{folder} holds several models: give one of {', '.join(map(str, meta))}")
    if meta:
        config, ours = _network(_meta_config(meta[0]), meta[0] / "params.json")
        shards = _meta_shards(meta[0], config.model_parallel_size or 1)
        return meta[0], config, ours, shards, _meta_layout(config.num_hidden_layers, shards[0])
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has neither a config.json nor Meta's params.json: give a published folder")
    content = read_json(path)
    if content.get("model_type") not in _MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type must be 'chameleon', not {content.get('model_type')!r}")
    config, ours = _network(content | {"model_type": _MODEL_TYPES[0]}, path)
    return folder, config, ours, [read_tensors(folder, _of_network)], {name: (name,) for name in ours}


def _network(content: dict[str, Any], path: Path) -> tuple[ChameleonConfig, State]:
    try:
        config = ChameleonConfig.from_dict(content)
        with torch.device("meta"):
            ours = ChameleonForImageGeneration(config).state_dict()
    except Exception as error:  # checks of huggingface_hub, or whatever odd values lead to
        reason = ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
        raise CheckpointError(f"{path} is no config of a Chameleon ({reason[:120]}): give the published one") from error
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    shards = config.model_parallel_size or 1
    if shards < 1 or config.hidden_size % (2 * heads) or heads % kv_heads or heads % shards or kv_heads % shards:
        sizes = f"width {config.hidden_size}, {heads} heads, {kv_heads} key/value heads and model_parallel_size {shards}"
        raise CheckpointError(f"{path}: {sizes} do not fit together: give the published config")
    return config, ours


def _meta_folders(folder: Path) -> list[Path]:
    """The folders with weights in Meta's layout, told from Llama's by the norms that ``params.json`` speaks of."""
    found = [place for place in (folder, *sorted(folder.glob("models/*"))) if (place / "params.json").is_file()]
    return [place for place in found if _params(place).keys() & {"swin_norm", "qk_normalization"}]


def _params(folder: Path) -> dict[str, Any]:
    """What ``params.json``, its part ``model`` and ``consolidate_params.json`` say; the later one wins."""
    params, more = read_json(folder / "params.json"), folder / "consolidate_params.json"
    inner = params.get("model")
    return {**params, **(inner if isinstance(inner, dict) else {}), **(read_json(more) if more.is_file() else {})}


def _meta_config(folder: Path) -> dict[str, Any]:
    params, words = _params(folder), _vocabulary(folder)
    try:
        width, multiple, theta = params["dim"], params.get("multiple_of") or 256, float(params.get("rope_theta") or 1e4)
        hidden = int((params.get("ffn_dim_multiplier") or 1) * int(8 * width / 3))
        return {
            "vocab_size": params.get("vocab_size") or 65536,
            "hidden_size": width,
            "intermediate_size": -(-hidden // multiple) * multiple,
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
            "max_position_embeddings": 16384 if theta > 1e4 else 4096,  # as transformers' own converter has it
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": theta,
            "swin_norm": params.get("swin_norm", False),
            "model_parallel_size": params.get("model_parallel_size") or 1,
            "vocabulary_map": words,
            **{f"{name}_token_id": words.get(word) for name, word in _SPECIAL.items()},
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"{folder / 'params.json'} does not give the sizes of a Chameleon ({type(error).__name__}: {error})"
        raise CheckpointError(f"{what}: download it again") from error


def _vocabulary(folder: Path) -> dict[str, int]:
    """Ids by word, with transformers' name for the word that stands for a picture; empty without a tokenizer."""
    if (path := _first(folder, _TOKENIZERS)) is None:
        return {}
    try:
        words = dict(read_json(path)["model"]["vocab"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable tokenizer: download it again") from error
    return words | ({"<image>": words[_PICTURE]} if _PICTURE in words else {})


def _meta_shards(folder: Path, count: int) -> list[State]:
    """The tensors of every file, with norms of queries and keys as [1, d]."""
    paths = [folder / "consolidated.pth"]
    if not paths[0].is_file():
        paths = sorted(folder.glob("consolidated.[0-9]*.pth")) or paths
    if len(paths) != count:
        names = ", ".join(path.name for path in paths)
        raise CheckpointError(f"{folder}: params.json speaks of {count} shards, here is {names}: download all of them")
    states = [read_state_dict(path) for path in paths]
    for state in states:
        state.pop("rope.freqs", None)
        state |= {key: value[None] for key, value in state.items() if "_normalization." in key and value.ndim == 1}
    return states


def _meta_layout(layers: int, state: State) -> Layout:
    layout: Layout = {key: (name,) for key, name in _META_STEM.items()}
    for i in range(layers):
        theirs, mine = f"layers.{i}.", f"model.layers.{i}."
        for fused, parts in _META_FUSED.items():
            names = {theirs + key: (mine + name,) for key, name in parts.items()}
            layout |= {theirs + fused: sum(names.values(), ())} if theirs + fused in state else names
        layout |= {theirs + key: (mine + name,) for key, name in _META_LAYER.items()}
    return layout


def _shapes(layout: Layout, state: State, ours: State, config: ChameleonConfig, shards: int) -> dict[str, list[int]]:
    """What every tensor of one shard must be."""
    shapes = {}
    for key, names in layout.items():
        shape = [sum(len(ours[name]) for name in names), *ours[names[0]].shape[1:]]
        if names[0].endswith(("_norm.weight", "_norm.bias")) and len(shape) == 2:
            if state[key].shape[:1] != (shape[0],):  # not once per head
                shape[0] = (config.model_parallel_size or 1) // shards
        elif not key.endswith(_IN_EVERY_SHARD):
            shape[key.endswith(_BY_COLUMNS)] //= shards
        shapes[key] = shape
    return shapes


def _weights(layout: Layout, shards: list[State], ours: State, dtype: torch.dtype) -> Iterator[tuple[str, _Weight]]:
    interleaved = "tok_embeddings.weight" in layout
    for key, names in layout.items():
        sources = [state[key] for state in (shards[:1] if key.endswith(_IN_EVERY_SHARD) else shards)]
        sizes = [len(ours[name]) // len(shards) for name in names]
        parts = [source.split(sizes) if len(names) > 1 else (source,) for source in sources]
        for i, name in enumerate(names):
            change: Callable[[Tensor], Tensor] | None = None
            if (stem := name.rpartition(".")[0]).endswith(("q_norm", "k_norm")):
                change = partial(_per_head, heads=len(ours[name]), interleaved=interleaved)
            elif stem.endswith(("q_proj", "k_proj")) and interleaved:
                heads = ours[f"{stem.removesuffix('proj')}norm.weight"]
                change = partial(to_half, heads=len(heads))
            yield name, _Weight([part[i] for part in parts], int(key.endswith(_BY_COLUMNS)), change, dtype)


def _per_head(norm: Tensor, heads: int, interleaved: bool) -> Tensor:
    """[heads, d] of the norms of shards [S, d], where head h belongs to shard h // (heads / S)."""
    if interleaved:
        norm = to_half(norm.reshape(-1, 1), len(norm)).reshape(norm.shape)
    return norm.repeat_interleave(heads // len(norm), dim=0)
