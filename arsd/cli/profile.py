"""``arsd profile``: measure what a pass costs on this machine, so that ``window=auto`` knows the fastest window."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arsd.cli.common import add_model_options, load_pipeline, read_prompts, table
from arsd.errors import InputError

PROMPTS = ("red apple", "dog face", "pizza", "rocket", "blue heart", "cat face", "pear", "guitar")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("profile", help="measure pass costs for window=auto", description=__doc__)
    parser.add_argument("--prompt", nargs="+", default=[], help="prompts whose passes are counted")
    parser.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line")
    parser.add_argument("--batches", type=int, nargs="+", help="rows per pass (default: 1 2 4 8 16)")
    parser.add_argument("--windows", type=int, nargs="+", help="candidates (default: 4 8 12 16 24 32 48 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", metavar="FILE", help="default: a name of its own in ~/.cache/arsd/profiles")
    parser.add_argument("--show", action="store_true", help="measure nothing: print the profile that would be used")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure (or look up), write, print."""
    from arsd.devices import device_kind, dtype_name
    from arsd.profile import find_profile, user_folder
    from arsd.profiling import BATCHES, WINDOWS, make_profile

    pipe, weights = load_pipeline(arguments)
    if arguments.show:
        profile = find_profile(weights, device_kind(pipe.device), dtype_name(pipe))
        if profile is None:
            raise InputError(f"nothing is known of {arguments.model} on this kind of device: arsd profile measures it")
        where = ""
    else:

        def progress(text: str) -> None:
            print(f"\r{text:40}", end="", file=sys.stderr, flush=True)

        inputs = profile_inputs(pipe, arguments)
        batches, windows = arguments.batches or BATCHES, arguments.windows or WINDOWS
        profile = make_profile(pipe, Path(arguments.model).name, inputs, batches, windows, arguments.repeats, progress)
        print(file=sys.stderr)
        path = Path(arguments.out) if arguments.out else user_folder() / profile.file_name
        profile.save(path)
        where = str(path)
    if arguments.json:
        print(json.dumps({"path": where, **asdict(profile)}))
        return 0
    here = device_kind(pipe.device)
    nearest = "" if profile.device_kind == here else f" (the nearest to this one, {here})"
    print(f"{profile.model} ({profile.model_hash[:12]}), {profile.device_kind}{nearest}, {profile.dtype}\n")
    print(profile_table(profile))
    if where:
        print(f"\nwritten to {where}")
    return 0


def profile_inputs(pipe: Any, arguments: argparse.Namespace) -> list[Any]:
    """The given prompts; else class labels, or a few words that the shipped model knows."""
    if arguments.prompt or arguments.prompts:
        return list(read_prompts(arguments.prompt, arguments.prompts))
    if pipe.takes_classes:
        return [label % int(pipe.transformer.config["num_classes"]) for label in range(8)]
    return list(PROMPTS)


def profile_table(profile: Any) -> str:
    """Milliseconds of a round and what ``auto`` takes, by batch."""
    windows = sorted(next(iter(profile.costs.values())))
    header = ["batch", *(f"{w} tokens, ms" for w in windows), "auto", "against plain AR"]
    rows = []
    for batch, costs in sorted(profile.costs.items()):
        chosen = profile.window(batch)
        gain = profile.seconds(batch, 1) / profile.seconds(batch, chosen)
        rows.append([batch, *(f"{1e3 * costs[w]:.1f}" for w in windows), chosen, f"{gain:.2f}x"])
    means = [sum(p) / len(p) for _, p in sorted(profile.passes.items())]
    rows.append(["tokens per pass", "1.00", *(f"{profile.num_tokens / m:.2f}" for m in means), "", ""])
    return table(header, rows)
