"""Distances between two sets of features: Frechet, kernel, precision and recall, Inception Score, nearest neighbours.

torchmetrics does the arithmetic where it has it. Everything is float64 on the CPU; no global random number is drawn.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from arsd.errors import DataError, InputError

_ROWS = 1024  # rows of a distance or kernel matrix held at a time


class _Identity(nn.Module):
    """Hands features on as they are: torchmetrics asks for a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _checked(features: Tensor, name: str, least: int = 2) -> Tensor:
    """``features`` as float64 [N, D] on the CPU.

    Raises:
        InputError: when it is no matrix, has fewer than ``least`` rows, or holds NaN or infinities.
    """
    features = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if features.ndim != 2 or not features.shape[1]:
        raise InputError(f"{name} has the shape {list(features.shape)}: give [pictures, dimension]")
    if len(features) < least:
        raise InputError(f"{name} has {len(features)} pictures: this figure needs at least {least}")
    bad = (~torch.isfinite(features)).any(1)
    if bad.any():
        first = int(bad.int().argmax())
        raise InputError(f"{name} holds NaN or infinity (first in row {first}): the weights or that picture are damaged")
    return features


def _checked_pair(real: Tensor, fake: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    real, fake = _checked(real, "real", least), _checked(fake, "fake", least)
    if real.shape[1] != fake.shape[1]:
        raise InputError(f"real has dimension {real.shape[1]} and fake {fake.shape[1]}: use one extractor for both")
    return real, fake


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features, all that a Frechet distance needs.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D], unbiased (divided by N - 1).
        count: N; None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @staticmethod
    def of(features: Tensor) -> Statistics:
        """Of features [N, D].

        Raises:
            InputError: for NaN, infinities, or fewer than two pictures.
        """
        features = _checked(features, "features")
        return Statistics(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1), len(features))

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` that pytorch-fid, clean-fid and the OpenAI evaluator read (``mu``, ``sigma``), and ``count``.

        Raises:
            InputError: when it cannot be written.
        """
        path = Path(path)
        scratch = path.with_name(f".{path.name}.part")
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        try:
            with scratch.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(scratch, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            scratch.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Read ``mu`` [D] and ``sigma`` [D, D] of an ``.npz``; other keys but ``count`` are ignored.

        Raises:
            DataError: when the file is missing, damaged, or holds something else.
        """
        try:
            with Path(path).open("rb") as file:
                arrays = np.load(file, allow_pickle=False)
                if isinstance(arrays, np.ndarray):
                    raise ValueError("it is a single array")
                found = {name: np.asarray(arrays[name], np.float64) for name in ("mu", "sigma", "count") if name in arrays}
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: give an .npz with mu and sigma") from None
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path} cannot be read as an .npz ({reason}): give one with mu and sigma") from None
        if "mu" not in found or "sigma" not in found:
            raise DataError(
                f"{path} lacks mu or sigma: give statistics as pytorch-fid, clean-fid or Statistics.save write them"
            )
        mean, covariance = (torch.from_numpy(found[name]) for name in ("mu", "sigma"))
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise DataError(f"{path} has mu {list(mean.shape)} and sigma {list(covariance.shape)}: give [D] and [D, D]")
        if not torch.isfinite(mean).all() or not torch.isfinite(covariance).all():
            raise DataError(f"{path} holds NaN or infinity: compute the statistics again")
        return Statistics(mean, covariance, int(found["count"]) if "count" in found else None)


def frechet_is_biased(count: int, dim: int) -> bool:
    """Whether ``count`` pictures are fewer than the feature dimension.

    Their covariance is then singular and the distance mostly bias: it does not fall to 0 for two samples of one law.
    """
    return count < dim


def frechet_distance(real: Tensor | Statistics, fake: Tensor | Statistics) -> float:
    """Squared Frechet distance of the Gaussians with the sets' means and covariances (FID; Heusel et al. 2017, equation 6).

    Args:
        real: features [N, D], or their statistics.
        fake: features [M, D], or their statistics.

    Raises:
        InputError: for NaN, infinities, fewer than two pictures, or features of two dimensions.
        DataError: when statistics are of another dimension than the other side.
    """
    if isinstance(real, Tensor) and isinstance(fake, Tensor):
        real, fake = _checked_pair(real, fake)
        few = min(len(real), len(fake)) <= real.shape[1]
        return _frechet_of_few(real, fake) if few else _frechet_of_many(real, fake)
    first = real if isinstance(real, Statistics) else Statistics.of(real)
    second = fake if isinstance(fake, Statistics) else Statistics.of(fake)
    if first.mean.shape != second.mean.shape:
        raise DataError(
            f"statistics of dimension {len(first.mean)} and {len(second.mean)} cannot be compared: "
            "use statistics made with the extractor of the features"
        )
    return _frechet_of_statistics(first, second)


def _frechet_of_many(real: Tensor, fake: Tensor) -> float:
    """By torchmetrics, around the mean of the real features: its sums of squares would cancel around a far origin."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(real.shape[1]))
    centre = real.mean(0)
    metric.update(real - centre, real=True)
    metric.update(fake - centre, real=False)
    return max(float(metric.compute()), 0.0)


def _frechet_of_few(real: Tensor, fake: Tensor) -> float:
    """With singular covariances A^T A and B^T B: Tr (S1 S2)^(1/2) is the sum of the singular values of A B^T."""
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    a = (real - real.mean(0)) / math.sqrt(len(real) - 1)
    b = (fake - fake.mean(0)) / math.sqrt(len(fake) - 1)
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(shift + a.square().sum() + b.square().sum() - 2 * shared), 0.0)


def _frechet_of_statistics(first: Statistics, second: Statistics) -> float:
    """Tr (S1 S2)^(1/2) from the symmetric S1^(1/2) S2 S1^(1/2), whose eigenvalues stay real where S1 or S2 is singular."""
    values, vectors = torch.linalg.eigh(first.covariance)
    half = vectors * values.clamp(min=0).sqrt()
    shared = torch.linalg.eigvalsh(half.T @ second.covariance @ half).clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return max(float((first.mean - second.mean).square().sum() + traces - 2 * shared), 0.0)


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its confidence interval; the value is unbiased and may be negative.

    Attributes:
        value: squared maximum mean discrepancy (MMD).
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def kernel_distance(real: Tensor, fake: Tensor, groups: int = 50, confidence: float = 0.95, seed: int = 0) -> KernelDistance:
    """Unbiased squared MMD with the cubic kernel (x.y / D + 1)^3 over all pictures (KID; Binkowski et al. 2018).

    The usual figure is a mean over small random subsets; this one is the U-statistic of whole sets, of the same expectation
    and less noise. The interval is a delete-a-group jackknife: the pictures of each side are dealt into groups at random,
    and Student's law is put on the values without one group of each. Where both sets follow one law the U-statistic is
    degenerate and the jackknife overestimates its variance about twice: the interval is then wider than asked for.

    Args:
        real: features [N, D].
        fake: features [M, D].
        groups: that the jackknife leaves out in turn; at most as many as pictures.
        confidence: of the interval.
        seed: of the dealing.

    Raises:
        InputError: for NaN, infinities, fewer than two pictures, two dimensions, fewer than two groups, or a confidence
            outside (0, 1).
    """
    real, fake = _checked_pair(real, fake)
    if groups < 2 or not 0 < confidence < 1:
        raise InputError(f"{groups} groups at confidence {confidence}: give at least 2 groups and a share within (0, 1)")
    groups = min(groups, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    dealt = [torch.randperm(len(features), generator=generator) % groups for features in (real, fake)]
    estimate = _mmd_without(real, fake, dealt, groups)
    value = estimate(None)
    if min(len(real), len(fake)) < 3:  # without one, nothing can be estimated
        return KernelDistance(value, -math.inf, math.inf)
    left = np.array([estimate(group) for group in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(np.square(left - left.mean()).sum()))
    width = _student_quantile(confidence, groups - 1) * error
    return KernelDistance(value, value - width, value + width)


def _mmd_without(real: Tensor, fake: Tensor, dealt: list[Tensor], groups: int) -> Callable[[int | None], float]:
    """A function of a group (or None) that gives the unbiased MMD^2 of all pictures but those of the group."""
    from torchmetrics.image.kid import poly_kernel

    def sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> np.ndarray:
        """Kernel values summed over the pairs of two groups, [groups, groups]."""
        onto = nn.functional.one_hot(of_y, groups).double()
        total = torch.zeros(groups, groups, dtype=torch.float64)
        for rows in torch.arange(len(x)).split(_ROWS):
            total.index_add_(0, of_x[rows], poly_kernel(x[rows], y) @ onto)
        return total.numpy()

    def within(x: Tensor, of: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums over pairs, sums over the diagonal by group, and pictures by group."""
        diagonal = (x.square().sum(1) / x.shape[1] + 1) ** 3
        return sums(x, x, of, of), np.bincount(of, diagonal, groups), np.bincount(of, minlength=groups)

    sides = [within(real, dealt[0]), within(fake, dealt[1])]
    between = sums(real, fake, *dealt)

    def estimate(left_out: int | None) -> float:
        keep = np.arange(groups) != (-1 if left_out is None else left_out)
        counts = [int(count[keep].sum()) for _, _, count in sides]
        own = sum(
            (pairs[np.ix_(keep, keep)].sum() - diagonal[keep].sum()) / (n * (n - 1))
            for (pairs, diagonal, _), n in zip(sides, counts, strict=True)
        )
        return float(own - 2 * between[np.ix_(keep, keep)].sum() / math.prod(counts))

    return estimate


def _student_quantile(share: float, freedom: int) -> float:
    """The t with P(|T| < t) = ``share``, from the law of the angle arctan(T / sqrt(freedom)), whose density is a cosine."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(share, below / below[-1], angles)))


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1].

    Attributes:
        precision: of fake pictures that lie within the manifold of the real ones (quality).
        recall: of real pictures that lie within the manifold of the fake ones (variety).
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    A set's manifold is the union of the balls around its features that reach to the k-th nearest other feature of the set.

    Args:
        real: features [N, D], more than ``k``.
        fake: features [M, D], more than ``k``.
        k: neighbours.

    Raises:
        InputError: for NaN, infinities, too few pictures, two dimensions, or k below 1.
    """
    if k < 1:
        raise InputError(f"k is {k}: precision and recall need at least 1 neighbour")
    real, fake = _checked_pair(real, fake, least=k + 1)
    return PrecisionRecall(_covered(fake, real, k), _covered(real, fake, k))


def _covered(queries: Tensor, pool: Tensor, k: int) -> float:
    """Share of ``queries`` within the manifold of ``pool``."""
    radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in _distances(pool, pool)])  # itself counts as one
    inside = torch.cat([(rows <= radii).any(1) for rows in _distances(queries, pool)])
    return float(inside.double().mean())


def nearest(queries: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest feature of ``pool`` to each query, e.g. the training picture that a sample is closest to.

    Args:
        queries: features [B, D].
        pool: features [N, D].

    Returns:
        Euclidean distances float64 [B] (exactly 0 for a copy), and indices [B] into ``pool``.

    Raises:
        InputError: for NaN, infinities, an empty side, or two dimensions.
    """
    queries, pool = _checked_pair(queries, pool, least=1)
    found = [rows.min(dim=1) for rows in _distances(queries, pool)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances from ``a`` [N, D] to ``b`` [M, D], rows [<= _ROWS, M] at a time.

    By matrix products, which lose small distances in rounding; those are computed again from the differences, so that copies
    lie at 0.
    """
    centre = b.mean(0)
    a, b = a - centre, b - centre
    length_a, length_b = a.square().sum(1, keepdim=True), b.square().sum(1)
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        scale = length_a[rows] + length_b
        squared = (scale - 2 * a[rows] @ b.T).clamp(min=0)
        for at in (squared <= 1e-6 * scale).nonzero().split(_ROWS):
            squared[at[:, 0], at[:, 1]] = (a[start + at[:, 0]] - b[at[:, 1]]).square().sum(1)
        yield squared.sqrt()


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score, exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4), by torchmetrics in each split.

    The splits are those of the original code, of sizes that differ by at most one, after a shuffle (pictures often come
    sorted by class).

    Args:
        logits: class logits [N, C].
        splits: that the score is computed in.
        seed: of the shuffle.

    Returns:
        Mean and standard deviation over the splits (divided by their number, as in the original).

    Raises:
        InputError: for NaN, infinities, fewer than two pictures, or fewer pictures than splits.
    """
    from torchmetrics.image.inception import InceptionScore

    logits = _checked(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise InputError(f"{splits} splits of {len(logits)} pictures: give between 1 and as many as pictures")
    logits = (logits - logits.amax(1, keepdim=True)).clamp(min=-700)  # no probability underflows to 0, whose log is infinite
    logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))]
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # torchmetrics shuffles with the global generator
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save|std")  # the std of one split is none
        metric = InceptionScore(feature=_Identity(logits.shape[1]), splits=1)
        for start, end in zip(edges, edges[1:], strict=False):
            metric.reset()
            metric.update(logits[start:end])
            scores.append(float(metric.compute()[0]))
    return float(np.mean(scores)), float(np.std(scores))
