"""``arsd train data | vq | target``: make emoji-128 from scratch, stage by stage; each stage resumes where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command and its stages."""
    parser = commands.add_parser("train", help="train the shipped model from scratch", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    data = stages.add_parser("data", help="fetch and split the emoji pictures")
    data.add_argument("--source", metavar="TGZ", help="the npm archive; fetched with npm when not given")
    data.add_argument("--out", type=Path, default=Path("runs/data"))
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


def run_data(arguments: argparse.Namespace) -> int:
    """Stage ``data``."""
    from arsd.training.data import build_emoji_data

    data = build_emoji_data(arguments.source)
    data.save(arguments.out)
    concepts = {c for c, out in zip(data.concepts, data.held_out, strict=True) if out}
    held, every = int(data.held_out.sum()), len(set(data.concepts))
    print(f"{len(data.captions)} pictures of {every} concepts in {arguments.out}/")
    print(f"held out: {held} pictures of {len(concepts)} concepts")
    return 0


def run_vq(arguments: argparse.Namespace) -> int:
    """Stage ``vq``."""
    from arsd.training.vq import train_vq

    train_vq(arguments.data, arguments.out, minutes=arguments.minutes)
    print(f"tokenizer in {arguments.out / 'vq'}/")
    return 0


def run_target(arguments: argparse.Namespace) -> int:
    """Stage ``target``."""
    from arsd.training.target import ship, train_target

    options = {"minutes": arguments.minutes, "layers": arguments.layers, "width": arguments.width, "init": arguments.init}
    pipe = train_target(arguments.data, arguments.vq, arguments.out, **options)
    ship(pipe, arguments.out / "shipped")
    print(f"pipeline in {arguments.out / 'shipped'}/")
    return 0
