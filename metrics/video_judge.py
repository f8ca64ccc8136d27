"""What networks see in sets of clips, and the figures made of it."""

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
from arsd.metrics.distances import Statistics, frechet_distance, frechet_is_biased, kernel_distance
from arsd.metrics.extractors import ImageFeatures, ImageText
from arsd.metrics.folders import prompts_of
from arsd.metrics.images import _UNREADABLE, Resizer
from arsd.metrics.judge import source_hash
from arsd.metrics.resampling import FEWEST, bootstrap_mean
from arsd.metrics.video import VideoFeatures, distance_name
from arsd.metrics.video_clips import Clip, Clips, FramePick
from arsd.metrics.video_frames import MOVED, Changes, Consistency

_BATCH = 8  # clips in memory at a time


@dataclass
class SeenClips:
    """What the networks made of a set of clips.

    Args:
        features: [N, D].
        changes: of each clip.
        consistency: of each clip, where it was asked for.
        scores: [N] CLIP scores, where there are prompts.
        digests: of the frames that were looked at.
        shapes: (frames, height, width) of each clip.
        rate: frames per second of these frames, the median over clips; ``None`` where no clip tells.
    """

    features: Tensor
    changes: list[Changes]
    consistency: list[Consistency]
    scores: Tensor | None
    digests: list[str]
    shapes: list[tuple[int, int, int]]
    rate: float | None

    def describe(self) -> dict[str, Any]:
        """Number, frames, sizes and rate, for the table and the card."""
        counts = sorted({frames for frames, _, _ in self.shapes})
        sizes = {f"{width}x{height}" for _, height, width in self.shapes}
        frames = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        size = sizes.pop() if len(sizes) == 1 else "mixed"
        return {"clips": len(self.shapes), "frames": frames, "size": size, "frames per second": self.rate}


@dataclass
class VideoJudge:
    """An extractor, networks of pictures, and the clips that others are compared with.

    Args:
        features: extractor of clips.
        consistency: extractor of pictures, for consistency; ``None`` leaves it out.
        scorer: of pictures against prompts; ``None`` leaves out the CLIP score.
        pick: frames that are looked at.
        resizer: of all frames, before the networks and the figures of pixels.
        prefix: what is put before each prompt.
        reference: features of the real clips, or their statistics; ``None`` leaves out what needs them.
        reference_about: what the card says of them.

    Raises:
        InputError: when the extractor needs more frames.
    """

    features: VideoFeatures
    consistency: ImageFeatures | None = None
    scorer: ImageText | None = None
    pick: FramePick = field(default_factory=FramePick)
    resizer: Resizer = field(default_factory=Resizer)
    prefix: str = ""
    reference: Tensor | Statistics | None = None
    reference_about: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pick.num_frames is not None and self.pick.num_frames < self._least:
            raise InputError(
                f"{self.features.name} needs {self._least} frames of a clip, not {self.pick.num_frames}: give more"
            )

    @property
    def _least(self) -> int:
        """Frames that a clip must have."""
        return max(2, getattr(self.features, "least_frames", 1))

    def open(self, source: str | Path, limit: int | None = None) -> Clips:
        """The clips of a source, as :meth:`Clips.open` has them, with the frames of this judge."""
        return Clips.open(source, self.pick, limit)

    def set_reference(
        self, source: str | Path, limit: int | None = None, progress: Callable[[int], Any] | None = None
    ) -> None:
        """Take real clips, or statistics of their features (npz with ``mu`` and ``sigma``).

        Raises:
            DataError: when they cannot be read.
            InputError: when statistics are of another dimension than the features.
        """
        source = Path(source)
        about: dict[str, Any] = {"source": source.name}
        if _has_statistics(source):
            self.reference = Statistics.load(source)
            if len(self.reference.mean) != self.features.dim:
                raise InputError(
                    f"{source} has statistics of {len(self.reference.mean)} features, {self.features.name} has "
                    f"{self.features.dim}"
                )
            about |= {"sha256": source_hash(source), "statistics": True, "clips": self.reference.count}
        else:
            clips = self.open(source, limit)
            seen = self.look(clips, progress=progress)
            if len(clips) < 2:
                raise InputError(f"{source} has one clip: a distance needs two or more real ones")
            self.reference = seen.features
            about |= {"sha256": _hash_of("".join(seen.digests).encode()), "statistics": False}  # of what was looked at
            about |= {"clip format": clips.format, **seen.describe()}
            about["figures"] = self._over_time(seen)
        self.reference_about = about

    def look(
        self, clips: Clips, prompts: Sequence[str] | None = None, progress: Callable[[int], Any] | None = None
    ) -> SeenClips:
        """Run the networks.

        Args:
            clips: to be judged.
            prompts: of each clip; without them there is no score.
            progress: told how many clips more were looked at.

        Raises:
            DataError: when a clip cannot be read, or is too short for the extractor.
            InputError: when there are not as many prompts as clips.
        """
        if prompts is not None and len(prompts) != len(clips):
            raise InputError(f"there are {len(clips)} clips in {clips.source}, and {len(prompts)} prompts")
        seen = SeenClips(torch.empty(0), [], [], None, [], [], None)
        features: list[Tensor] = []
        scores: list[Tensor] = []
        rates: list[float] = []
        for batch in clips.batches(_BATCH):
            self._check_lengths(clips, batch, len(seen.digests))
            shown = [np.stack([self.resizer(frame) for frame in clip.frames]) for clip in batch]
            features.append(self.features.features(shown))
            for clip, frames in zip(batch, shown, strict=True):
                seen.changes.append(Changes.of(frames))
                if self.consistency is not None:
                    seen.consistency.append(Consistency.seen_by(self.consistency, frames))
                if self.scorer is not None and prompts is not None:
                    prompt = prompts[len(seen.digests)]
                    scores.append(self.scorer.score(list(frames), [prompt] * len(frames), self.prefix).double().mean())
                seen.digests.append(_hash_of(repr(frames.shape).encode() + frames.tobytes()))
                seen.shapes.append((len(clip.frames), clip.frames.shape[1], clip.frames.shape[2]))
                rates += [] if clip.rate is None else [clip.rate]
            if progress is not None:
                progress(len(batch))
        seen.features, seen.scores = torch.cat(features), torch.stack(scores) if scores else None
        seen.rate = float(np.median(rates)) if rates else None
        return seen

    def _check_lengths(self, clips: Clips, batch: Sequence[Clip], first: int) -> None:
        for i, clip in enumerate(batch, start=first):
            if len(clip.frames) < self._least:
                name = f"{clips.source}: {clips.names[i]} has {len(clip.frames)} frames"
                raise DataError(f"{name}, {self.features.name} needs {self._least}: leave this clip out")

    def figures(self, seen: SeenClips) -> dict[str, Any]:
        """Columns of the table; names tell networks apart. Intervals are 95 %.

        Raises:
            InputError: for a single clip, where there are real ones to compare with.
        """
        row: dict[str, Any] = {}
        if self.reference is not None:
            if len(seen.features) < 2:
                raise InputError("a distance needs two clips or more: give more, or leave out the reference")
            row[distance_name(self.features)] = frechet_distance(self.reference, seen.features)
            real = self.reference.count if isinstance(self.reference, Statistics) else len(self.reference)
            count = min(len(seen.features), real if real is not None else len(seen.features))
            row["distance biased"] = frechet_is_biased(count, seen.features.shape[1])
        if isinstance(self.reference, Tensor):
            distance = kernel_distance(self.reference, seen.features)
            name = f"kernel video distance ({self.features.name})"
            row |= {name: distance.value, f"{name} interval": [distance.low, distance.high]}
        if seen.scores is not None and self.scorer is not None:
            row |= _mean(f"CLIP score ({self.scorer.name})", seen.scores.numpy())
        return row | self._over_time(seen)

    def _over_time(self, seen: SeenClips) -> dict[str, Any]:
        """Consistency, flicker, motion, which need no other clips."""
        row: dict[str, Any] = {}
        if self.consistency is not None:
            label = self.consistency.name
            row |= _mean(f"consistency ({label})", [each.subject for each in seen.consistency])
            row |= _mean(f"cosine to the frame before ({label})", [each.before for each in seen.consistency])
            row |= _mean(f"cosine to the first frame ({label})", [each.first for each in seen.consistency])
        row |= _mean("motion", [each.motion for each in seen.changes])
        row |= _mean("flicker", [each.flicker for each in seen.changes])
        row |= _mean("loop gap", [each.loop_gap for each in seen.changes])
        return row | {"still clips": sum(each.motion == 0 for each in seen.changes)}

    def describe(self) -> dict[str, Any]:
        """For the card."""
        return {
            "features": self.features.describe(),
            "consistency": None if self.consistency is None else self.consistency.describe(),
            "scorer": None if self.scorer is None else {**self.scorer.describe(), "prefix": self.prefix},
            "pick": {**vars(self.pick), "name": str(self.pick)},
            "resizer": str(self.resizer),
            "motion_threshold": MOVED,
            "reference": self.reference_about,
        }


