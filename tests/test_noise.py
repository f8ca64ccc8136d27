"""The counter-based noise: its bits, its laws, and that no two keys share a number."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from arsd.decoding import SJD, CounterNoise, Purpose
from arsd.decoding.noise import uniform_from_bits
from arsd.exactness.tables import HashTarget, run

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(z: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), in plain integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_bits(seed: int, image: int, position: int, purpose: int, iteration: int, token: int = 0) -> int:
    """What CounterNoise.bits must give, written independently of it."""
    key = seed & MASK
    for value in (0, image, purpose, position, iteration):
        mixed = splitmix64((value * 0xBF58476D1CE4E5B9 + GAMMA) & MASK)
        key = splitmix64(((key + GAMMA) & MASK) ^ mixed)
    return splitmix64((key + (token + 1) * GAMMA) & MASK)


def bits(noise: CounterNoise, position: int, purpose: Purpose, iteration: int = 0, tokens: int | torch.Tensor = 0) -> int:
    return int(noise.bits(purpose, torch.tensor([[position]]), iteration, tokens).flatten()[-1]) & MASK


def uniforms(seeds: int = 1, images: int = 1, purposes: int = 1, positions: int = 1, iterations: int = 1) -> torch.Tensor:
    """Uniforms over a grid of keys [seed, image, purpose, position, iteration]."""
    rows = list(itertools.product(range(seeds), range(images)))
    noise = CounterNoise([s for s, _ in rows], [i for _, i in rows])
    at = torch.arange(positions).expand(len(rows), -1)
    grid = [[noise.uniform(Purpose(p), at, i) for i in range(iterations)] for p in range(purposes)]
    stacked = torch.stack([torch.stack(row, dim=-1) for row in grid], dim=1)
    return stacked.view(seeds, images, purposes, positions, iterations)


def along(axis: str, count: int) -> torch.Tensor:
    """``count`` uniforms whose keys differ in one axis only."""
    number, same = torch.arange(count), [3] * count
    if axis == "positions":
        return CounterNoise([3], [3]).uniform(Purpose.ACCEPT, number[None], 3)
    noise = CounterNoise(range(count) if axis == "seeds" else same, range(count) if axis == "images" else same)
    iteration = number if axis == "iterations" else torch.full((count,), 3)
    return noise.uniform(Purpose.ACCEPT, torch.full((count, 1), 3), iteration)


def test_bits_equal_an_independent_splitmix64_and_never_change():
    golden = {
        (0, 0, 0, Purpose.TOKEN, 0): 0x20BB2D92549239CB,
        (7, 3, 255, Purpose.ACCEPT, 12): 0x3200F6B4C299AB99,
        (2**64 - 1, 1, 4095, Purpose.INITIAL, 0): 0x3C6F72010ACDA123,
        (2**63, 0, 1, Purpose.RESIDUAL, 99): 0xA861DF6E73B1227C,
        (123456789, 63, 17, Purpose.REDRAFT, 5): 0xF7C2FBC1D81B66F8,
    }
    for (seed, image, position, purpose, iteration), value in golden.items():
        assert bits(CounterNoise([seed], [image]), position, purpose, iteration) == value
        assert plain_bits(seed, image, position, purpose, iteration) == value


def test_bits_of_every_key_equal_the_plain_integers_for_rows_positions_and_tokens_at_once():
    seeds, images = [0, 5, -3, 2**40 + 1], [0, 2, 0, 9]
    noise, positions = CounterNoise(seeds, images), torch.tensor([[0, 7], [1, 2], [300, 4], [5, 5]])
    got = noise.bits(Purpose.TOKEN, positions, torch.tensor([0, 1, 2, 3]), torch.arange(3))
    for b, j, v in itertools.product(range(4), range(2), range(3)):
        assert int(got[b, j, v]) & MASK == plain_bits(seeds[b], images[b], int(positions[b, j]), 0, b, v)


def test_a_token_may_be_given_as_a_number():
    noise, position = CounterNoise([1], [0]), torch.tensor([[4]])
    vector = noise.bits(Purpose.TOKEN, position, 0, torch.arange(3))
    assert [int(noise.bits(Purpose.TOKEN, position, 0, token)) for token in range(3)] == vector.flatten().tolist()


def test_negative_seeds_are_their_64_bit_pattern():
    a, b = CounterNoise([-1], [0]), CounterNoise([2**64 - 1], [0])
    assert bits(a, 3, Purpose.TOKEN) == bits(b, 3, Purpose.TOKEN)


def test_uniforms_lie_in_the_open_interval_even_at_the_extreme_bits():
    extreme = uniform_from_bits(torch.tensor([0, -1, 1, 2**63 - 1, -(2**63)]))
    assert bool((extreme > 0).all()) and bool((extreme < 1).all())
    gumbel = -torch.log(-torch.log(extreme))
    assert bool(torch.isfinite(gumbel).all())
    assert float(extreme[0]) == 2.0**-53 and float(extreme[1]) == 1 - 2.0**-53


def test_uniforms_are_uniform_along_every_axis_of_the_key():
    """KS and chi-square on 100 bins; 40,000 draws each see a density error of about 5 % in one bin."""
    axes = ("seeds", "images", "positions", "iterations")
    for axis in axes:
        u = along(axis, 40_000).flatten().numpy()
        assert stats.kstest(u, "uniform").pvalue > 1e-4, axis
        counts = torch.histc(torch.from_numpy(u), 100, 0, 1).numpy()
        assert stats.chisquare(counts).pvalue > 1e-4, axis


def test_every_single_bit_is_fair_and_flips_when_any_key_changes_by_one():
    """20,000 keys: a bit that is off by 2 % would be 5.6 sigma."""
    noise = CounterNoise(range(2000), [0] * 2000)
    positions, masks = torch.arange(10).expand(2000, -1), torch.arange(64)
    base = noise.bits(Purpose.ACCEPT, positions, 3)
    neighbours = {
        "seed": CounterNoise(range(1, 2001), [0] * 2000).bits(Purpose.ACCEPT, positions, 3),
        "image": CounterNoise(range(2000), [1] * 2000).bits(Purpose.ACCEPT, positions, 3),
        "position": noise.bits(Purpose.ACCEPT, positions + 1, 3),
        "purpose": noise.bits(Purpose.RESIDUAL, positions, 3),
        "iteration": noise.bits(Purpose.ACCEPT, positions, 4),
        "token": noise.bits(Purpose.ACCEPT, positions, 3, torch.tensor([1]))[..., 0],
    }
    for name, value in {"fair": torch.zeros_like(base), **neighbours}.items():
        share = ((base ^ value)[..., None] >> masks & 1).double().mean((0, 1))
        assert float((share - 0.5).abs().max()) < 5 * 0.5 / 20_000**0.5, name


@pytest.mark.parametrize("axis", range(5), ids=["seed", "image", "purpose", "position", "iteration"])
def test_neighbours_along_every_axis_of_the_key_are_independent(axis: int):
    """A 10 x 10 table of (u, next u): at 37,500 pairs or more a dependence of 2 % of the variance gives p < 1e-60."""
    u = uniforms(seeds=10, images=10, purposes=5, positions=10, iterations=10)
    pairs = u.unfold(axis, 2, 1).reshape(-1, 2)
    table = torch.bincount((pairs * 10).long() @ torch.tensor([10, 1]), minlength=100).numpy()
    assert stats.chisquare(table).pvalue > 1e-4
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 5 / len(pairs) ** 0.5


def test_no_two_keys_of_a_grid_share_their_bits():
    noise = CounterNoise([s for s in range(4) for _ in range(4)], [i for _ in range(4) for i in range(4)])
    positions = torch.arange(40).expand(16, -1)
    keys = itertools.product(Purpose, range(6))
    everything = torch.cat([noise.bits(p, positions, i, torch.arange(20)).flatten() for p, i in keys])
    assert len(everything.unique()) == len(everything)


def test_seed_and_image_do_not_commute():
    assert bits(CounterNoise([1], [2]), 0, Purpose.TOKEN) != bits(CounterNoise([2], [1]), 0, Purpose.TOKEN)
    assert bits(CounterNoise([0], [1]), 0, Purpose.TOKEN) != bits(CounterNoise([1], [0]), 0, Purpose.TOKEN)


def test_token_gumbel_is_gumbel_distributed_and_independent_between_tokens():
    """60,000 values; the mean is Euler's constant within 5 sigma."""
    noise = CounterNoise(range(600), [0] * 600)
    noise.prepare([0] * 600, 10, 10, torch.float64)
    values = noise.token_gumbel(torch.arange(10).expand(600, -1), 10, torch.float64)
    assert stats.kstest(values.flatten().numpy(), "gumbel_r").pvalue > 1e-4
    assert abs(float(values.mean()) - 0.5772156649) < 5 * math.pi / 6**0.5 / values.numel() ** 0.5
    correlation = torch.corrcoef(values.reshape(-1, 10).T) - torch.eye(10)
    assert float(correlation.abs().max()) < 5 / 6000**0.5


