"""Tokens per pass against expected changed tokens: draws docs/images/relaxed.png from what `frontier.py relaxed` measured.

python benchmarks/plot_relaxed.py benchmarks/results/frontier-relaxed-8.....json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "clamped": "COOL-SD, clamped",
    "published": "COOL-SD, published",
    "uniform": "uniform",
    "budget": "COOL-SD, budget",
    "lantern++": "LANTERN++",
    "lantern": "LANTERN",
    "grouped": "GSD",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "relaxed.png")
    arguments = parser.parse_args()
    report = json.loads(arguments.results.read_text(encoding="utf-8"))
    figures, families = report["figures"], report["families"]
    base = figures[next(iter(figures))]  # the lossless chain
    fig, axes = plt.subplots(figsize=(7.2, 4.6), dpi=110, layout="constrained")
    most = 0.0
    for family, names in families.items():
        points = sorted((figures[name]["expected_changed_tokens"], figures[name]["tokens_per_pass"]) for name in names)
        points = points if family == "published" else [(0.0, base["tokens_per_pass"]), *points]
        most = max(most, points[-1][0])
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=NAMES[family])
    passes = sum(base["passes"]) / len(base["passes"])
    tokens = passes * base["tokens_per_pass"]
    cost = [most * i / 50 for i in range(51)]
    axes.plot(cost, [tokens / (passes - c) for c in cost], "k:", linewidth=1, label="one pass for each changed token")
    middle, (low, high) = base["tokens_per_pass"], base["interval"]
    axes.errorbar([0], [middle], [[middle - low], [high - middle]], color="k", capsize=3)
    axes.set_xlabel(f"expected changed tokens, of {tokens:.0f}")
    axes.set_ylabel("tokens per pass")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    fig.savefig(arguments.out)


if __name__ == "__main__":
    main()