def judge_clips(
    sources: Sequence[str | Path],
    judge: VideoJudge,
    prompts: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """A row for each set of clips; from the second one on, with the number of clips that are equal to the first set's.

    Args:
        sources: as :meth:`Clips.open` takes them.
        judge: networks and reference.
        prompts: of the clips, in their order; else those of ``prompts.txt`` in a folder, where it is.
        limit: take the first so many clips of each.
        progress: told how many clips more were looked at.

    Raises:
        DataError: when a source cannot be read.
        InputError: when prompts and clips do not fit each other.
    """
    rows: list[dict[str, Any]] = []
    first: SeenClips | None = None
    for source in map(Path, sources):
        clips = judge.open(source, limit)
        texts = prompts_of(source, prompts)
        seen = judge.look(clips, texts if texts is None or limit is None else texts[:limit], progress)
        row = {"folder": str(source), **seen.describe(), "clip format": clips.format, **judge.figures(seen)}
        if first is not None and len(first.digests) == len(seen.digests):
            row["identical clips"] = sum(a == b for a, b in zip(first.digests, seen.digests, strict=True))
        first = first or seen
        rows.append(row)
    return rows


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _mean(name: str, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """A column with its interval, where there are clips enough for one."""
    row: dict[str, Any] = {name: float(np.mean(values))}
    if len(values) >= FEWEST:
        interval = bootstrap_mean(np.asarray(values))
        row[f"{name} interval"] = [interval.low, interval.high]
    return row


def _has_statistics(source: Path) -> bool:
    """Whether it is an npz of statistics, and not one of clips."""
    if source.suffix.lower() != ".npz" or not source.is_file():
        return False
    try:
        with np.load(source) as arrays:
            return {"mu", "sigma"} <= set(arrays.files) and "arr_0" not in arrays.files
    except _UNREADABLE:
        return False  # Clips.open says what is wrong with it