def direct_gumbel(noise: CounterNoise, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    return -torch.log(-torch.log(uniform_from_bits(noise.bits(Purpose.TOKEN, positions, 0, torch.arange(vocab)))))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 80])
def test_ring_of_gumbel_noise_equals_direct_computation_for_ragged_rows(window: int):
    """Rows walk at their own speed: one stays at 0, one jumps far, the others take random steps up to the window."""
    generator, vocab = torch.Generator().manual_seed(window), 5
    noise, starts = CounterNoise([3, 3, 4, 5], [0, 1, 0, 7]), [0, 0, 0, 0]
    for turn in range(40):
        noise.prepare(starts, window, vocab, torch.float64)
        positions = torch.tensor(starts)[:, None] + torch.arange(window)
        got = noise.token_gumbel(positions, vocab, torch.float64)
        assert torch.equal(got, direct_gumbel(noise, positions, vocab))
        steps = torch.randint(0, window + 1, (4,), generator=generator).tolist()
        starts = [0, starts[1] + steps[1], starts[2] + steps[2], starts[3] + (500 if turn == 20 else steps[3])]


def test_ring_serves_rows_that_go_back():
    noise, generator = CounterNoise([3, 4], [0, 1]), torch.Generator().manual_seed(0)
    for _ in range(30):
        starts = torch.randint(0, 600, (2,), generator=generator)
        noise.prepare(starts.tolist(), 80, 5, torch.float64)
        positions = starts[:, None] + torch.arange(80)
        assert torch.equal(noise.token_gumbel(positions, 5, torch.float64), direct_gumbel(noise, positions, 5))


