"""``arsd generate`` for models that make clips: animated WebP files with their record, and MP4 beside them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arsd.cli.common import inputs_of, load_pipeline, sampling, size, table
from arsd.errors import InputError

SUFFIXES = (".webp", ".mp4")


def planned(names: list[str], n: int, seed: int, out: Path) -> list[list[Path]]:
    """The file of every clip, without suffix: ``out`` itself where it names a file, else a name in the folder ``out``.

    Raises:
        InputError: for a file name for several clips.
    """
    from arsd.cli.generate import planned_paths

    if out.suffix.lower() not in SUFFIXES:
        return [[path.with_suffix("") for path in paths] for paths in planned_paths(names, n, seed, out)]
    if len(names) * n > 1:
        raise InputError(f"--out {out} is one file, and there are {len(names) * n} clips: give a folder")
    return [[out.with_suffix("")]]


def run(arguments: argparse.Namespace) -> int:
    """Generate, write, report."""
    import torch
    from PIL import Image

    from arsd.cli.generate import open_picture
    from arsd.clip_files import mp4_bytes, save_webp, write_file
    from arsd.decoding import parse_strategy
    from arsd.provenance import picture_entry, tokens_sha256
    from arsd.video import read_video

    given = parse_strategy(arguments.decoder) if arguments.decoder is not None else None
    options = {
        "num_videos_per_prompt": arguments.n,
        "num_frames": arguments.num_frames,
        **size(arguments),
        **sampling(arguments),
    }
    if arguments.image is not None and arguments.clip is not None:
        raise InputError("give --image or --clip, not both")
    if arguments.actions is not None:
        options["actions"] = read_actions(arguments.actions)
    if arguments.negative_prompt is not None:
        raise InputError("models that make clips take no --negative-prompt")
    begun = arguments.image or arguments.clip
    named = bool(arguments.prompt or arguments.prompts or arguments.class_label)
    inputs: list[dict[str, Any]] = inputs_of(arguments) if named or begun is None else [{}]
    names = [str(next(iter(one.values()), Path(str(begun)).stem)) for one in inputs]
    plan = planned(names, arguments.n, arguments.seed, Path(arguments.out))
    taken = [path for paths in plan for stem in paths for s in SUFFIXES if (path := Path(f"{stem}{s}")).exists()]
    if taken and not arguments.overwrite:
        raise InputError(f"{taken[0]} exists: choose another --out, or pass --overwrite")
    if arguments.image is not None:
        options["frames"] = open_picture(arguments.image)
    pipe, weights = load_pipeline(arguments)
    if arguments.clip is not None:
        shown, _ = read_video(arguments.clip)
        if len(shown) < arguments.clip_frames:
            raise InputError(f"{arguments.clip} has {len(shown)} frames, not {arguments.clip_frames} (--clip-frames)")
        options["frames"] = [Image.fromarray(frame) for frame in shown[: arguments.clip_frames]]
    plan[0][0].parent.mkdir(parents=True, exist_ok=True)
    decoder, rate = given or pipe.decoder, arguments.fps or pipe.frame_rate
    show = not arguments.json
    pipe.set_progress_bar_config(disable=None if show else True, unit="token", leave=False)
    videos, rows, missing = [], [], ""
    for given_input, name, stems in zip(inputs, names, plan, strict=True):
        made = pipe(**given_input, decoder=decoder, generator=torch.Generator().manual_seed(arguments.seed), **options)
        entries = []
        for i, stem in enumerate(stems):
            record = {**pipe.record(made, i), "model": arguments.model, "seed": arguments.seed}
            path = Path(f"{stem}.webp")
            save_webp(made.frames[i], path, record, rate, overwrite=arguments.overwrite)
            entry = {
                **picture_entry(made, i),
                "prompt": given_input.get("prompt"),
                "path": str(path),
                "frames": len(made.frames[i]),
            }
            try:
                write_file(mp4_bytes(made.frames[i], rate), f"{stem}.mp4", overwrite=arguments.overwrite)
                entry["mp4"] = f"{stem}.mp4"
            except InputError as error:
                missing = str(error)
            entries.append(entry)
        videos += entries
        stats = made.stats
        figures = [stats.forward_passes, f"{stats.tokens_per_pass:.2f}", f"{stats.total_seconds:.2f}"]
        rows.append([name, str(decoder), *figures, ""])
        if arguments.compare:
            plain = pipe(**given_input, decoder="ar", generator=torch.Generator().manual_seed(arguments.seed), **options)
            for i, entry in enumerate(entries):
                changed = int((plain.tokens[i] != made.tokens[i]).sum())
                same = {"tokens_sha256": tokens_sha256(plain.tokens[i]), "changed_tokens": changed}
                entry["ar"] = {**picture_entry(plain, i), **same}
            stats, differ = plain.stats, int((plain.tokens != made.tokens).sum())
            rows[-1][-1] = "same tokens" if not differ else f"{differ} of {plain.tokens.numel()} tokens differ"
            figures = [stats.forward_passes, f"{stats.tokens_per_pass:.2f}", f"{stats.total_seconds:.2f}"]
            rows.append(["", "ar", *figures, ""])
    told = {"model": arguments.model, "model_hash": weights, "decoder": str(decoder), "lossless": decoder.lossless}
    if arguments.json:
        print(json.dumps({**told, "seed": arguments.seed, "frame_rate": rate, "videos": videos}, ensure_ascii=False))
        return 0
    print(table(["prompt", "decoder", "passes", "tokens/pass", "seconds", "against plain AR"], rows))
    files = ", ".join(entry["path"] + (", " + entry["mp4"] if "mp4" in entry else "") for entry in videos[:3])
    print(f"{files}{', ...' if len(videos) > 3 else ''}")
    if missing:
        print(f"no MP4: {missing}")
    return 0


def read_actions(path: str) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read actions from {path}: {error}") from None


def makes_clips(model: str) -> bool:
    """Whether a model (shipped name, path or hub id) makes clips.

    Raises:
        CheckpointError: when there is no such model.
    """
    from arsd.pipelines.auto import find_model
    from arsd.pipelines.families import pipeline_for, recognise
    from arsd.pipelines.video import ARVideoPipeline

    return issubclass(pipeline_for(recognise(find_model(model))), ARVideoPipeline)
