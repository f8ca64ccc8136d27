"""Published folders of GLM-Image: a pipeline of diffusers, whose components are checked before and after it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import GlmImagePipeline
from safetensors import SafetensorError, safe_open

from arsd.devices import DTYPES
from arsd.errors import CheckpointError
from arsd.models.folders import config_of, read_json

INDEX = "model_index.json"
LANGUAGE = "vision_language_encoder"
NETWORKS = (LANGUAGE, "text_encoder", "transformer", "vae")


def glm_image_kind(folder: Path) -> str | None:
    """``glm-image`` for a folder in the published layout, else ``None``."""
    try:
        return "glm-image" if read_json(folder / INDEX).get("_class_name") == GlmImagePipeline.__name__ else None
    except CheckpointError:
        return None


def load_glm_image(folder: Path, dtype: torch.dtype | None = None, **options: Any) -> GlmImagePipeline:
    """Diffusers' pipeline of a published folder.

    Args:
        folder: in diffusers' layout.
        dtype: of all weights; by default that of the language model's files.
        options: of diffusers' ``from_pretrained``: components (``None``: leave it out), ``device_map``,
            ``quantization_config`` and so on.

    Raises:
        CheckpointError: when files are missing or damaged, or do not make up these networks.
    """
    parts = [name for name, kind in read_json(folder / INDEX).items() if isinstance(kind, list) and kind[0]]
    missing = [name for name in parts if name not in options and not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} has no {', '.join(missing)}: download the whole folder of GLM-Image")
    bare = [name for name in NETWORKS if name not in options and not (folder / name / "config.json").is_file()]
    if bare:
        raise CheckpointError(f"{folder / bare[0]} has no config.json: download it with the weights")
    held = {name: _keys(folder / name) for name in NETWORKS if name not in options}
    dtype = dtype or DTYPES.get(str(config_of(folder / LANGUAGE).get("dtype")))
    try:
        pipe = GlmImagePipeline.from_pretrained(str(folder), dtype=dtype or torch.float32, **options)
    except Exception as error:  # diffusers, transformers and their tokenizers raise a dozen types for damaged files
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} is no pipeline of GLM-Image ({what}): download it again") from error
    for name, keys in held.items():
        network = getattr(pipe, name)
        tied = {word for pair in dict(getattr(network, "_tied_weights_keys", None) or {}).items() for word in pair}
        known = keys | tied if keys & tied else keys
        lost = sorted(key for key, _ in network.named_parameters() if key not in known) if keys else []
        if lost:
            raise CheckpointError(f"{folder / name} lacks {len(lost)} weights, such as {lost[0]}: download it again")
    return pipe


def _keys(folder: Path) -> set[str]:
    """The keys of all weights, from the headers of the files; none, where the container is another one."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found |= set(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated, corrupt or no weight file: download it again") from error
    if not found and not any(folder.glob("*.bin*")):
        raise CheckpointError(f"{folder} has no weights: download them")
    return found
