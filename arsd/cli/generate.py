"""``arsd generate``: prompts to PNG files, or to clips, that carry their own provenance."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arsd.cli.common import (
    add_input_options,
    add_model_options,
    add_sampling_options,
    inputs_of,
    load_pipeline,
    makes_clips,
    sampling,
    size,
)
from arsd.cli.making import Account, open_picture, planned_paths, refuse_taken
from arsd.errors import InputError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("generate", help="make pictures", description=__doc__)
    parser.add_argument("prompt", nargs="*", help="one or more prompts")
    add_input_options(parser)
    parser.add_argument(
        "--decoder", default=None, help="ar, sjd, sjd:window=16,coupling=maximal, ... (default: the model's own)"
    )
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="instead of the published one (Emu3, SimpleAR)")
    parser.add_argument("--image", metavar="FILE", help="a picture to be continued: its upper part is kept")
    parser.add_argument("--strength", type=float, default=0.5, help="share of --image that is made anew (default: 0.5)")
    clips = parser.add_argument_group("models that make clips")
    clips.add_argument("--clip", metavar="FILE", help="a clip whose first frames are kept (--image: a picture)")
    clips.add_argument("--clip-frames", type=int, default=1, metavar="N", help="how many of --clip (default: 1)")
    clips.add_argument("--actions", metavar="JSON", help="a file with an action for each frame but the last (MineWorld)")
    clips.add_argument("--num-frames", type=int, help="frames of a clip (default: the model's own number)")
    clips.add_argument("--fps", type=float, help="frames per second of the files (default: the model's own)")
    add_sampling_options(parser)
    add_model_options(parser)
    parser.add_argument("--compare", action="store_true", help="also run plain AR with the same seed and compare")
    parser.add_argument("--out", default="outputs", metavar="DIR", help="a folder; for one clip also NAME.webp")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise InputError for numbers that make no sense, before anything is loaded."""
    from arsd.decoding import LawConfig

    if arguments.n < 1:
        raise InputError(f"--n must be at least 1, not {arguments.n}")
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2^63-1, not {arguments.seed}")
    if arguments.clip_frames < 1:
        raise InputError(f"--clip-frames must be at least 1, not {arguments.clip_frames}")
    if arguments.fps is not None and not 0.1 <= arguments.fps <= 1000:
        raise InputError(f"--fps must lie in 0.1..1000, not {arguments.fps}")
    LawConfig(**{name: value for name, value in sampling(arguments).items() if value is not None})


def run(arguments: argparse.Namespace) -> int:
    """Generate, write, report."""
    from arsd.cli import clips
    from arsd.decoding import parse_strategy
    from arsd.provenance import save_png

    check_numbers(arguments)
    if makes_clips(arguments.model):
        return clips.run(arguments)
    of_clips = [name for name in ("clip", "num_frames", "fps", "actions") if getattr(arguments, name) is not None]
    if of_clips:
        raise InputError(
            f"--{of_clips[0].replace('_', '-')} is for models that make clips, which {arguments.model} does not"
        )
    inputs = inputs_of(arguments)
    prompts = [str(next(iter(one.values()))) for one in inputs]
    given = parse_strategy(arguments.decoder) if arguments.decoder is not None else None
    out = Path(arguments.out)
    plan = planned_paths(prompts, arguments.n, arguments.seed, out)
    refuse_taken([path for paths in plan for path in paths], arguments.overwrite)
    options = {"num_images_per_prompt": arguments.n, **size(arguments), **sampling(arguments)}
    if arguments.negative_prompt is not None:
        options["negative_prompt"] = arguments.negative_prompt
    if arguments.image is not None:
        options |= {"image": open_picture(arguments.image), "strength": arguments.strength}
    out.mkdir(parents=True, exist_ok=True)
    pipe, weights = load_pipeline(arguments)
    account = Account.of(arguments, pipe, given)

    def write(made: Any, i: int, path: Path) -> dict[str, Any]:
        record = {**pipe.record(made, i), "model": arguments.model, "seed": arguments.seed}
        save_png(made.images[i], path, record, overwrite=arguments.overwrite)
        return {"path": str(path)}

    for given_input, prompt, paths in zip(inputs, prompts, plan, strict=True):
        account.make(prompt, {**given_input, **options}, paths, write)
    if arguments.json:
        print(account.as_json(arguments.model, weights, images=account.entries))
    else:
        print(account.as_table())
        print(f"{len(account.entries)} picture{'s' * (len(account.entries) > 1)} in {out}/")
    return 0
