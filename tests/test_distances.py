"""Distances between sets of features equal their published definitions, written out here or computed by other packages."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from arsd.errors import DataError, InputError
from arsd.metrics import (
    Statistics,
    frechet_distance,
    frechet_is_biased,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)
from arsd.metrics import distances as module


def draw(count: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift


@pytest.fixture(autouse=True)
def no_warnings_and_no_global_random_numbers():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# --- Frechet distance


def by_matrix_root(a: torch.Tensor, b: torch.Tensor) -> float:
    """The formula of pytorch-fid and clean-fid: |m1 - m2|^2 + Tr(S1 + S2 - 2 sqrtm(S1 S2)), covariances over N - 1."""
    x, y = a.numpy(), b.numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(shift + np.trace(s1) + np.trace(s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2).real))


def by_torch_fidelity(a: torch.Tensor, b: torch.Tensor) -> float:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    pair = [fid.fid_features_to_statistics(side) for side in (a, b)]
    return fid.fid_statistics_to_metric(*pair, False)[fid.KEY_METRIC_FID]


CASES = {
    "ordinary": (draw(400, 48, 0), draw(500, 48, 1, 0.1, 1.2)),
    "barely more pictures than dimensions": (draw(50, 48, 0), draw(49, 48, 1, 0.1, 1.2)),
    "far from the origin": (draw(400, 48, 0, 1e4), draw(500, 48, 1, 1e4 + 0.1, 1.2)),
    "ill-conditioned": (draw(400, 48, 0) * torch.logspace(0, -6, 48), (draw(500, 48, 1, 0.1) * torch.logspace(0, -6, 48))),
}


@pytest.mark.parametrize("name", CASES)
def test_frechet_distance_equals_the_two_reference_implementations(name: str):
    real, fake = (side.double() for side in CASES[name])
    value = frechet_distance(real, fake)
    assert value == pytest.approx(by_matrix_root(real, fake), rel=1e-9)
    assert value == pytest.approx(by_torch_fidelity(real, fake), rel=1e-9)
    assert value == pytest.approx(frechet_distance(fake, real), rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_statistics_stand_for_their_features(name: str):
    real, fake = (side.double() for side in CASES[name])
    value = frechet_distance(real, fake)
    for first, second in [
        (Statistics.of(real), fake),
        (real, Statistics.of(fake)),
        (Statistics.of(real), Statistics.of(fake)),
    ]:
        assert frechet_distance(first, second) == pytest.approx(value, rel=1e-6)


def test_the_covariance_is_unbiased():
    features = draw(5, 3, 0)
    covariance = Statistics.of(features).covariance
    assert torch.allclose(covariance, torch.from_numpy(np.cov(features.numpy(), rowvar=False, ddof=1)))
    assert not torch.allclose(covariance, torch.from_numpy(np.cov(features.numpy(), rowvar=False, ddof=0)))
    one = torch.tensor([[0.0], [2.0]])  # variances 2 and 18 over N - 1: (sqrt 2 - sqrt 18)^2 + (1 - 3)^2
    assert frechet_distance(one, 3 * one) == pytest.approx((math.sqrt(18) - math.sqrt(2)) ** 2 + 4)


def test_with_fewer_pictures_than_dimensions_the_distance_is_exact_and_flagged():
    real, fake = draw(20, 64, 0), draw(30, 64, 1, 0.1)
    assert frechet_distance(real, fake) == pytest.approx(by_torch_fidelity(real, fake), rel=1e-5)
    assert frechet_distance(Statistics.of(real), fake) == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-10)
    turned = torch.linalg.qr(draw(64, 64, 2)).Q  # rotating both sides changes nothing
    assert frechet_distance(real @ turned, fake @ turned) == pytest.approx(frechet_distance(real, fake), rel=1e-10)
    assert frechet_is_biased(63, 64) and not frechet_is_biased(64, 64)


def test_half_precision_features_are_measured_in_float64():
    real, fake = draw(100, 8, 0).half(), draw(100, 8, 1).half()
    assert frechet_distance(real, fake) == frechet_distance(real.double(), fake.double())


def test_statistics_survive_a_file_and_files_of_other_tools_are_read(tmp_path):
    found = Statistics.of(draw(40, 6, 0))
    found.save(tmp_path / "own.npz")
    again = Statistics.load(tmp_path / "own.npz")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.covariance, found.covariance) and again.count == 40
    with np.load(tmp_path / "own.npz") as arrays:  # as pytorch-fid reads it
        assert arrays["mu"].shape == (6,) and arrays["sigma"].shape == (6, 6) and arrays["mu"].dtype == np.float64
    extra = {"mu_s": np.zeros(3), "arr_0": np.zeros(2, np.uint8)}  # the OpenAI evaluator's
    np.savez(tmp_path / "other.npz", mu=found.mean.float().numpy(), sigma=found.covariance.numpy(), **extra)
    other = Statistics.load(tmp_path / "other.npz")
    assert other.count is None and other.mean.dtype == other.covariance.dtype == torch.float64
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["other.npz", "own.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(2)}, "lacks mu or sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu \[2\] and sigma \[3, 3\]"),
        ({"mu": np.zeros((2, 2)), "sigma": np.eye(2)}, r"mu \[2, 2\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN or infinity"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "could not convert string"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "cannot be read"),
    ],
)
def test_statistics_of_another_layout_are_refused_in_one_line(tmp_path, arrays, message: str):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        Statistics.load(tmp_path / "a.npz")
    assert "\n" not in str(caught.value) and "a.npz" in str(caught.value)


def test_missing_and_damaged_statistics_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Statistics.load(tmp_path / "absent.npz")
    Statistics.of(draw(40, 6, 0)).save(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as an .npz"):
        Statistics.load(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(DataError, match="cannot be read as an .npz"):
        Statistics.load(tmp_path / "b.npy")
    with pytest.raises(InputError, match="cannot write"):
        Statistics.of(draw(4, 2, 0)).save(tmp_path / "absent" / "a.npz")


def test_statistics_of_another_dimension_are_refused():
    with pytest.raises(DataError, match="dimension 4 and 5"):
        frechet_distance(Statistics.of(draw(20, 4, 0)), draw(20, 5, 0))


# --- kernel distance


def mmd_in_loops(real: np.ndarray, fake: np.ndarray) -> float:
    """Equation 4 of Binkowski et al., pair by pair."""
    dim = real.shape[1]

    def mean(a, b, skip_diagonal):
        values = [
            (float(a[i] @ b[j]) / dim + 1) ** 3
            for i in range(len(a))
            for j in range(len(b))
            if not (skip_diagonal and i == j)
        ]
        return sum(values) / len(values)

    return mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)


@pytest.mark.parametrize("counts", [(12, 12), (9, 17), (2, 2), (2, 5)])
@pytest.mark.parametrize("rows", [5, 1024])
def test_kernel_distance_equals_the_formula_pair_by_pair(counts, rows: int, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    real, fake = draw(counts[0], 4, 0, 0.3), draw(counts[1], 4, 1)
    expected = mmd_in_loops(real.numpy(), fake.numpy())
    for groups in (2, 5, 50):
        assert kernel_distance(real, fake, groups=groups).value == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(fake, real).value == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_equals_that_of_torchmetrics_on_one_subset_of_everything():
    from torchmetrics.image.kid import poly_mmd

    real, fake = draw(60, 16, 0, 0.3), draw(60, 16, 1)
    assert kernel_distance(real, fake).value == pytest.approx(float(poly_mmd(real, fake)), rel=1e-10)


def test_the_jackknife_leaves_out_each_group_and_nothing_else():
    """With as many groups as pictures, it is the plain leave-one-out jackknife over the dealt pairs."""
    real, fake = draw(8, 3, 0, 0.5), draw(8, 3, 1)
    generator = torch.Generator().manual_seed(3)
    dealt = [torch.randperm(8, generator=generator) for _ in range(2)]
    left = np.array([mmd_in_loops(real[dealt[0] != g].numpy(), fake[dealt[1] != g].numpy()) for g in range(8)])
    width = stats.t.ppf(0.95, 7) * math.sqrt(7 / 8 * ((left - left.mean()) ** 2).sum())
    found = kernel_distance(real, fake, groups=8, confidence=0.9, seed=3)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((width, width), rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 5, 49, 1000])
def test_students_quantiles(freedom: int):
    for share in (0.5, 0.9, 0.95, 0.99):
        assert module._student_quantile(share, freedom) == pytest.approx(stats.t.ppf((1 + share) / 2, freedom), rel=1e-4)


def test_kernel_distance_is_unbiased_and_its_interval_covers_zero_for_sets_of_one_law():
    """400 pairs of 60 pictures. A diagonal left in adds 0.2 to the mean, 150 standard errors.

    The interval covered 0 in 96 to 99.5 % of pairs in seven such settings of 400 (8 to 512 dimensions, 40 to 300 pictures).
    """
    scale = torch.arange(1, 17, dtype=torch.float64).rsqrt()
    found = [kernel_distance(draw(60, 16, 2 * i) * scale, draw(60, 16, 2 * i + 1) * scale, groups=20) for i in range(400)]
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    covered = np.mean([each.low <= 0 <= each.high for each in found])
    assert covered >= 0.93
    assert min(values) < 0


def test_the_interval_of_a_true_distance_is_neither_blind_nor_endless():
    found = [kernel_distance(draw(200, 16, 2 * i, 0.5), draw(200, 16, 2 * i + 1)) for i in range(60)]
    truth = float(np.mean([each.value for each in found]))
    assert all(each.low > 0 for each in found)
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.85  # of 60; 0.92 and more in long runs
    wide = kernel_distance(draw(200, 16, 0, 0.5), draw(200, 16, 1), confidence=0.999)
    assert wide.high - wide.low > 1.5 * (found[0].high - found[0].low)


def test_two_pictures_have_a_value_and_no_interval():
    found = kernel_distance(draw(2, 4, 0), draw(2, 4, 1))
    assert math.isfinite(found.value) and (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("options", [{"groups": 1}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_kernel_distance_refuses_intervals_that_are_none(options):
    with pytest.raises(InputError, match="at least 2 groups"):
        kernel_distance(draw(9, 4, 0), draw(9, 4, 1), **options)


# --- precision and recall, nearest


def covered_in_loops(queries: np.ndarray, pool: np.ndarray, k: int) -> float:
    inside = 0
    for query in queries:
        for j, centre in enumerate(pool):
            others = sorted(math.dist(centre, pool[i]) for i in range(len(pool)) if i != j)
            if math.dist(query, centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(queries)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rows", [7, 1024])
def test_precision_and_recall_equal_the_definition_in_loops(k: int, rows: int, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    real, fake = draw(25, 3, 0), draw(31, 3, 1, 1.0, 1.2)
    found = precision_recall(real, fake, k)
    assert found.precision == covered_in_loops(fake.numpy(), real.numpy(), k)
    assert found.recall == covered_in_loops(real.numpy(), fake.numpy(), k)
    assert 0 < found.precision != found.recall
    swapped = precision_recall(fake, real, k)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_precision_and_recall_equal_torch_fidelity():
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = draw(200, 8, 0), draw(150, 8, 1, 0.5, 0.7)
    precision, recall = prc.calculate_precision_recall_full(fake, real, 3)  # generated first
    found = precision_recall(real, fake)
    assert (found.precision, found.recall) == pytest.approx((precision, recall), abs=1e-6)


def test_one_picture_over_and_over_is_precise_and_recalls_nothing():
    real = draw(40, 8, 0, 100)
    found = precision_recall(real, real[:1].repeat(20, 1))
    assert (found.precision, found.recall) == (1.0, 1 / 40)  # the balls have radius 0, and the copied picture lies in one


def test_nearest_finds_copies_at_exactly_zero_and_others_at_their_distance(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 3)
    pool = draw(20, 50, 0, 1e3)
    queries = torch.cat([pool[[7, 2]], draw(5, 50, 1, 1e3), pool[[4]] + 1e-9])
    distance, index = nearest(queries, pool)
    expected = (queries[:, None] - pool[None]).square().sum(-1).sqrt()
    assert torch.equal(index, expected.argmin(1)) and index[:2].tolist() == [7, 2]
    assert distance[:2].tolist() == [0, 0]
    assert torch.allclose(distance, expected.min(1).values, rtol=1e-9, atol=0)


# --- Inception Score


def score_of_split(logits: torch.Tensor) -> float:
    p = logits.softmax(1).numpy()
    return float(np.exp(np.mean([np.sum(row * np.log(row / p.mean(0))) for row in p])))


def test_inception_score_equals_the_formula():
    logits = draw(40, 7, 0, 0, 2)
    assert inception_score(logits, splits=1) == pytest.approx((score_of_split(logits), 0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    parts = [score_of_split(logits[order][10 * i : 10 * i + 10]) for i in range(4)]
    assert inception_score(logits, splits=4, seed=5) == pytest.approx((np.mean(parts), np.std(parts)))


def test_inception_score_splits_as_the_original_code_does():
    """25 pictures in 10 splits of 2 or 3; chunks of 3 would leave one picture alone, whose score is 1."""
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = draw(25, 7, 0, 0, 2)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    found = isc.isc_features_to_metric(logits[order], 10, False, 0)
    assert inception_score(logits) == pytest.approx((found[isc.KEY_METRIC_ISC_MEAN], found[isc.KEY_METRIC_ISC_STD]))


def test_inception_score_reaches_its_bounds_even_for_certain_classes():
    certain = torch.eye(10).repeat(10, 1) * 5000  # probabilities underflow
    assert inception_score(certain, splits=1)[0] == pytest.approx(10)
    assert inception_score(torch.eye(10)[:5].repeat(2, 1) * 5000, splits=1)[0] == pytest.approx(
        5
    )  # and classes of no picture
    assert inception_score(torch.zeros(100, 10)) == pytest.approx((1, 0))


# --- what none of them takes

FIGURES = {
    "frechet": frechet_distance,
    "kernel": kernel_distance,
    "precision": lambda real, fake: precision_recall(real, fake, k=1),
    "nearest": nearest,
    "inception": lambda real, fake: inception_score(fake, splits=1),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused_by_row(name: str, value: float):
    fake = draw(9, 4, 1)
    fake[6, 2] = value
    with pytest.raises(InputError, match="NaN or infinity .*row 6"):
        FIGURES[name](draw(9, 4, 0), fake)


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "nearest"])
def test_a_single_picture_is_refused(name: str):
    with pytest.raises(InputError, match="1 pictures: .*at least 2"):
        FIGURES[name](draw(9, 4, 0), draw(1, 4, 1))


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "inception"])
def test_features_of_two_extractors_are_refused(name: str):
    with pytest.raises(InputError, match="dimension 4 and fake 5"):
        FIGURES[name](draw(9, 4, 0), draw(9, 5, 1))


def test_other_mistakes_are_named():
    with pytest.raises(InputError, match="3 pictures: .*at least 4"):
        precision_recall(draw(3, 4, 0), draw(9, 4, 1))
    with pytest.raises(InputError, match="k is 0"):
        precision_recall(draw(3, 4, 0), draw(9, 4, 1), k=0)
    with pytest.raises(InputError, match="10 splits of 9 pictures"):
        inception_score(draw(9, 4, 0))
    with pytest.raises(InputError, match=r"shape \[9\]"):
        Statistics.of(torch.zeros(9))
