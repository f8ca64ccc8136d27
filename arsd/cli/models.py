"""``arsd models``: what can be loaded."""

from __future__ import annotations

import argparse
import json
from typing import Any

from arsd.cli.common import table


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("models", help="list the models that ship with the package", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from arsd.pipelines.auto import find_model, shipped_models
    from arsd.provenance import model_hash

    rows = []
    for name in shipped_models():
        folder = find_model(name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
        rows.append({"name": name, "pipeline": kind, "megabytes": round(size / 1e6, 1), "model_hash": model_hash(folder)})
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(table(["name", "pipeline", "MB", "model hash"], [[*row.values()] for row in rows]))
    return 0
