"""Folders that long runs write: each belongs to one configuration, and a file is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arsd.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Write next to ``path``, then rename.

    Raises:
        DataError: when it cannot be written (no disk, no permission).
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None


def claim_folder(folder: Path, settings: dict[str, Any], made: Sequence[str] = ("samples.pt", "checkpoint.pt")) -> None:
    """A run folder belongs to one configuration, kept in its ``run.json``.

    Args:
        folder: made when it is not there.
        settings: the configuration.
        made: patterns of files that a run leaves behind; with one of them but no ``run.json`` the folder is a stranger's.

    Raises:
        DataError: when it belongs to another.
    """
    path, wanted = folder / "run.json", json.loads(json.dumps(settings))
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in {**wanted, **known} if known.get(key) != wanted.get(key)]
        except (ValueError, AttributeError):
            raise DataError(f"{path} is damaged: delete {folder} or use a new --out") from None
        if other:
            raise DataError(f"{folder} is a run with another {', '.join(other)}: delete it or use a new --out")
        return
    found = [file.name for pattern in made for file in sorted(folder.glob(pattern))]
    if found:
        raise DataError(f"{folder} holds {', '.join(found[:3])} of an unknown run: delete it or use a new --out")
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")
