"""``arsd verify``: is each picture the plain AR sample of its seed? Exit status 0: all are, 1: one is not, 3: cannot say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arsd.cli.common import add_component_options, components, quiet, table
from arsd.errors import ArsdError, InputError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("verify", help="is a picture the plain AR sample of its seed?", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="PNG and WebP files that arsd wrote")
    parser.add_argument("--model", help="where the model is (default: the name in the picture)")
    add_component_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify and print."""
    missing = [name for name in arguments.files if not Path(name).is_file()]
    if missing:
        raise InputError(f"there is no file {missing[0]}")
    results = verify_files(arguments.files, arguments.model, arguments.device, **components(arguments))
    if arguments.json:
        print(json.dumps([result.as_dict() for result in results]))
    else:
        rows = [[r.path, r.result, r.mismatches, r.near_ties, r.forward_passes, r.reason] for r in results]
        print(table(["file", "result", "mismatches", "near-ties", "passes", "why"], rows))
    found = {result.result for result in results}
    return 1 if "refuted" in found else 3 if "unknown" in found else 0


def verify_files(files: list[str], model: str | None, device: str, **parts: Any) -> list[Any]:
    """Results in the order of the files; those of one model and dtype are verified together."""
    from arsd.devices import DTYPES, resolve_device
    from arsd.pipelines.auto import AutoARPipeline, find_model
    from arsd.provenance import read_record
    from arsd.verification import UNKNOWN, Verification, verify_pictures

    where = resolve_device(device)
    results: dict[int, Any] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(files):
        try:
            record = read_record(name)[1]
            groups.setdefault((model or str(record.get("model")), str(record.get("dtype"))), []).append(index)
        except ArsdError as error:
            results[index] = Verification(name, UNKNOWN, str(error))
    for (named, dtype), members in groups.items():
        try:
            if dtype not in DTYPES:
                raise InputError(f"its record is damaged (dtype {dtype!r})")
            with quiet():
                pipe = AutoARPipeline.from_pretrained(find_model(named), dtype=DTYPES[dtype], **parts).to(where)
            found = verify_pictures(pipe, [files[index] for index in members])
        except ArsdError as error:
            found = [Verification(files[index], UNKNOWN, str(error)) for index in members]
        results.update(zip(members, found, strict=True))
    return [results[index] for index in range(len(files))]
