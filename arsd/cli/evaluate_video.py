"""``arsd evaluate CLIPS --video``: Frechet video distance (FVD with I3D), CLIP score, consistency, flicker and motion."""

from __future__ import annotations

import argparse
from typing import Any

from arsd.cli.common import quiet, read_prompts, table
from arsd.errors import InputError

NUM_FRAMES = 16
_CHOICES = ("num_frames", "pick", "fps", "consistency")
_OF_PICTURES = ("decoders", "frontier", "protocol", "data")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """--video, --num-frames, --pick, --fps, --consistency."""
    clips = parser.add_argument_group("clips")
    networks = "--features emoji-video-chat, i3d:PATH (FVD), frames:EXTRACTOR"
    clips.add_argument("--video", action="store_true", help=f"FOLDERs hold clips: files, or folders of frames; {networks}")
    clips.add_argument("--num-frames", type=int, metavar="N", help=f"of each clip; 0: all (default: {NUM_FRAMES})")
    clips.add_argument("--pick", choices=("even", "first"), help="frames spread over the clip (default), or its first ones")
    clips.add_argument("--fps", type=float, help="with --pick first: at so many frames per second")
    clips.add_argument("--consistency", metavar="EXTRACTOR", help="of frames, as --features of pictures; none: leave it out")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise InputError where options of clips and of pictures are mixed."""
    given = [name for name in _CHOICES if getattr(arguments, name) is not None]
    if given and not arguments.video:
        raise InputError(f"--{given[0].replace('_', '-')} is about clips: pass --video as well")
    if not arguments.video:
        return
    wrong = [name for name in _OF_PICTURES if getattr(arguments, name)]
    if wrong:
        raise InputError(f"--{wrong[0]} is about pictures: leave it out, or leave out --video")
    if not arguments.folders:
        raise InputError("no clips were given: arsd evaluate CLIPS --video --reference REAL")
    if arguments.stats is not None and arguments.reference is not None:
        raise InputError("give --reference or --stats, not both")
    if arguments.num_frames is not None and arguments.num_frames < 0:
        raise InputError(f"--num-frames must not be negative, but is {arguments.num_frames}")


def evaluate_clips(arguments: argparse.Namespace, bar: Any) -> dict[str, Any]:
    """Judge sets of clips, write what ``--out`` asks for, print the table.

    Args:
        arguments: of the command line.
        bar: makes a progress bar of a name, a number of clips and a unit.

    Returns:
        The evaluation card.
    """
    from arsd.metrics.card import write_card
    from arsd.metrics.report import to_csv
    from arsd.metrics.video_card import make_video_card, video_markdown, video_table
    from arsd.metrics.video_clips import Clips
    from arsd.metrics.video_judge import judge_clips
    from arsd.run_folders import write_atomically

    prompts = None if arguments.prompts is None else read_prompts([], arguments.prompts)
    judge = _judge(arguments)
    total = sum(len(Clips.open(source, judge.pick, arguments.pictures)) for source in arguments.folders)
    source = arguments.stats or arguments.reference
    if source is not None:
        with bar("reference", None, "clips", arguments.json) as shown:
            judge.set_reference(source, progress=shown.update)
    with bar("judging", total, "clips", arguments.json) as shown:
        rows = judge_clips(arguments.folders, judge, prompts, arguments.pictures, shown.update)
    card = make_video_card(judge, rows)
    if arguments.out is not None:
        write_atomically(arguments.out / "table.csv", to_csv(rows))
        write_atomically(arguments.out / "table.md", video_markdown(card))
        write_card(arguments.out / "card.json", card)
    if not arguments.json:
        header, rows_for_people, notes = video_table(card)
        print("\n".join([table(header, rows_for_people), *notes]))
    return card


def _judge(arguments: argparse.Namespace) -> Any:
    from arsd.devices import resolve_device
    from arsd.metrics.extractors import find_extractor, find_scorer
    from arsd.metrics.images import Resizer
    from arsd.metrics.video import SHIPPED, find_video_extractor
    from arsd.metrics.video_clips import FramePick
    from arsd.metrics.video_judge import VideoJudge

    count = NUM_FRAMES if arguments.num_frames is None else arguments.num_frames or None
    pick = FramePick(count, arguments.pick or "even", arguments.fps)
    resizer = Resizer.parse(arguments.resizer or "none")
    device = resolve_device(arguments.device)
    names = [arguments.features or SHIPPED, arguments.consistency or "emoji-clip", arguments.scorer or "emoji-clip"]
    with quiet():
        features = find_video_extractor(names[0], device)
        consistency = None if names[1] == "none" else find_extractor(names[1], device)
        scorer = None if names[2] == "none" else find_scorer(names[2], device)
    return VideoJudge(features, consistency, scorer, pick, resizer, arguments.prefix or "")
