"""``arsd demo``: the shipped model with plain AR and with SJD, side by side, in float32."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arsd.cli import generate
from arsd.cli.common import DEFAULT_MODEL
from arsd.cli.making import planned_paths

PROMPTS = ("red apple", "dog face", "pizza", "rocket")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("demo", help="plain AR against SJD on a few prompts", description=__doc__)
    parser.add_argument("--out", default="outputs/demo", metavar="DIR")
    parser.add_argument("--seed", type=int, default=7)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``arsd generate --compare`` on the demo's prompts, then a sheet of the pictures."""
    from PIL import Image

    from arsd.sheets import contact_sheet

    out = Path(arguments.out)
    options = ["--compare", "--overwrite", "--seed", str(arguments.seed), "--out", str(out), "--model", DEFAULT_MODEL]
    options += ["--dtype", "float32"]  # in bfloat16 a pass of another length may flip a near-tie, and the pictures part
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    status = generate.run(parser.parse_args(["generate", *PROMPTS, *options, "--decoder", "sjd"]))
    paths = [path for paths in planned_paths(list(PROMPTS), 1, arguments.seed, out) for path in paths]
    sheet = contact_sheet([Image.open(path).convert("RGB") for path in paths], PROMPTS, columns=4, lines=1)
    sheet.save(out / "sheet.png")
    print(f"all of them on one sheet: {out / 'sheet.png'}")
    return status
