"""What emoji-CLIP knows: retrieval of concepts that it was not trained on, and how its score falls with damage.

    python benchmarks/scorer.py            # tables, and benchmarks/results/scorer.json
    python benchmarks/scorer.py --plot docs/images/scorer.png    # and a figure (needs matplotlib)

Retrieval is by name alone, over one picture of each concept. Damage is done at 128 pixels: Gaussian blur (as Pillow
approximates it), 16-pixel patches permuted, and captions of other concepts. The Frechet distance is that of the unit
features against those of the clean pictures; of the 83 held-out ones it is a figure of few samples in 128 dimensions, to
be compared along its own row only. Options: --data, --model (a folder that CLIPModel.from_pretrained reads), --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arsd.cli.common import table
from arsd.devices import device_kind
from arsd.metrics import ClipScorer, frechet_distance
from arsd.training.data import EmojiData
from arsd.training.scorer import recall
from arsd.training.scorer_data import blurred, moved_patches

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "arsd" / "checkpoints" / "emoji-clip"
SIGMAS = (0, 1, 2, 4, 8)
PATCH_SHARES = (0, 0.1, 0.25, 0.5, 1)
WRONG_SHARES = (0, 0.25, 0.5, 1)
SHOWN = "penguin"  # in the figure; a held-out concept


def picture_features(
    scorer: ClipScorer, data: EmojiData, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> Tensor:
    """Unit features [N, D] of all pictures, each changed first."""
    parts = []
    for first in range(0, len(data.captions), 256):
        pictures = [np.asarray(picture) for picture in data.images[first : first + 256]]
        parts.append(scorer.features(pictures if change is None else [change(picture) for picture in pictures]))
    return torch.cat(parts)


def firsts(concepts: list[str]) -> list[int]:
    """Index of the first picture of each concept."""
    return sorted({concept: index for index, concept in reversed(list(enumerate(concepts)))}.values())


def held_out_rows(images: Tensor, texts: Tensor, rows: list[int], pool: list[int]) -> list[dict[str, Any]]:
    """Recall of ``rows`` among ``pool`` (which holds them), both ways, with chance."""
    own = torch.tensor([pool.index(row) for row in rows])
    found = []
    for way, queries, keys in (("text to image", texts, images), ("image to text", images, texts)):
        scores = queries[rows] @ keys[pool].T
        above = (scores > scores.gather(1, own[:, None])).sum(1)
        figures = {f"top {k}": float((above < k).double().mean()) for k in (1, 5)}
        found.append({"way": way, "queries": len(rows), "pool": len(pool), **figures, "chance of top 5": 5 / len(pool)})
    return found


def retrieval(images: Tensor, texts: Tensor, data: EmojiData) -> dict[str, list[dict[str, Any]]]:
    """Recall within the held-out concepts, of them among all concepts, and within those trained on."""
    every = firsts(data.concepts)
    held = [row for row in every if data.held_out[row]]
    known = [row for row in every if not data.held_out[row]]
    scores = texts[held] @ images[held].T
    found = held_out_rows(images, texts, held, held)
    assert found[0]["top 5"] == recall(scores) and found[1]["top 5"] == recall(scores.T)
    pictures = np.flatnonzero(data.held_out)
    names = [data.concepts[row] for row in held]
    own = torch.tensor([names.index(data.concepts[i]) for i in pictures])
    scores = images[pictures] @ texts[held].T
    above = (scores > scores.gather(1, own[:, None])).sum(1)
    figures = {f"top {k}": float((above < k).double().mean()) for k in (1, 5)}
    row = {
        "way": "every picture to text",
        "queries": len(own),
        "pool": len(held),
        **figures,
        "chance of top 5": 5 / len(held),
    }
    return {
        "held-out concepts": [*found, row],
        "held-out among all concepts": held_out_rows(images, texts, held, every),
        "concepts trained on": held_out_rows(images, texts, known, known),
    }


def wrong_captions(concepts: list[str], share: float) -> list[int]:
    """For each picture the index of its caption; for ``share`` of them it is that of another concept."""
    source = np.random.default_rng(0)
    rows = list(range(len(concepts)))
    for row in source.permutation(len(rows))[: round(share * len(rows))]:
        others = [i for i in source.integers(len(concepts), size=64).tolist() if concepts[i] != concepts[row]]
        rows[row] = others[0]
    return rows


def damage_curves(scorer: ClipScorer, data: EmojiData, clean: Tensor, texts: Tensor) -> dict[str, list[dict[str, float]]]:
    """Mean cosine of picture and name, share of pictures that score below their clean selves, and Frechet distance."""
    source = np.random.default_rng(0)
    changes: dict[str, list[tuple[float, Callable[[np.ndarray], np.ndarray]]]] = {
        "blur": [(sigma, lambda p, s=sigma: blurred(p, s)) for sigma in SIGMAS],
        "shuffle": [(share, lambda p, s=share: moved_patches(p, s, source)) for share in PATCH_SHARES],
    }
    own = (clean * texts).sum(1)
    curves: dict[str, list[dict[str, float]]] = {}
    for name, levels in changes.items():
        curves[name] = []
        for level, change in levels:
            features = clean if level == 0 else picture_features(scorer, data, change)
            scores = (features * texts).sum(1)
            distance = 0.0 if level == 0 else frechet_distance(clean, features)
            lower = float((scores < own).double().mean())
            curves[name].append({"level": level, "score": float(scores.mean()), "lower": lower, "frechet": distance})
    rows = [(share, wrong_captions(data.concepts, share)) for share in WRONG_SHARES]
    curves["wrong caption"] = [
        {"level": share, "score": float((clean * texts[order]).sum(1).mean())} for share, order in rows
    ]
    return curves


def monotone(curves: dict[str, list[dict[str, float]]]) -> bool:
    """Whether every score falls and every distance rises with the level."""
    falls = all(a["score"] > b["score"] for rows in curves.values() for a, b in zip(rows, rows[1:], strict=False))
    distances = [[row["frechet"] for row in curves[name]] for name in ("blur", "shuffle")]
    return falls and all(sorted(set(some)) == some for some in distances)


def show(found: dict[str, list[dict[str, Any]]], curves: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Print both tables."""
    head = ["pool", "way", "queries", "top 1", "top 5", "chance", "times chance"]
    rows = [
        [f"{name} ({r['pool']})", r["way"], str(r["queries"]), f"{r['top 1']:.1%}", f"{r['top 5']:.1%}"]
        + [f"{r['chance of top 5']:.1%}", f"{r['top 5'] / r['chance of top 5']:.1f}"]
        for name, some in found.items()
        for r in some
    ]
    print(table(head, rows))
    rows = [
        [part, name, f"{r['level']:g}", f"{r['score']:.4f}"]
        + ([f"{r['lower']:.1%}", f"{r['frechet']:.4f}"] if "frechet" in r else ["", ""])
        for part, some in curves.items()
        for name, levels in some.items()
        for r in levels
    ]
    print(table(["pictures", "damage", "level", "score", "below clean", "Frechet"], rows))


