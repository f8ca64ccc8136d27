"""Tables of an evaluation: CSV with everything, Markdown for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from arsd.metrics.frontier import SURPRISE


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """All columns of all rows; an interval becomes two columns, ``... low`` and ``... high``."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, (list, tuple)):
            base = name.removesuffix(" interval")
            found |= {f"{base} low": value[0], f"{base} high": value[1]}
        else:
            found[name] = value
    return found


def number(value: Any, digits: int = 3) -> str:
    """A figure for people: so many significant digits, an empty cell for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def with_interval(row: dict[str, Any], name: str, digits: int = 3) -> str:
    """``value (low, high)``; both ends with as many decimals as the value needs."""
    if name not in row:
        return ""
    value, ends = row[name], row.get(f"{name} interval")
    if ends is None or not all(map(math.isfinite, (value, *ends))):
        return number(value, digits)
    width = max(abs(end - value) for end in ends)
    decimals = max(0, 1 - math.floor(math.log10(width))) if width > 0 else digits
    return f"{value:.{decimals}f} ({ends[0]:.{decimals}f}, {ends[1]:.{decimals}f})"


def columns(rows: Sequence[dict[str, Any]], brief: bool = False) -> list[str]:
    """What the table for people shows, in order: the names that occur; fewer of them for a terminal (``brief``)."""
    first = ["decoder", "folder", "promise", "pictures", "tokens per pass", "seconds per picture", "speedup", "TV per token"]
    first += [] if brief else ["TV per token on AR's prefixes"]
    kinds = ("CLIP score", "FID (", "KID", "precision", "recall", "IS", "identical", "cosine")
    judged = [name for row in rows for name in row if name.startswith(kinds)]
    judged = [name for name in dict.fromkeys(judged) if not name.endswith((" interval", " spread"))]
    if brief:
        judged = [name for name in judged if not name.startswith(("precision", "recall", "IS"))]
    wanted = [*first, *judged, SURPRISE, "verdict"]
    return [name for name in wanted if any(row.get(name) not in (None, "") for row in rows)]


def cells(rows: Sequence[dict[str, Any]], names: Sequence[str], intervals: bool = True) -> list[list[str]]:
    """The cells of these columns; a biased FID is marked with an asterisk."""
    table = []
    for row in rows:
        line = []
        for name in names:
            text = with_interval(row, name) if intervals and f"{name} interval" in row else number(row.get(name))
            line.append(text + ("*" if name.startswith("FID (") and row.get("FID biased") and text else ""))
        table.append(line)
    return table


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    names = columns(rows)
    lines = [names, ["---"] * len(names), *cells(rows, names)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    biased = any(row.get("FID biased") for row in rows)
    return text + ("\n\n\\* biased: fewer pictures than features" if biased else "") + "\n"
