"""The evaluation card of clips, and its table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arsd.metrics.card import versions
from arsd.metrics.report import cells
from arsd.metrics.video import I3DFeatures
from arsd.metrics.video_judge import VideoJudge

_SAME_RATE = 1.05  # of two sets, whose motion can then be compared
_DISTANCES = ("FVD (", "Frechet video distance (")


def make_video_card(judge: VideoJudge, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The card of a table of clips.

    Args:
        judge: networks, frames, reference.
        rows: of the table.
        more: what else belongs to it.
    """
    import arsd

    card = {"arsd": arsd.__version__, "kind": "clips", "versions": versions(), **judge.describe(), **more}
    return {**card, "rows": list(rows), "flags": _flags(judge, rows)}


def _flags(judge: VideoJudge, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the figures has to know."""
    about, flags = judge.reference_about or {}, []
    biased = sum(bool(row.get("distance biased")) for row in rows)
    if biased:
        flags.append(f"the distance of {biased} rows is biased: fewer clips than features ({judge.features.dim})")
    if isinstance(judge.features, I3DFeatures) and not judge.features.published:
        flags.append("the I3D is not the published file: its distances are no FVD of the literature")
    wanted = about.get("frames per second")
    for row in rows:
        rate = row.get("frames per second")
        if rate and wanted and not 1 / _SAME_RATE < rate / wanted < _SAME_RATE:
            flags.append(
                f"{row['folder']} is looked at with {rate:.3g} frames per second, the reference with {wanted:.3g}: their "
                "motion differs for this alone"
            )
        if row["still clips"]:
            flags.append(f"{row['still clips']} clips of {row['folder']} never move: their consistency says nothing")
    return flags


def video_columns(rows: Sequence[dict[str, Any]], brief: bool = False) -> list[str]:
    """What the table for people shows, in order: the names that occur; fewer of them for a terminal (``brief``)."""
    kinds = [*_DISTANCES, "kernel video distance (", "CLIP score (", "consistency ("]
    kinds += [] if brief else ["cosine to"]
    judged = [name for kind in kinds for row in rows for name in row if name.startswith(kind)]
    judged = [name for name in dict.fromkeys(judged) if not name.endswith(" interval")]
    wanted = ["folder", "clips", "frames", *([] if brief else ["size", "frames per second", "clip format"]), *judged]
    wanted += ["motion", "flicker", *([] if brief else ["loop gap"]), "identical clips"]
    return [name for name in wanted if any(row.get(name) not in (None, "") for row in rows)]


def video_cells(rows: Sequence[dict[str, Any]], names: Sequence[str], intervals: bool = True) -> list[list[str]]:
    """The cells of these columns; a biased distance is marked with an asterisk."""
    table = cells(rows, names, intervals)
    for row, line in zip(rows, table, strict=True):
        for i, name in enumerate(names):
            if row.get("distance biased") and name.startswith(_DISTANCES):
                line[i] += "*"
    return table


def with_reference(card: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a card and, last, what the real clips are like, as far as it takes no comparison."""
    about = card["reference"] or {}
    if "figures" not in about:
        return list(card["rows"])
    known = {name: about[name] for name in ("clips", "frames", "size", "frames per second", "clip format")}
    return [*card["rows"], {"folder": f"{about['source']} (reference)", **known, **about["figures"]}]


def video_markdown(card: dict[str, Any]) -> str:
    """The table for people, in Markdown."""
    rows = with_reference(card)
    names = video_columns(rows)
    lines = [names, ["---"] * len(names), *video_cells(rows, names)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text + "".join(f"\n{_mark(flag, escape=True)} {flag}\n" for flag in card["flags"])


def video_table(card: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, cells and notes for a terminal."""
    rows = with_reference(card)
    names = video_columns(rows, brief=True)
    return names, video_cells(rows, names, intervals=False), [f"{_mark(flag)} {flag}" for flag in card["flags"]]


def _mark(flag: str, escape: bool = False) -> str:
    """The asterisk of biased distances; other flags are about no cell."""
    return ("\\*" if escape else "*") if "biased" in flag else "note:"
