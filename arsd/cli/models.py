"""``arsd models``: what can be loaded, and what a folder or file is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from arsd.cli.common import table
from arsd.errors import CheckpointError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("models", help="list the models that can be loaded", description=__doc__)
    parser.add_argument("path", nargs="*", help="say what these folders or weight files are, instead")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    if arguments.path:
        return _tell(arguments)
    from arsd.pipelines.families import FAMILIES

    shipped = _shipped()
    if arguments.json:
        rows = [{**row, "shipped": True} for row in shipped]
        print(json.dumps(rows + [{**asdict(family), "shipped": False} for family in FAMILIES]))
        return 0
    print("In the package:\n")
    print(table(["name", "pipeline", "MB", "model hash"], [[*row.values()] for row in shipped]))
    print("\nPublished checkpoints, as they are (all with seeds, batches, guidance and every decoder):\n")
    for family in FAMILIES:
        print(f"{family.name}\n  pipeline  {family.pipeline}\n  files     {family.files}")
        print(f"  also      {family.features}\n  tested    {family.tested}\n")
    print("arsd models PATH says what a folder or file is.")
    return 0


def _shipped() -> list[dict[str, Any]]:
    from arsd.pipelines.auto import caption_source, find_model, shipped_models
    from arsd.pipelines.video_parts import find_video_llm, shipped_video_llms
    from arsd.provenance import model_hash

    rows = []
    found = [(name, find_model(name)) for name in shipped_models()]
    for name, folder in found + [(name, find_video_llm(name)) for name in shipped_video_llms()]:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        index = folder / "model_index.json"
        kind = json.loads(index.read_text())["_class_name"] if index.is_file() else "VideoLLMPipeline"
        source = caption_source(folder)
        parts = [] if source is None else [source / "tokenizer", source / "text_encoder"]
        found_hash = model_hash(folder, *parts)
        rows.append({"name": name, "pipeline": kind, "megabytes": round(size / 1e6, 1), "model_hash": found_hash})
    return rows


def _tell(arguments: argparse.Namespace) -> int:
    """What each path is; fails at the first that is nothing."""
    found = [dict(zip(("path", "kind", "pipeline"), (path, *_kind(path)), strict=True)) for path in arguments.path]
    if arguments.json:
        print(json.dumps(found))
    else:
        print(table(["path", "kind", "pipeline"], [[*row.values()] for row in found]))
    return 0


def _kind(path: str) -> tuple[str, str]:
    """What a path or name is, and the pipeline that loads it."""
    from arsd.pipelines.auto import find_model
    from arsd.pipelines.families import pipeline_for, recognise
    from arsd.pipelines.video_parts import check_kind, shipped_video_llms

    if path in shipped_video_llms():
        return "video-llm", "VideoLLMPipeline"
    folder = find_model(path)
    try:
        kind = recognise(folder)
        return kind, pipeline_for(kind).__name__
    except CheckpointError as no_model_of_pictures:
        try:
            check_kind(folder)
        except CheckpointError:
            raise no_model_of_pictures from None
        return "video-llm", "VideoLLMPipeline"
