"""How much a model leaves to chance: entropy of its token laws, diversity across seeds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from torch import Tensor

from arsd.errors import InputError


def mean_entropy(entropies: Tensor) -> float:
    """Mean entropy in bits of the laws that tokens were drawn from.

    Args:
        entropies: nats, any shape (``output.entropies`` of a pipeline call with ``log_probs=True``).
    """
    return float(entropies.double().mean()) / float(np.log(2))


def diversity(tokens: Tensor, images: np.ndarray) -> dict[str, float]:
    """Mean pairwise differences of several pictures of one prompt.

    Args:
        tokens: [B, N] ids.
        images: [B, H, W, 3] in [0, 1].

    Returns:
        ``tokens``: share of positions that differ; ``pixels``: root mean square difference.

    Raises:
        InputError: for fewer than two pictures.
    """
    if len(tokens) < 2 or len(tokens) != len(images):
        raise InputError("diversity needs at least two pictures and as many token rows")
    pairs = list(combinations(range(len(tokens)), 2))
    changed = [float((tokens[a] != tokens[b]).double().mean()) for a, b in pairs]
    distance = [float(np.sqrt(np.mean((images[a] - images[b]) ** 2))) for a, b in pairs]
    return {"tokens": float(np.mean(changed)), "pixels": float(np.mean(distance))}
