"""Write the prompt lists of the benchmarks: a seeded draw of concepts (no flags), so that nobody picked the easy ones.

Run: python benchmarks/make_prompts.py --data runs/data
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from arsd.training.data import EmojiData

FOLDER = Path(__file__).parent / "prompts"


def draw(data: EmojiData, count: int, seed: int) -> list[str]:
    """One caption each of ``count`` concepts, in random order."""
    by_concept: dict[str, list[str]] = {}
    for names, concept in zip(data.captions, data.concepts, strict=True):
        if not concept.startswith("flag "):
            by_concept.setdefault(concept, []).append(names[0])
    rng = random.Random(seed)
    return [rng.choice(by_concept[c]) for c in rng.sample(sorted(by_concept), count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    data = EmojiData.load(parser.parse_args().data)
    FOLDER.mkdir(exist_ok=True)
    for name, part, count, seed in (
        ("training48", data.subset(False), 48, 1),
        ("heldout24", data.subset(True), 24, 2),
        ("bench64", data.subset(False), 64, 3),
    ):
        (FOLDER / f"{name}.txt").write_text("\n".join(draw(part, count, seed)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
