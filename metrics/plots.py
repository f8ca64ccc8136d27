"""The picture of a frontier: quality against tokens per pass and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arsd.errors import InputError
from arsd.metrics.frontier import SURPRISE

COLOURS = {
    "AR": "#111111",
    "SJD": "#1f77b4",
    "EAGLE": "#2ca02c",
    "hybrid": "#17becf",
    "COOL-SD, clamped": "#d62728",
    "COOL-SD, published": "#ff9896",
    "COOL-SD, budget": "#8c564b",
    "uniform": "#ff7f0e",
    "LANTERN": "#c5b0d5",
    "LANTERN++": "#9467bd",
    "GSD": "#bcbd22",
}
SPEEDS = (("tokens per pass", "tokens per pass"), ("seconds per picture", "seconds per picture"))


def plot_frontier(rows: Sequence[dict[str, Any]], path: str | Path, quality: str, title: str = "") -> None:
    """Draw ``quality`` (a column, a CLIP score less plain AR's) and the excess surprise of every row against speed.

    Strategies of one family are joined in the order of their total variation. Bars are the intervals of the rows; the grey
    band is that of plain AR with other seeds.

    Args:
        rows: of a frontier.
        path: a PNG or SVG file.
        quality: the first quality axis.
        title: above all panels.

    Raises:
        InputError: when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'arsd[docs]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = [name for name in (quality, SURPRISE) if any(name in row for row in rows)]
    size = (10.5, 3.9 * len(measures))
    figure, axes = plt.subplots(len(measures), 2, figsize=size, dpi=110, layout="constrained", squeeze=False)
    for line, measure in zip(axes, measures, strict=True):
        for panel, (speed, label) in zip(line, SPEEDS, strict=True):
            _panel(panel, rows, speed, measure)
            panel.set_xlabel(label)
            panel.grid(alpha=0.25)
        line[0].set_ylabel(measure)
        line[1].invert_xaxis()  # faster to the right, as in the other column
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def _panel(panel: Any, rows: Sequence[dict[str, Any]], speed: str, measure: str) -> None:
    """One quality against one speed."""
    same = [row for row in rows if row["role"] == "same-law" and measure in row]
    for row in same:
        ends = row.get(f"{measure} interval")
        if ends:
            panel.axhspan(*ends, color="#999999", alpha=0.2, linewidth=0, label="AR, other seeds (interval)")
    shown = [row for row in rows if row["role"] == "strategy" and measure in row]
    for family in dict.fromkeys(row["family"] for row in shown):
        points = sorted((row for row in shown if row["family"] == family), key=lambda row: row["TV per token"])
        xs, ys = ([row[name] for row in points] for name in (speed, measure))
        colour = COLOURS.get(family, "#7f7f7f")
        joined = "-" if any(row["promise"] == "relaxed" for row in points) else ""
        ends = [row.get(f"{measure} interval", (row[measure],) * 2) for row in points]
        bars = [
            [y - low for y, (low, _) in zip(ys, ends, strict=True)],
            [high - y for y, (_, high) in zip(ys, ends, strict=True)],
        ]
        style = {"marker": "o" if joined else "s", "markersize": 4.5, "linestyle": joined, "linewidth": 1.1, "color": colour}
        panel.errorbar(xs, ys, bars, elinewidth=0.5, alpha=0.9, label=family, **style)
