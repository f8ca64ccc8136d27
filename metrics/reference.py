"""Reference pictures: what a model was trained to draw, with captions, in one archive that ships beside the model."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arsd.errors import DataError

INDEX = "index.json"
QUALITY = 70  # of WebP: 34 dB against the originals, where emoji-128's tokenizer reaches 26


@dataclass(frozen=True)
class Reference:
    """Captions and concepts of the pictures in an archive; the pictures themselves are read by ``Pictures.open(path)``.

    Args:
        path: of the archive.
        captions: one of each picture.
        concepts: of each picture; variants (skin tones) of one thing share theirs.
    """

    path: Path
    captions: list[str]
    concepts: list[str]

    @classmethod
    def open(cls, path: str | Path) -> Reference:
        """Read the index of an archive.

        Raises:
            DataError: when it is missing or no such archive.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                rows = json.loads(archive.read(INDEX))
            return cls(Path(path), [row["caption"] for row in rows], [row["concept"] for row in rows])
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no archive of reference pictures ({type(error).__name__}: {error})") from None

    def draw_captions(self, count: int, seed: int) -> list[str]:
        """One caption each of ``count`` concepts (no flags), a seeded draw.

        Raises:
            DataError: when there are fewer concepts.
        """
        by_concept: dict[str, list[str]] = {}
        for caption, concept in zip(self.captions, self.concepts, strict=True):
            if not concept.startswith("flag "):
                by_concept.setdefault(concept, []).append(caption)
        if count > len(by_concept):
            raise DataError(f"{self.path.name} has {len(by_concept)} concepts, not {count}: ask for fewer prompts")
        rng = random.Random(seed)
        return [rng.choice(by_concept[concept]) for concept in rng.sample(sorted(by_concept), count)]


def find_reference(model: str, held_out: bool = False) -> Reference:
    """The reference pictures that ship with a model, or those that its training never saw.

    Raises:
        DataError: when none ship with it.
    """
    from arsd.pipelines.auto import find_model

    path = find_model(model) / ("held-out.zip" if held_out else "reference.zip")
    if not path.is_file():
        raise DataError(f"no reference pictures come with {model!r}: give --reference FOLDER, .zip or .npz")
    return Reference.open(path)


def write_reference(path: str | Path, images: np.ndarray, captions: Sequence[str], concepts: Sequence[str]) -> None:
    """Write an archive: ``000000.webp`` ... and the index. The same pictures give the same bytes.

    Args:
        path: of the archive.
        images: [N, H, W, 3] uint8.
        captions: [N].
        concepts: [N].
    """
    rows: list[dict[str, Any]] = []
    with zipfile.ZipFile(path, "w") as archive:
        for i, (image, caption, concept) in enumerate(zip(images, captions, concepts, strict=True)):
            stream = BytesIO()
            Image.fromarray(np.asarray(image)).save(stream, "webp", quality=QUALITY, method=6)
            archive.writestr(zipfile.ZipInfo(f"{i:06d}.webp"), stream.getvalue())
            rows.append({"caption": caption, "concept": concept})
        index = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
        archive.writestr(zipfile.ZipInfo(INDEX), index, compress_type=zipfile.ZIP_DEFLATED)
