"""``arsd generate`` for models that make clips: animated WebP files with their record, and MP4 beside them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arsd.cli.common import inputs_of, load_pipeline, sampling, size
from arsd.cli.making import Account, open_picture, planned_paths, refuse_taken
from arsd.errors import InputError

SUFFIXES = (".webp", ".mp4")


def planned(names: list[str], n: int, seed: int, out: Path) -> list[list[Path]]:
    """The file of every clip, without suffix: ``out`` itself where it names a file, else a name in the folder ``out``.

    Raises:
        InputError: for a file name for several clips.
    """
    if out.suffix.lower() not in SUFFIXES:
        return [[path.with_suffix("") for path in paths] for paths in planned_paths(names, n, seed, out)]
    if len(names) * n > 1:
        raise InputError(f"--out {out} is one file, and there are {len(names) * n} clips: give a folder")
    return [[out.with_suffix("")]]


def run(arguments: argparse.Namespace) -> int:
    """Generate, write, report."""
    from PIL import Image

    from arsd.clip_files import mp4_bytes, save_webp, write_file
    from arsd.decoding import parse_strategy
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
    refuse_taken([Path(f"{stem}{suffix}") for stems in plan for stem in stems for suffix in SUFFIXES], arguments.overwrite)
    if arguments.image is not None:
        options["frames"] = open_picture(arguments.image)
    pipe, weights = load_pipeline(arguments)
    if arguments.clip is not None:
        shown, _ = read_video(arguments.clip)
        if len(shown) < arguments.clip_frames:
            raise InputError(f"{arguments.clip} has {len(shown)} frames, not {arguments.clip_frames} (--clip-frames)")
        options["frames"] = [Image.fromarray(frame) for frame in shown[: arguments.clip_frames]]
    plan[0][0].parent.mkdir(parents=True, exist_ok=True)
    rate, missing = arguments.fps or pipe.frame_rate, []
    account = Account.of(arguments, pipe, given)

    def write(made: Any, i: int, stem: Path) -> dict[str, Any]:
        record = {**pipe.record(made, i), "model": arguments.model, "seed": arguments.seed}
        entry: dict[str, Any] = {"path": f"{stem}.webp", "frames": len(made.frames[i])}
        save_webp(made.frames[i], entry["path"], record, rate, overwrite=arguments.overwrite)
        try:
            write_file(mp4_bytes(made.frames[i], rate), f"{stem}.mp4", overwrite=arguments.overwrite)
        except InputError as error:
            missing.append(str(error))
            return entry
        return {**entry, "mp4": f"{stem}.mp4"}

    for given_input, name, stems in zip(inputs, names, plan, strict=True):
        account.make(name, {**given_input, **options}, stems, write)
    if arguments.json:
        print(account.as_json(arguments.model, weights, frame_rate=rate, videos=account.entries))
        return 0
    print(account.as_table())
    files = ", ".join(entry["path"] + (", " + entry["mp4"] if "mp4" in entry else "") for entry in account.entries[:3])
    print(f"{files}{', ...' if len(account.entries) > 3 else ''}")
    if missing:
        print(f"no MP4: {missing[-1]}")
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
