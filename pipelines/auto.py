"""``AutoARPipeline``: find the pipeline that a folder, a weight file, a shipped name or a hub id needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from arsd.errors import CheckpointError, InputError
from arsd.pipelines.checks import dtype_of
from arsd.pipelines.families import PIPELINES, pipeline_for, recognise

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
if not CHECKPOINTS.is_dir():  # reached through the link arsd/pipelines -> pipelines
    CHECKPOINTS = Path(__file__).resolve().parent.parent / "arsd" / "checkpoints"


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))


def find_model(name: str | Path, **hub: Any) -> Path:
    """Where a model is: a shipped name, a local folder or weight file, or a hub id (downloaded).

    Raises:
        CheckpointError: when it is none of them.
    """
    if str(name) in shipped_models():
        return CHECKPOINTS / str(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if str(name).count("/") != 1:
        raise CheckpointError(
            f"no model {str(name)!r}: shipped models are {', '.join(shipped_models())}; else give a folder, file or hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), **hub))
    except Exception as error:  # the hub client raises a dozen types: missing, gated, offline, no disk
        raise CheckpointError(
            f"could not get {name!r} from the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def caption_source(folder: Path) -> Path | None:
    """The model whose tokenizer and text encoder a saved pipeline reads its captions with, where it has none of its own.

    Raises:
        CheckpointError: when there is no such model.
    """
    index = folder / "model_index.json"
    named = json.loads(index.read_bytes()).get("captions") if index.is_file() else None
    return find_model(named) if named and not (folder / "text_encoder").is_dir() else None


class AutoARPipeline:
    """Recognises what it is given by its content; not instantiated itself."""

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        dtype: Any = None,
        **components: Any,
    ) -> Any:
        """Load a pipeline.

        Args:
            name: shipped name (``emoji-128``), pipeline folder, published folder or weight file (see ``arsd models``), or
                hub id.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept.
            dtype: of all weights; by default float32 for a pipeline folder, else that of the published files.
            components: components that replace the saved ones, e.g. ``decoder=arsd.SJD(window=32)``; of published files also
                those that lie elsewhere (``vq=...``, ``text_encoder=...``), and options of the class that loads them.

        Raises:
            CheckpointError: when there is no such model, or its files are damaged.
        """
        path = find_model(name, revision=revision, cache_dir=cache_dir)
        kind, dtype = recognise(path), dtype_of(dtype, components)
        pipeline: Any = pipeline_for(kind)
        if kind in PIPELINES:
            dtype = dtype or torch.float32
        load = pipeline.from_single_file if kind == "llamagen" else pipeline.from_pretrained
        try:
            return load(str(path), dtype=dtype, **components)
        except (CheckpointError, InputError):
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"could not load {path}: {' '.join(str(error).split())[:200]}") from error
