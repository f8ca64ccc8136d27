"""How a clip goes from frame to frame: consistency, flicker, motion. A still clip is perfectly consistent: read both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from arsd.errors import InputError
from arsd.metrics.extractors import ImageFeatures
from arsd.metrics.video import check_clips

MOVED = 0.05  # change of a channel, of [0, 1], from which a pixel counts as moved: above the noise of lossy files


@dataclass(frozen=True)
class Changes:
    """How the pixels of a clip change.

    Attributes:
        flicker: mean absolute difference of neighbouring frames, in [0, 1]. 1 less it is VBench's temporal flickering
            (arXiv 2311.17982), which is meant for scenes that stand still.
        motion: share of the pixels in which some channel changes by more than :data:`MOVED` from a frame to the next.
        loop_gap: mean absolute difference of the last and the first frame, in [0, 1].
    """

    flicker: float
    motion: float
    loop_gap: float

    @staticmethod
    def of(clip: np.ndarray) -> Changes:
        """Of a clip.

        Args:
            clip: uint8 [T, H, W, 3], of two frames or more.

        Raises:
            InputError: for anything else.
        """
        check_clips([clip], 2, "change from frame to frame")
        differences = [_apart(*pair) for pair in zip(clip[:-1], clip[1:], strict=True)]
        return Changes(
            float(np.mean([each.mean() for each in differences])) / 255,
            float(np.mean([(each > 255 * MOVED).any(-1).mean() for each in differences])),
            float(_apart(clip[-1], clip[0]).mean()) / 255,
        )


@dataclass(frozen=True)
class Consistency:
    """How alike the frames of a clip are to a network of pictures.

    Attributes:
        subject: the subject consistency of VBench (arXiv 2311.17982; there with DINO): the mean over all frames but the
            first of (cosine to the frame before + cosine to the first) / 2, negative cosines counted as 0 as in its code.
        before: mean cosine to the frame before.
        first: mean cosine to the first frame.
    """

    subject: float
    before: float
    first: float

    @staticmethod
    def of(features: Tensor) -> Consistency:
        """Of features of the frames [T, D], of any length.

        Raises:
            InputError: for fewer than two frames.
        """
        if features.ndim != 2 or len(features) < 2:
            raise InputError(f"features of the frames have the shape {list(features.shape)}: give two frames or more")
        unit = features.double()
        unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
        before, first = (unit[1:] * unit[:-1]).sum(1), (unit[1:] * unit[:1]).sum(1)
        subject = (before.clamp(min=0) + first.clamp(min=0)) / 2
        return Consistency(float(subject.mean()), float(before.mean()), float(first.mean()))

    @staticmethod
    def seen_by(extractor: ImageFeatures, clip: np.ndarray) -> Consistency:
        """Of a clip uint8 [T, H, W, 3], by an extractor of pictures.

        Raises:
            InputError: for fewer than two frames.
        """
        check_clips([clip], 2, "consistency")
        return Consistency.of(extractor.features(list(clip)))


def _apart(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Absolute differences, 0 to 255."""
    return np.abs(frame.astype(np.int16) - other)