def plot(curves: dict[str, dict[str, list[dict[str, float]]]], scorer: ClipScorer, data: EmojiData, path: Path) -> None:
    """Curves of both parts, over one held-out picture at each level of blur and shuffle with its scores."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    row, source = data.concepts.index(SHOWN), np.random.default_rng(0)
    picture, name = np.asarray(data.images[row]), data.captions[row][0]
    shown = [blurred(picture, sigma) for sigma in SIGMAS] + [moved_patches(picture, s, source) for s in PATCH_SHARES[1:]]
    scores = scorer.score(shown, [name] * len(shown)) / 100
    for axis, version, score in zip(above.subplots(1, len(shown)), shown, scores.tolist(), strict=True):
        axis.imshow(version)
        axis.set_axis_off()
        axis.set_title(f"{score:.2f}")
    above.suptitle(f"cosine with the name of a held-out picture: {name}")
    labels = {
        "blur": "sigma of the blur, pixels",
        "shuffle": "share of moved patches",
        "wrong caption": "share of wrong captions",
    }
    for axis, (damage, label) in zip(below.subplots(1, len(labels), sharey=True), labels.items(), strict=True):
        for part, some in curves.items():
            axis.plot([r["level"] for r in some[damage]], [r["score"] for r in some[damage]], ".-", label=f"{part} pictures")
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    below.axes[0].set(ylabel="mean cosine of picture and name")
    below.axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scorer.json")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    began, data, scorer = time.perf_counter(), EmojiData.load(arguments.data), ClipScorer(arguments.model, batch=128)
    clean = picture_features(scorer, data)
    texts = scorer.text_features([captions[0] for captions in data.captions])
    found, curves = retrieval(clean, texts, data), {}
    for part, held_out in (("training", False), ("held-out", True)):
        rows = np.flatnonzero(data.held_out == held_out)
        curves[part] = damage_curves(scorer, data.subset(held_out), clean[rows], texts[rows])
    show(found, curves)
    weights = arguments.model / "model.safetensors"
    record = {
        "command": "python benchmarks/scorer.py",
        "weights_file_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "weights_sha256": scorer.describe()["weights_sha256"],
        "folder_bytes": sum(path.stat().st_size for path in arguments.model.iterdir()),
        "device": device_kind("cpu"),
        "seconds": round(time.perf_counter() - began, 1),
        "retrieval": found,
        "curves": curves,
        "monotone": {part: monotone(some) for part, some in curves.items()},
    }
    print(f"monotone: {record['monotone']}; folder of {record['folder_bytes'] / 1e6:.2f} MB")
    if arguments.plot is not None:
        plot(curves, scorer, data, arguments.plot)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
