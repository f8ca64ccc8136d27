"""The measured frontier of a model: an evaluation card of ``arsd evaluate --frontier``, as points of a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arsd.app.markup import Point
from arsd.errors import ArsdError, DataError
from arsd.pipelines.auto import find_model

CARD = "evaluation.json"  # in the folder of a model
SPEEDS = ("tokens per pass", "seconds per picture", "speedup")
QUALITIES = ("CLIP score", "FID", "KID", "excess surprise", "expected changed tokens", "precision", "recall")


def find_card(model: str, path: str | None = None) -> dict[str, Any] | None:
    """The card of a model, or ``None`` where it has none.

    Args:
        model: where its folder is looked for.
        path: a card in another place.

    Raises:
        DataError: when it cannot be read.
    """
    if path is None:
        try:
            file = find_model(model) / CARD
        except ArsdError:
            return None
        if not file.is_file():
            return None
    else:
        file = Path(path)
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        rows = card["rows"]
        for row in rows:
            if not isinstance(row["decoder"], str) or not isinstance(row["tokens per pass"], float):
                raise TypeError
            if row.get("role") == "strategy":
                row["promise"], row["lossless"]  # what a point needs
        if not qualities(card):
            raise KeyError("a column of quality")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} is no evaluation card: make one with arsd evaluate --frontier") from None
    return dict(card)


def speeds(card: dict[str, Any]) -> list[str]:
    """Columns that say how fast a strategy is."""
    return [name for name in SPEEDS if any(name in row for row in card["rows"])]


def qualities(card: dict[str, Any]) -> list[str]:
    """Columns that say how good pictures are, or how far their law moved."""
    names = dict.fromkeys(name for row in card["rows"] for name, value in row.items() if isinstance(value, float))
    found = [name for name in names if name.startswith(QUALITIES) and not name.endswith("interval")]
    return sorted(
        found, key=lambda name: ("against" not in name, next(i for i, q in enumerate(QUALITIES) if name.startswith(q)))
    )


def points(card: dict[str, Any], x: str, y: str) -> list[Point]:
    """The strategies of a card."""
    found = []
    for row in card["rows"]:
        if row.get("role") == "strategy" and x in row and y in row:
            low, high = row.get(f"{y} interval", (None, None))
            note = f"{row['promise']}{', ' + row['verdict'] if row.get('verdict') else ''}"
            found.append(Point(row["decoder"], row[x], row[y], low, high, not row["lossless"], note))
    return found


def band(card: dict[str, Any], y: str) -> tuple[float, float] | None:
    """The interval of plain AR with other seeds."""
    for row in card["rows"]:
        if row.get("role") == "same-law" and f"{y} interval" in row:
            low, high = row[f"{y} interval"]
            return float(low), float(high)
    return None


def about(card: dict[str, Any]) -> str:
    """What was measured, on what."""
    drawing, protocol = card.get("drawing") or {}, card.get("protocol") or {}
    words = [str(protocol.get("title") or protocol.get("name") or "")]
    words += [f"{drawing[name]}" for name in ("device_kind", "dtype") if name in drawing]
    words += [f"batch {drawing['batch']}"] if "batch" in drawing else []
    return "; ".join(word for word in words if word)
