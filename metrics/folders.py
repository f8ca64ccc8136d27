"""Folders of pictures, from anywhere, judged and compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arsd.errors import InputError
from arsd.metrics.drawing import DrawnSet
from arsd.metrics.images import Pictures
from arsd.metrics.judge import Judge, Seen
from arsd.metrics.resampling import FEWEST, bootstrap_mean, corrected


def prompts_of(folder: Path, given: Sequence[str] | None) -> list[str] | None:
    """The prompts of a folder's pictures: as given, else of their records where arsd drew them, else of ``prompts.txt``."""
    if given is not None:
        return list(given)
    if (folder / "run.json").is_file():
        inputs = DrawnSet.read(folder).inputs
        return [text for text in inputs if isinstance(text, str)] or None
    if (folder / "prompts.txt").is_file():
        return [line for line in (folder / "prompts.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def judge_folders(
    sources: Sequence[Path], judge: Judge, prompts: Sequence[str] | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """A row for each set of pictures; from the second one on, paired with the first where both have as many pictures.

    Args:
        sources: folders, zips or npz files.
        judge: networks and reference.
        prompts: of the pictures, in their order; found beside them where arsd drew them.
        limit: take the first so many pictures of each.

    Raises:
        DataError: when a source cannot be read.
        InputError: when prompts and pictures do not fit each other.
    """
    rows: list[dict[str, Any]] = []
    first: tuple[Pictures, Seen] | None = None
    for source in sources:
        pictures = Pictures.open(source, limit)
        texts = prompts_of(source, prompts)
        seen = judge.look(pictures, texts if texts is None or limit is None else texts[:limit])
        row: dict[str, Any] = {"folder": str(source), "pictures": len(pictures), "image format": pictures.format}
        row |= _drawing(source)
        row |= judge.figures(seen)
        if first is None:
            first = (pictures, seen)
        else:
            row |= paired(first, (pictures, seen), judge, corrected(0.95, len(sources) - 1))
        rows.append(row)
    return rows


def _drawing(source: Path) -> dict[str, Any]:
    """Decoding figures of a folder that arsd drew."""
    if not (source / "run.json").is_file():
        return {}
    drawn = DrawnSet.read(source)
    known = {"decoder": drawn.settings["decoder"], "tokens per pass": drawn.tokens_per_pass}
    known |= {"seconds per picture": drawn.seconds, "TV per token": float(drawn.changed.sum() / drawn.tokens.numel())}
    return known


def paired(
    first: tuple[Pictures, Seen], second: tuple[Pictures, Seen], judge: Judge, confidence: float = 0.95
) -> dict[str, Any]:
    """Two sets picture by picture: the same prompts in the same order are taken for granted.

    Args:
        first: the base.
        second: what is compared with it.
        judge: names the columns.
        confidence: of the intervals.

    Raises:
        InputError: for sets of different sizes.
    """
    (pictures, seen), (others, judged) = first, second
    if len(pictures) != len(others):
        raise InputError(
            f"{pictures.source} has {len(pictures)} pictures, {others.source} {len(others)}: they make no pairs"
        )
    same = sum(np.array_equal(pictures[i], others[i]) for i in range(len(pictures)))
    row: dict[str, Any] = {
        "identical pictures": int(same),
        f"cosine to the first ({judge.features.name})": float(_cosines(seen, judged).mean()),
    }
    if seen.scores is not None and judged.scores is not None and len(seen.scores) >= FEWEST:
        apart = bootstrap_mean((judged.scores - seen.scores).double().numpy(), confidence)
        name = f"{judge.score_name} against the first"
        row |= {name: apart.mean, f"{name} interval": [apart.low, apart.high]}
    return row


def _cosines(seen: Seen, judged: Seen) -> np.ndarray:
    a, b = seen.features.double(), judged.features.double()
    cosines: np.ndarray = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)).numpy()
    return cosines
