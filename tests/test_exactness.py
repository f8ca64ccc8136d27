"""The output has the law of plain AR decoding: exactly (every path of the sampler), and in samples of the real noise."""

from __future__ import annotations

import itertools

import pytest
import torch

from arsd.decoding import SJD, Autoregressive, CounterNoise, Law, LawConfig, Laws, Parts, Setting, Step, Verdict
from arsd.decoding.drafters import Jacobi, redraft_by_rule, redraft_independently
from arsd.decoding.rules import RejectionSampling
from arsd.decoding.types import FixedWindow
from arsd.exactness.tables import Build, World, chi_square_z, law_z, pairs_z, sample, total_variation
from arsd.exactness.tape import push_forward
from arsd.exactness.worlds import GUIDED, INITS, WORLDS


def redraft_in_turn(step: Step, law: Law, verdict: Verdict) -> torch.Tensor:
    """Maximal coupling in even passes and at every third position, fresh draws elsewhere."""
    by_rule = (step.iteration % 2 == 0)[:, None] | (step.positions % 3 == 0)
    return torch.where(by_rule, redraft_by_rule(step, law, verdict), redraft_independently(step, law, verdict))


def mixed(window: int, init: str) -> Build:
    """A coupling that changes from pass to pass and from slot to slot; lossless because q is always the law really used."""

    def build(setting: Setting) -> Parts:
        call = (setting.batch, setting.num_tokens, setting.row_length, window, setting.grammar, setting.noise)
        drafter = Jacobi(redraft_in_turn, init, True, *call)
        return Parts(drafter, RejectionSampling(every_slot=True), FixedWindow(window), window)

    return build


def build_of(coupling: str, window: int, init: str) -> Build:
    return mixed(window, init) if coupling == "mixed" else SJD(window=window, coupling=coupling, init=init).build


class Windows:
    """A controller that goes through the given windows, then stays at the last."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = list(sizes)

    def window(self) -> int:
        return self.sizes[0]

    def observe(self, counts: list[int], seconds: float) -> None:
        if len(self.sizes) > 1:
            self.sizes.pop(0)


def assert_exact(world: World, build: Build) -> None:
    law, paths = push_forward(world, build)
    assert abs(float(law.sum()) - 1) < 1e-12, f"mass {float(law.sum())} over {paths} paths"
    assert total_variation(law, world.law()) < 1e-12, f"over {paths} paths"


def test_exact_law_of_a_table_model_is_the_product_of_its_laws():
    world = World(3, 4, 5, GUIDED, forced={2: 1})
    law, target, laws = world.law(), world.target(1), Laws(world.config, world.grammar())
    assert law.shape == (81,) and abs(float(law.sum()) - 1) < 1e-14
    for number, sequence in enumerate(itertools.product(range(3), repeat=4)):
        mass, index = 1.0, 0
        for n, token in enumerate(sequence):
            mass *= float(laws(target.tables[n][:, index][:, None, None], torch.tensor([[n]])).probs[0, 0, token])
            index = index * 3 + token
        assert abs(mass - float(law[number])) < 1e-15
    assert int((law > 0).sum()) == 8  # two ids are left at three positions, one is forced


@pytest.mark.parametrize("coupling", ["independent", "maximal", "mixed"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_path_together_gives_exactly_the_law_of_plain_ar(world: str, init: str, coupling: str):
    for seed, window in enumerate((2, 3, 3)):
        assert_exact(WORLDS[world](seed), build_of(coupling, window, init))


@pytest.mark.parametrize("coupling", ["independent", "maximal", "mixed"])
@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_every_window_is_exact_also_one_and_longer_than_the_image(window: int, coupling: str):
    assert_exact(World(2, 4, 3, forced={1: 0}), build_of(coupling, window, "uniform"))


@pytest.mark.parametrize("coupling", ["independent", "maximal"])
@pytest.mark.parametrize("init", INITS)
def test_window_may_change_from_pass_to_pass(init: str, coupling: str):
    """A guess that left the window and comes back still has the law it was drawn from (controllers need this)."""

    def build(setting: Setting) -> Parts:
        parts = SJD(window=4, coupling=coupling, init=init).build(setting)
        parts.controller = Windows((4, 2, 4))
        return parts

    assert_exact(World(2, 4, 0), build)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["independent", "maximal", "mixed"])
@pytest.mark.parametrize("init", INITS)
def test_larger_models_are_exact_too(init: str, coupling: str):
    for seed, (vocab, num_tokens, window) in enumerate([(3, 4, 2), (2, 5, 3), (2, 5, 4)]):
        assert_exact(World(vocab, num_tokens, seed), build_of(coupling, window, init))


SAMPLERS = {
    "ar": Autoregressive().build,
    "sjd": SJD(window=3).build,
    "sjd maximal": SJD(window=3, coupling="maximal").build,
    "sjd gumbel-rejection": SJD(window=3, coupling="gumbel-rejection").build,
    "sjd gumbel-rejection left": SJD(window=4, coupling="gumbel-rejection", init="left").build,
    "sjd independent": SJD(window=3, coupling="independent").build,
    "sjd mixed": mixed(3, "uniform"),
}


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "sjd mixed"])
def test_samples_have_the_law_of_plain_ar_and_consecutive_images_are_independent(sampler: str):
    """100,000 sequences, 80 degrees of freedom, alarm at z > 5: the weakest mutant of test_mutants.py is far above."""
    world = World(3, 4, 1, LawConfig(guidance_scale=1.5, temperature=1.2))
    tokens = sample(world, SAMPLERS[sampler], 100_000)
    assert abs(law_z(world, tokens)) < 5
    assert abs(pairs_z(world, tokens)) < 5, "two images of one seed"


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_consecutive_seeds_are_independent(coupling: str):
    """50,000 pairs of seeds, 80 degrees of freedom."""
    world = World(3, 4, 2)
    tokens = sample(world, SJD(window=3, coupling=coupling).build, 100_000, images_per_seed=1)
    assert abs(law_z(world, tokens)) < 5 and abs(pairs_z(world, tokens)) < 5


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_a_million_samples_have_the_law_of_plain_ar(sampler: str):
    """Five batches of 100,000: twice the resolution of the quick run; also with top-k and a forced token."""
    for world in (World(3, 4, 4), World(3, 4, 3, LawConfig(guidance_scale=2.0, top_k=2), forced={2: 1}, row_length=3)):
        numbers = []
        for part in range(5):

            def noise(seeds: list[int], images: list[int], first: int = 1000 * part) -> CounterNoise:
                return CounterNoise([first + seed for seed in seeds], images)

            numbers.append(world.number(sample(world, SAMPLERS[sampler], 100_000, noise=noise)))
        assert abs(chi_square_z(torch.cat(numbers), world.law())) < 5
