"""Figures that judge a decoder's output: pictures and clips."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arsd.metrics.tokens import diversity, mean_entropy

if TYPE_CHECKING:
    from arsd.metrics.clip import ClipScorer
    from arsd.metrics.distances import (
        KernelDistance,
        PrecisionRecall,
        Statistics,
        frechet_distance,
        frechet_is_biased,
        inception_score,
        kernel_distance,
        nearest,
        precision_recall,
    )
    from arsd.metrics.divergence import forced_divergence, teacher_force
    from arsd.metrics.drawing import DrawnSet, DrawPlan, draw
    from arsd.metrics.extractors import (
        EfficientNetFeatures,
        ImageFeatures,
        ImageText,
        InceptionFeatures,
        find_extractor,
        find_scorer,
    )
    from arsd.metrics.images import Pictures, Resizer
    from arsd.metrics.judge import Judge
    from arsd.metrics.protocols import Protocol
    from arsd.metrics.reference import Reference, find_reference
    from arsd.metrics.resampling import Interval, bootstrap_mean
    from arsd.metrics.sweep import entries
    from arsd.metrics.video import VideoFeatures, find_video_extractor
    from arsd.metrics.video_card import make_video_card
    from arsd.metrics.video_clips import Clips, FramePick
    from arsd.metrics.video_frames import Changes, Consistency
    from arsd.metrics.video_judge import VideoJudge, judge_clips

_LAZY = {
    "Changes": "video_frames",
    "ClipScorer": "clip",
    "Clips": "video_clips",
    "Consistency": "video_frames",
    "DrawPlan": "drawing",
    "DrawnSet": "drawing",
    "EfficientNetFeatures": "extractors",
    "FramePick": "video_clips",
    "ImageFeatures": "extractors",
    "ImageText": "extractors",
    "InceptionFeatures": "extractors",
    "Interval": "resampling",
    "Judge": "judge",
    "KernelDistance": "distances",
    "Pictures": "images",
    "PrecisionRecall": "distances",
    "Protocol": "protocols",
    "Reference": "reference",
    "Resizer": "images",
    "Statistics": "distances",
    "VideoFeatures": "video",
    "VideoJudge": "video_judge",
    "bootstrap_mean": "resampling",
    "draw": "drawing",
    "entries": "sweep",
    "find_extractor": "extractors",
    "find_reference": "reference",
    "find_scorer": "extractors",
    "find_video_extractor": "video",
    "forced_divergence": "divergence",
    "frechet_distance": "distances",
    "frechet_is_biased": "distances",
    "inception_score": "distances",
    "judge_clips": "video_judge",
    "kernel_distance": "distances",
    "make_video_card": "video_card",
    "nearest": "distances",
    "precision_recall": "distances",
    "teacher_force": "divergence",
}
__all__ = [
    "Changes",
    "ClipScorer",
    "Clips",
    "Consistency",
    "DrawPlan",
    "DrawnSet",
    "EfficientNetFeatures",
    "FramePick",
    "ImageFeatures",
    "ImageText",
    "InceptionFeatures",
    "Interval",
    "Judge",
    "KernelDistance",
    "Pictures",
    "PrecisionRecall",
    "Protocol",
    "Reference",
    "Resizer",
    "Statistics",
    "VideoFeatures",
    "VideoJudge",
    "bootstrap_mean",
    "diversity",
    "draw",
    "entries",
    "find_extractor",
    "find_reference",
    "find_scorer",
    "find_video_extractor",
    "forced_divergence",
    "frechet_distance",
    "frechet_is_biased",
    "inception_score",
    "judge_clips",
    "kernel_distance",
    "make_video_card",
    "mean_entropy",
    "nearest",
    "precision_recall",
    "teacher_force",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"arsd.metrics.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'arsd.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
