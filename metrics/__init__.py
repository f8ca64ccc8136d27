"""Figures that judge a decoder's output."""

from arsd.metrics.tokens import diversity, mean_entropy

__all__ = ["diversity", "mean_entropy"]
