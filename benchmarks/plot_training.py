"""Draw the training curves in docs/training/*.jsonl: ``python benchmarks/plot_training.py`` (needs matplotlib).

A run that was resumed from an older checkpoint logs some steps twice; the later line counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

TOKENS_CHANGED = 878  # from here on the training tokens are entropy-constrained, see docs/emoji-128.md
DOCS = Path(__file__).parent.parent / "docs"


def curve(path: Path, key: str, x: str = "step") -> tuple[list[float], list[float]]:
    points: dict[float, float] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if key in row and x in row:
            points[row[x]] = row[key]
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def video() -> None:
    """The frame tokenizer and the transformer of emoji-video."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    left.plot(*curve(DOCS / "training" / "video-vq.jsonl", "loss"))
    left.set(title="frame tokenizer", xlabel="step", ylabel="loss", yscale="log")
    log = DOCS / "training" / "video.jsonl"
    right.plot(*curve(log, "loss"), linewidth=0.8, label="training (corrupted input)")
    for key, label in (("probe", "training clips"), ("held_out", "held-out clips")):
        for part, style in (("first", ".-"), ("later", ".:")):
            right.plot(*curve(log, f"{key}_{part}_own"), style, label=f"{label}, {part} frame{'s' * (part == 'later')}")
    right.set(title="transformer", xlabel="step", ylabel="nats per token")
    right.legend(fontsize="small")
    figure.savefig(DOCS / "images" / "emoji-video-training.png", dpi=110)


def main() -> None:
    video()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    vq, target = DOCS / "training" / "vq.jsonl", DOCS / "training" / "target.jsonl"
    left.plot(*curve(vq, "loss"))
    left.set(title="image tokenizer", xlabel="step", ylabel="loss", yscale="log")
    middle.plot(*curve(target, "loss"), label="training (corrupted input)")
    middle.plot(*curve(target, "probe_right"), ".-", label="48 training pictures")
    middle.plot(*curve(target, "held_out_loss"), ".-", label="held-out pictures")
    middle.set(title="transformer and text encoder", xlabel="step", ylabel="nats per token")
    middle.axvline(TOKENS_CHANGED, color="grey", linewidth=0.8, linestyle=":")
    middle.legend()
    steps, own = curve(target, "probe_right")
    for key, label in (("probe_null", "null caption"), ("probe_other", "another picture's caption")):
        right.plot(steps, [256 * (a - b) for a, b in zip(curve(target, key)[1], own, strict=True)], ".-", label=label)
    right.axvline(TOKENS_CHANGED, color="grey", linewidth=0.8, linestyle=":")
    right.set(title="what the caption tells", xlabel="step", ylabel="nats per picture", yscale="log")
    right.legend()
    figure.savefig(DOCS / "images" / "training.png", dpi=110)


if __name__ == "__main__":
    main()
