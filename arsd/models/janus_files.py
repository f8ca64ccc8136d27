"""Published folders of Janus-Pro and Janus: transformers' layout (deepseek-community), and that of deepseek-ai."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import JanusConfig

from arsd.errors import CheckpointError
from arsd.models.folders import (
    PublishedFiles,
    config_of,
    load_config,
    load_fast_tokenizer,
    load_network,
    read_tensors,
)
from arsd.models.janus import JanusForImageGeneration
from arsd.models.llamagen_files import load_vq
from arsd.tokenizers.vq import VQTokenizer

KINDS = ("janus", "janus-original")
"""What :func:`find_kind` tells apart."""

_PARTS = ("gen_vision_config", "gen_aligner_config", "gen_head_config")  # which DeepSeek-VL and JanusFlow do not have
_VQ = ("model.vqmodel.", "gen_vision_model.")
_UNREAD = (*_VQ, "model.vision_model.", "model.aligner.", "lm_head.", "vision_model.", "aligner.", "language_model.lm_head.")
_RENAMES = {
    r"^language_model\.model\.": "language_model.",
    r"^gen_embed\.": "generation_embeddings.",
    r"^gen_aligner\.layers\.0\.": "generation_aligner.fc1.",
    r"^gen_head\.output_mlp_projector\.": "generation_head.proj_out.",
    r"^gen_head\.vision_head\.": "generation_head.vision_head.",
}


def find_kind(folder: str | Path) -> str | None:
    """Which of :data:`KINDS` a folder is, or ``None``; its configuration tells.

    Raises:
        CheckpointError: when that is damaged.
    """
    config = config_of(Path(folder))
    if config.get("model_type") == "janus":
        return "janus"
    return "janus-original" if config.get("model_type") == "multi_modality" and config.keys() >= set(_PARTS) else None


def load_janus_config(folder: str | Path) -> Any:
    """The configuration of a published folder, as transformers' ``JanusConfig``.

    Raises:
        CheckpointError: for a folder of another model, or values that do not make one.
    """
    folder = Path(folder)
    kind, content, path = find_kind(folder), config_of(folder), folder / "config.json"
    if kind is None:
        raise CheckpointError(f"{folder} is no folder of Janus-Pro or Janus: give one")
    if kind == "janus":
        return load_config(JanusConfig, content, path)
    try:
        vq, aligner, head = ({**content[part]["params"]} for part in _PARTS)
        made = {
            "text_config": content["language_config"] | {"model_type": "llama"},
            "vision_config": {"image_size": content["vision_config"]["params"].get("image_size", 384)},
            "vq_config": {
                "embed_dim": vq["n_embed"],
                "num_embeddings": vq["image_token_size"],
                "projection_dim": aligner["n_embed"],
                "num_hidden_layers": aligner["depth"],
                "image_token_embed_dim": head["n_embed"],
            },
            "tie_word_embeddings": False,
        }
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{path} does not give the sizes of a Janus ({type(error).__name__}: {error})"
        raise CheckpointError(f"{what}: download it again") from error
    return load_config(JanusConfig, made, path)


def load_janus(folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> JanusForImageGeneration:
    """The network of a published folder; see :func:`arsd.models.folders.load_network` for options and errors."""
    folder = Path(folder)
    config = load_janus_config(folder)
    renames = None
    if find_kind(folder) == "janus-original":
        layers = range(1, config.vq_config.num_hidden_layers)
        renames = _RENAMES | {
            rf"^gen_aligner\.layers\.{2 * i}\.": f"generation_aligner.hidden_layers.{i - 1}." for i in layers
        }
    return load_network(JanusForImageGeneration, folder, config, renames=renames, unread=_UNREAD, dtype=dtype, **options)


def vq_source(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of the image tokenizer in a published folder, by LlamaGen's key or that of transformers.

    Raises:
        CheckpointError: when there are none, or files are missing or damaged.
    """
    found = read_tensors(Path(folder), lambda key: key.startswith(_VQ))
    if not found:
        what = "LlamaGen's vq_ds16_t2i.pt or the folder of a whole Janus"
        raise CheckpointError(f"{folder} holds no image tokenizer ({' or '.join(_VQ)}*): give vq=..., {what}")
    return {key.removeprefix(_VQ[0]).removeprefix(_VQ[1]): value for key, value in found.items()}


def load_janus_vq(source: str | Path | Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> VQTokenizer:
    """The image tokenizer of :func:`vq_source`'s tensors, of a Janus folder, or of LlamaGen's own file (``vq_ds16_t2i.pt``).

    Raises:
        CheckpointError: as :func:`arsd.models.llamagen_files.load_vq`.
    """
    if isinstance(source, (str, Path)) and find_kind(source) is not None:
        source = vq_source(source)
    return load_vq(source, dtype=dtype)


JANUS = PublishedFiles(
    kinds=KINDS,
    find_kind=find_kind,
    network=load_janus,
    tokenizer=load_fast_tokenizer,
    vq_source=vq_source,
    vq=load_janus_vq,
    vq_class=VQTokenizer,
)
