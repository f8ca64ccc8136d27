"""What networks see in a set of pictures, and the figures made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arsd.errors import DataError, InputError
from arsd.metrics.distances import (
    Statistics,
    frechet_distance,
    frechet_is_biased,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)
from arsd.metrics.extractors import ImageFeatures, ImageText
from arsd.metrics.images import Pictures, Resizer
from arsd.metrics.resampling import FEWEST, bootstrap_mean


@dataclass
class Seen:
    """What the networks made of a set of pictures.

    Args:
        features: [N, D].
        scores: [N] CLIP scores, where there are prompts.
        logits: [N, C] of classes, where the extractor has some.
    """

    features: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write an npz, whole or not at all."""
        arrays = {"features": self.features, "scores": self.scores, "logits": self.logits}
        scratch = path.with_name(f".{path.stem}.part.npz")
        kept: dict[str, Any] = {name: value.numpy() for name, value in arrays.items() if value is not None}
        np.savez(scratch, **kept)
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Read what :meth:`save` wrote."""
        with np.load(path) as arrays:
            return cls(**{name: torch.from_numpy(arrays[name]) for name in arrays.files})


@dataclass
class Judge:
    """An extractor, a scorer and the pictures that others are compared with.

    Args:
        features: extractor.
        scorer: of pictures against prompts; ``None`` leaves out the CLIP score.
        resizer: of the pictures that are judged.
        reference: features of the real pictures, or their statistics; ``None`` leaves out what needs them.
        reference_about: what the card says of them.
        prefix: what is put before each prompt.
        k: neighbours, for precision and recall.
    """

    features: ImageFeatures
    scorer: ImageText | None = None
    resizer: Resizer = field(default_factory=Resizer)
    reference: Tensor | Statistics | None = None
    reference_about: dict[str, Any] | None = None
    prefix: str = ""
    k: int = 3

    def set_reference(
        self, source: Path, resizer: Resizer | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        """Take real pictures (a folder, zip or npz), or published statistics (npz with ``mu`` and ``sigma``).

        Raises:
            DataError: when they cannot be read.
            InputError: when statistics are of another dimension than the features.
        """
        self.reference, about = read_reference(source, self.features, resizer or Resizer(), progress)
        self.reference_about = {"source": source.name, "sha256": source_hash(source), **about}

    @property
    def key(self) -> str:
        """Hash of all that :meth:`look` depends on but pictures and prompts."""
        about = [self.features.describe(), None if self.scorer is None else self.scorer.describe(), self.prefix]
        return hashlib.sha256(repr([about, str(self.resizer)]).encode()).hexdigest()[:12]

    def look(self, pictures: Pictures, prompts: Sequence[str] | None = None, batch: int = 64) -> Seen:
        """Run the networks.

        Args:
            pictures: to be judged.
            prompts: of each picture; without them there is no score.
            batch: pictures at a time.

        Raises:
            InputError: when there are not as many prompts as pictures.
        """
        if prompts is not None and len(prompts) != len(pictures):
            raise InputError(f"there are {len(pictures)} pictures in {pictures.source}, and {len(prompts)} prompts")
        features: list[Tensor] = []
        scores: list[Tensor] = []
        logits: list[Tensor] = []
        first = 0
        for raw in pictures.batches(batch):
            resized = [self.resizer(picture) for picture in raw]
            features.append(self.features.features(resized))
            if hasattr(self.features, "class_logits"):
                logits.append(self.features.class_logits(resized))
            if self.scorer is not None and prompts is not None:
                scores.append(self.scorer.score(resized, prompts[first : first + len(raw)], self.prefix))
            first += len(raw)
        return Seen(torch.cat(features), *(torch.cat(x) if x else None for x in (scores, logits)))

    def figures(self, seen: Seen) -> dict[str, Any]:
        """Columns of the table; names tell extractors and scorers apart. Intervals are 95 %."""
        label = self.features.name
        row: dict[str, Any] = {}
        if self.reference is not None:
            row[f"FID ({label})"] = frechet_distance(self.reference, seen.features)
            real = self.reference.count if isinstance(self.reference, Statistics) else len(self.reference)
            count = min(len(seen.features), real if real is not None else len(seen.features))
            row["FID biased"] = frechet_is_biased(count, seen.features.shape[1])
        if isinstance(self.reference, Tensor):
            distance = kernel_distance(self.reference, seen.features)
            row |= {f"KID ({label})": distance.value, f"KID ({label}) interval": [distance.low, distance.high]}
            if min(len(self.reference), len(seen.features)) > self.k:
                near = precision_recall(self.reference, seen.features, self.k)
                row |= {f"precision ({label})": near.precision, f"recall ({label})": near.recall}
        if seen.logits is not None and len(seen.logits) >= 10:
            row[f"IS ({label})"], row[f"IS ({label}) spread"] = inception_score(seen.logits)
        if seen.scores is not None and self.scorer is not None:
            row[self.score_name] = float(seen.scores.double().mean())
            if len(seen.scores) >= FEWEST:
                interval = bootstrap_mean(seen.scores.double().numpy())
                row[f"{self.score_name} interval"] = [interval.low, interval.high]
        return row

    @property
    def score_name(self) -> str:
        """Column of the CLIP score."""
        return f"CLIP score ({self.scorer.name if self.scorer is not None else 'none'})"

    def describe(self) -> dict[str, Any]:
        """For the card."""
        return {
            "features": self.features.describe(),
            "scorer": None if self.scorer is None else {**self.scorer.describe(), "prefix": self.prefix},
            "resizer": str(self.resizer),
            "reference": self.reference_about,
            "precision_recall_k": self.k,
        }


def read_reference(
    source: Path, extractor: ImageFeatures, resizer: Resizer, progress: Callable[[int], None] | None = None
) -> tuple[Tensor | Statistics, dict[str, Any]]:
    """Features of real pictures, or published statistics, and what the card says of them.

    Raises:
        DataError: when they cannot be read.
        InputError: when statistics are of another dimension than the features.
    """
    if source.suffix.lower() == ".npz":
        with np.load(source) as arrays:
            names = set(arrays.files)
        if {"mu", "sigma"} <= names and "arr_0" not in names:
            statistics = Statistics.load(source)
            if len(statistics.mean) != extractor.dim:
                raise InputError(
                    f"{source} has statistics of {len(statistics.mean)} features, {extractor.name} has {extractor.dim}"
                )
            return statistics, {"statistics": True, "pictures": statistics.count}
    pictures = Pictures.open(source)
    about = {"statistics": False, "pictures": len(pictures), "format": pictures.format, "resizer": str(resizer)}
    return features_of(pictures, extractor, resizer, progress), about


def features_of(
    pictures: Pictures, extractor: ImageFeatures, resizer: Resizer, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Features [N, D] of a whole set, a few pictures at a time."""
    features = []
    for batch in pictures.batches(64):
        features.append(extractor.features([resizer(picture) for picture in batch]))
        if progress is not None:
            progress(len(batch))
    return torch.cat(features)


def source_hash(source: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and sizes of its files (its pictures may be many gigabytes)."""
    digest = hashlib.sha256()
    try:
        if source.is_dir():
            for path in sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith(".")):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        else:
            with source.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from None
    return digest.hexdigest()


def neighbours(generated: Tensor, training: Tensor, unseen: Tensor) -> dict[str, float]:
    """Are generated pictures copies? Distances of features to the nearest training picture, and those of unseen pictures.

    Args:
        generated: [N, D].
        training: [M, D] features of the training pictures.
        unseen: [K, D] features of real pictures that are not among them.

    Returns:
        Medians, and the share of generated pictures that lie nearer to a training picture than 95 % of the unseen ones do.
    """
    ours, theirs = nearest(generated, training)[0], nearest(unseen, training)[0]
    near = torch.quantile(theirs.double(), 0.05)
    return {
        "nearest training picture, median": float(ours.median()),
        "the same of unseen real pictures": float(theirs.median()),
        "nearer than 95 % of unseen ones": float((ours.double() < near).double().mean()),
    }
