"""Figures that judge a decoder's output."""

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

_LAZY = {
    "ClipScorer": "clip",
    "DrawPlan": "drawing",
    "DrawnSet": "drawing",
    "EfficientNetFeatures": "extractors",
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
    "bootstrap_mean": "resampling",
    "draw": "drawing",
    "entries": "sweep",
    "find_extractor": "extractors",
    "find_reference": "reference",
    "find_scorer": "extractors",
    "forced_divergence": "divergence",
    "frechet_distance": "distances",
    "frechet_is_biased": "distances",
    "inception_score": "distances",
    "kernel_distance": "distances",
    "nearest": "distances",
    "precision_recall": "distances",
    "teacher_force": "divergence",
}
__all__ = [
    "ClipScorer",
    "DrawPlan",
    "DrawnSet",
    "EfficientNetFeatures",
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
    "bootstrap_mean",
    "diversity",
    "draw",
    "entries",
    "find_extractor",
    "find_reference",
    "find_scorer",
    "forced_divergence",
    "frechet_distance",
    "frechet_is_biased",
    "inception_score",
    "kernel_distance",
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
