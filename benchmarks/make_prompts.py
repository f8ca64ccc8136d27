"""Write the prompt lists of the benchmarks: a seeded draw of concepts (no flags), so that nobody picked the easy ones.

Run: python benchmarks/make_prompts.py --data runs/data
     python benchmarks/make_prompts.py --names          # exact200.txt: needs the package `emoji`, and no pictures
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from arsd.models.captions import unknown_words
from arsd.pipelines.auto import find_model
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


def draw_names(count: int, seed: int) -> list[str]:
    """Unicode names (no flags) whose words the shipped model's tokenizer knows."""
    import emoji
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(find_model("emoji-128") / "tokenizer"))
    names = {entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values() if entry["status"] <= 2}
    known = [name for name in sorted(names) if "flag" not in name.lower() and not unknown_words(tokenizer, name)]
    return random.Random(seed).sample(known, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--names", action="store_true")
    arguments = parser.parse_args()
    if arguments.names:
        (FOLDER / "exact200.txt").write_text("\n".join(draw_names(200, 4)) + "\n", encoding="utf-8")
        return
    data = EmojiData.load(arguments.data)
    FOLDER.mkdir(exist_ok=True)
    for name, part, count, seed in (
        ("training48", data.subset(False), 48, 1),
        ("heldout24", data.subset(True), 24, 2),
        ("bench64", data.subset(False), 64, 3),
    ):
        (FOLDER / f"{name}.txt").write_text("\n".join(draw(part, count, seed)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