def test_ring_is_made_anew_when_window_vocabulary_or_type_change():
    noise = CounterNoise([1], [0])
    double, single = torch.float64, torch.float32
    for window, vocab, dtype in [(4, 3, double), (64, 3, double), (2, 7, double), (2, 7, single)]:
        noise.prepare([50], window, vocab, dtype)
        positions = 50 + torch.arange(window)[None]
        got = noise.token_gumbel(positions, vocab, dtype)
        assert got.dtype == dtype and torch.equal(got, direct_gumbel(noise, positions, vocab).to(dtype))


def test_one_noise_object_serves_two_calls():
    """The numbers are a pure function of the key, so a second call from position 0 must see the first call's numbers."""
    noise = CounterNoise([1, 2], [0, 1])
    first = run(HashTarget(9, 150, 2), SJD(window=8), noise=noise).tokens
    assert torch.equal(run(HashTarget(9, 150, 2), SJD(window=8), noise=noise).tokens, first)


def test_categorical_follows_its_weights_and_never_draws_a_weight_of_zero():
    """50,000 draws; a law off by 1 % in total variation would be about 10 sigma."""
    count, weights = 50_000, torch.tensor([0.0, 0.3, 0.0, 1.2, 0.5, 0.0])
    noise, positions = CounterNoise([11], [0]), torch.arange(count)[None]
    active = torch.ones(1, count, dtype=torch.bool)
    ids = noise.categorical(weights.expand(1, count, -1), Purpose.RESIDUAL, positions, torch.tensor([4]), active)
    counts = torch.bincount(ids.flatten(), minlength=6).double()
    assert not counts[weights == 0].any()
    live = weights > 0
    assert stats.chisquare(counts[live], (weights / weights.sum())[live].double() * count, sum_check=False).pvalue > 1e-4


def test_bernoulli_and_integers_have_their_laws():
    count = 50_000
    noise, positions, active = CounterNoise([12], [0]), torch.arange(count)[None], torch.ones(1, count, dtype=torch.bool)
    for p in (0.0, 0.03, 0.7, 1.0):
        drawn = noise.bernoulli(torch.full((1, count), p), Purpose.ACCEPT, positions, torch.tensor([0]), active)
        assert abs(float(drawn.double().mean()) - p) <= 5 * (p * (1 - p) / count) ** 0.5
    drawn = noise.integers(torch.full((1, count), 7), Purpose.INITIAL, positions)
    assert int(drawn.min()) == 0 and int(drawn.max()) == 6
    assert stats.chisquare(torch.bincount(drawn.flatten()).numpy()).pvalue > 1e-4


def test_nothing_touches_torch_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for coupling in ("gumbel", "maximal", "gumbel-rejection", "independent"):
        run(HashTarget(9, 20, 2), SJD(window=4, coupling=coupling))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_does_not_depend_on_torch_global_seed():
    tokens = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tokens.append(run(HashTarget(9, 20, 2), SJD(window=4, coupling="independent")).tokens)
    assert torch.equal(*tokens)
