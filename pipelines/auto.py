"""``AutoARPipeline``: find the pipeline class that a folder, a shipped name or a hub id needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from arsd.errors import CheckpointError
from arsd.pipelines.base import ARImagePipeline
from arsd.pipelines.llamagen import LlamaGenPipeline

PIPELINES: dict[str, type[ARImagePipeline]] = {cls.__name__: cls for cls in (LlamaGenPipeline,)}
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
if not CHECKPOINTS.is_dir():  # reached through the link arsd/pipelines -> pipelines
    CHECKPOINTS = Path(__file__).resolve().parent.parent / "arsd" / "checkpoints"


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))


def find_model(name: str | Path, **hub: Any) -> Path:
    """The folder of a model: a shipped name, a local folder, or a hub id (downloaded).

    Raises:
        CheckpointError: when it is none of them.
    """
    if str(name) in shipped_models():
        return CHECKPOINTS / str(name)
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder} has no model_index.json: give a pipeline folder, or use LlamaGenPipeline.from_single_file"
        )
    if str(name).count("/") != 1:
        raise CheckpointError(
            f"no model {str(name)!r}: shipped models are {', '.join(shipped_models())}; else give a folder or hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), **hub))
    except Exception as error:  # the hub client raises a dozen types: missing, gated, offline, no disk
        raise CheckpointError(
            f"could not get {name!r} from the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


class AutoARPipeline:
    """Picks the class named in ``model_index.json``; not instantiated itself."""

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        dtype: Any = None,
        **components: Any,
    ) -> ARImagePipeline:
        """Load a pipeline.

        Args:
            name: shipped name (``emoji-128``), pipeline folder, or hub id.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept.
            dtype: of all weights; float32 by default.
            components: components that replace the saved ones, e.g. ``decoder=arsd.SJD(window=32)``.

        Raises:
            CheckpointError: when there is no such model, or its files are damaged.
        """
        folder = find_model(name, revision=revision, cache_dir=cache_dir)
        try:
            class_name = str(json.loads((folder / "model_index.json").read_bytes())["_class_name"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{folder / 'model_index.json'} is damaged ({error}): download the folder again") from None
        if class_name not in PIPELINES:
            raise CheckpointError(f"{folder} needs the pipeline {class_name!r}; known are {', '.join(PIPELINES)}")
        try:
            return PIPELINES[class_name].from_pretrained(str(folder), dtype=dtype or torch.float32, **components)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"could not load {folder}: {' '.join(str(error).split())[:300]}") from error
