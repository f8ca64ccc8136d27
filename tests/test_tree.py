"""Trees of guesses: sibling sampling has the law it should, in every world and shape, and every known mistake shows."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
import torch
from torch import Tensor
from tree_worlds import FixedChildren, OneToken, node_law, predicted_law, tree_build

from arsd.decoding import (
    SJD,
    CounterNoise,
    LawConfig,
    Outcome,
    Parts,
    SeedExactTree,
    SiblingSampling,
    TreeShape,
)
from arsd.decoding import siblings as siblings_module
from arsd.decoding.noise import Purpose
from arsd.decoding.rules import RejectionSampling
from arsd.decoding.types import FixedWindow
from arsd.errors import StrategyError
from arsd.exactness.tables import Build, HashTarget, TableTarget, World, law_z, run, sample, total_variation
from arsd.exactness.tape import every_path, push_forward
from arsd.exactness.worlds import GUIDED, WORLDS

P, Q = (F(1, 2), F(3, 10), F(3, 20), F(1, 20)), (F(1, 5), F(1, 5), F(3, 10), F(3, 10))
VECTOR = OneToken(4, 1, p=P, q=Q)
SIBLINGS = {
    F(1): (P, F(57, 70), F(0)),
    F(3, 2): ((F(29, 70), F(2, 7), F(9, 40), F(3, 40)), F(61, 70), F(1, 10)),
    F(2): ((F(12, 35), F(9, 35), F(3, 10), F(1, 10)), F(32, 35), F(1, 5)),
}
FIXED = {F(1): (P, F(1, 5)), F(3): ((F(77, 272), F(231, 1360), F(9, 20), F(33, 340)), F(93, 170))}


def expected(figures: list[float], weight: Tensor) -> float:
    return float((weight * torch.tensor(figures, dtype=torch.float64)).sum())


def measured(world: World, build: Build) -> tuple[Tensor, float, float]:
    """Law of one token, probability that a guess was taken, and expected local total variation: every path taken."""
    law, accepted, changed = torch.zeros(world.vocab, dtype=torch.float64), 0.0, 0.0
    for result, weight in every_path(world, build, trace=True):
        law.index_add_(0, result.tokens[:, 0], weight)
        changed += expected(result.stats.expected_changed_tokens, weight)
        accepted += float(weight[result.trace[0].outcome[:, 0] == int(Outcome.ACCEPTED)].sum())
    return law, accepted, changed


def close(tensor: Tensor, exact) -> None:
    torch.testing.assert_close(tensor, torch.tensor([float(x) for x in exact], dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("omega", SIBLINGS, ids=str)
def test_two_siblings_have_the_law_of_the_hand_made_vectors(omega):
    law_by_hand, chance, tv = SIBLINGS[omega]
    by_hand, bound = node_law([*P], [*Q], (1, 2), omega)
    out = [by_hand[x, 0] + by_hand.get((x, 1), 0) + by_hand.get((x, 2), 0) for x in range(4)]
    assert out == [*law_by_hand] and sum(v for (_, child), v in by_hand.items() if child) == chance
    assert sum(abs(a - b) for a, b in zip(out, P, strict=True)) / 2 == tv <= bound
    law, accepted, changed = measured(VECTOR, tree_build(VECTOR, "2", lambda: SiblingSampling(float(omega))))
    close(law, law_by_hand)
    assert accepted == pytest.approx(float(chance), abs=1e-14) and changed == pytest.approx(float(bound), abs=1e-14)


@pytest.mark.parametrize("omega", FIXED, ids=str)
def test_two_fixed_guesses_have_the_law_of_the_hand_made_vectors(omega):
    def build(setting) -> Parts:
        return Parts(FixedChildren(2, 3), SiblingSampling(float(omega)), FixedWindow(2), 3)

    law, accepted, _ = measured(VECTOR, build)
    close(law, FIXED[omega][0])
    assert accepted == pytest.approx(float(FIXED[omega][1]), abs=1e-14)


@pytest.mark.parametrize("omega", [F(1, 2), F(1), F(3, 2), F(2), F(4), F(10)], ids=str)
def test_of_one_child_the_local_total_variation_is_exact(omega):
    """Section 6.1 of the notes: 0, 0, 1/10, 1/5, 3/10, 2/5."""
    tv = {F(3, 2): F(1, 10), F(2): F(1, 5), F(4): F(3, 10), F(10): F(2, 5)}.get(omega, F(0))
    law, _, changed = measured(VECTOR, tree_build(VECTOR, "1", lambda: SiblingSampling(float(omega))))
    p = torch.tensor([float(x) for x in P], dtype=torch.float64)
    assert changed == pytest.approx(float(tv), abs=1e-14) == pytest.approx(total_variation(law, p), abs=1e-14)


SHAPES = ("2", "3x1", "2x2", "2x0.1", "1x2x1", "3x2.1x1.0", "chain3")


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("tree", SHAPES)
def test_every_tree_leaves_the_law_of_every_world_alone(name: str, tree: str):
    """Guidance, top-k 2 under three siblings, forced and forbidden ids; all pictures end inside of a tree."""
    world = WORLDS[name](SHAPES.index(tree) % 3)
    law, paths = push_forward(world, tree_build(world, tree))
    print(f"{paths:,} paths")
    assert total_variation(law, world.law()) < 1e-12


@pytest.mark.parametrize(
    ("tree", "omega", "omegas"),
    [
        ("2", 1.5, [1.5]),
        ("3x1", [2.0, 1.25], [2.0, 1.25]),
        ("2x0.1", torch.tensor([3.0, 0.5]), [3.0, 0.5]),
        ("chain2", lambda depth: [1.0 + 1 / (d + 1) for d in range(depth)], [2.0, 1.5]),
        ("2x1.0", 0.6, [0.6, 0.6]),
    ],
)
@pytest.mark.parametrize("world", [World(3, 3, 1), World(3, 3, 2, GUIDED, forced={1: 0})], ids=["plain", "guided"])
def test_a_relaxed_tree_has_the_law_and_the_distortion_predicted_by_hand(tree, omega, omegas, world):
    predicted, bound = predicted_law(world, tree, omegas)
    law, changed = torch.zeros_like(predicted), 0.0
    for result, weight in every_path(world, tree_build(world, tree, lambda: SiblingSampling(omega))):
        law.index_add_(0, world.number(result.tokens), weight)
        changed += expected(result.stats.expected_changed_tokens, weight)
    away = total_variation(law, world.law())
    assert total_variation(law, predicted) < 1e-12 and changed == pytest.approx(bound, abs=1e-12)
    assert away <= changed + 1e-12 and (away > 1e-3) == (max(omegas) > 1)


def test_an_omega_for_fewer_depths_than_the_tree_has_is_refused():
    for omega in ([1.5], 0.0, float("inf"), lambda depth: []):
        if omega == [1.5]:
            assert SiblingSampling(omega).omegas(3) == [1.5] * 3
            continue
        with pytest.raises(StrategyError, match="omega needs"):
            SiblingSampling(omega).omegas(2)
    with pytest.raises(StrategyError, match="omega needs"):
        SiblingSampling([1.5, 1.0]).omegas(3)


@pytest.mark.parametrize("guided", [False, True])
def test_a_tree_in_the_shape_of_a_chain_is_the_chain_token_for_token(guided: bool):
    """Same draws, same tests, same residuals: sibling 0 has the noise of a chain. Compared with speculative sampling."""
    world = World(4, 5, 3, LawConfig(guidance_scale=2.0) if guided else LawConfig(), sharpness=1.0)
    builds = [
        tree_build(world, "chain3"),
        tree_build(world, "chain3", chain=True),
        tree_build(world, "chain3", RejectionSampling, chain=True),
    ]
    tokens = [sample(world, build, 2000) for build in builds]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


class OneUniformForAllSiblings(CounterNoise):
    """The tests of all siblings read one uniform."""

    def bernoulli(self, probability, purpose, positions, iteration, active, number=0) -> Tensor:
        return super().bernoulli(probability, purpose, positions, iteration, active)


class OneUniformForAllDraws(CounterNoise):
    """Siblings (and cousins) are drawn with one uniform."""

    def categorical(self, weights, purpose, positions, iteration, active, number=0) -> Tensor:
        return super().categorical(weights, purpose, positions, iteration, active)


NOISY = World(4, 3, 1, sharpness=2.0)


@pytest.mark.parametrize("noise", [OneUniformForAllSiblings, OneUniformForAllDraws], ids=lambda noise: noise.__name__)
def test_siblings_that_share_their_noise_show(noise):
    build = tree_build(NOISY, "3x1")
    wrong, right = [law_z(NOISY, sample(NOISY, build, 40_000, noise=source)) for source in (noise, CounterNoise)]
    print(f"z mutant {wrong:.1f}, real {right:.1f}")
    assert wrong > 5 and abs(right) < 5


@pytest.mark.parametrize("tree", ["3", "3x2.1x1.0"])
def test_more_siblings_than_the_draft_law_has_ids_in_samples(tree: str):
    """Top-k 2 under three siblings, with the production noise: the third does not exist, and no id of no chance appears."""
    world = World(4, 4, 1, GUIDED, forced={2: 1})
    z = law_z(world, sample(world, tree_build(world, tree), 40_000))
    print(f"z {z:.1f}")
    assert abs(z) < 5


def test_uniforms_of_different_siblings_are_different_and_the_first_is_that_of_a_chain():
    noise, at, now = CounterNoise([3, 3], [0, 1]), torch.arange(8).expand(2, -1), torch.tensor([4, 9])
    single = noise.uniform(Purpose.ACCEPT, at, now)
    many = noise.uniform(Purpose.ACCEPT, at, now, torch.arange(8))
    assert torch.equal(many[:, 0], single[:, 0]) and torch.equal(noise.uniform(Purpose.ACCEPT, at, now, 3)[:, 3], many[:, 3])
    everything = torch.cat([noise.uniform(Purpose.ACCEPT, at, now, k) for k in range(16)])
    assert len(everything.unique()) == everything.numel()


class NoResidual(siblings_module._Node):
    """R stays p when a sibling is refused."""

    def test(self, token, exists, here, number) -> Tensor:
        rest = self.rest
        taken = super().test(token, exists, here, number)
        self.rest = rest
        return taken


class NotRenormalised(siblings_module._Node):
    """Q without the tokens drawn before, but with their mass."""

    def test(self, token, exists, here, number) -> Tensor:
        q = self.q.scatter(1, token[:, None], 0.0)
        taken = super().test(token, exists, here, number)
        self.q = q
        return taken


class WithReplacement(siblings_module._Node):
    """Q keeps the tokens that were refused."""

    def test(self, token, exists, here, number) -> Tensor:
        q = self.q
        taken = super().test(token, exists, here, number)
        self.q = q
        return taken


class LongestPath(siblings_module._Walk):
    """Every sibling is tested and the last one that passes is taken: in the tree 2x0.1 it has the longer path."""

    @property
    def here(self) -> Tensor:
        return self.going


@pytest.mark.parametrize(
    "mutant", [NoResidual, NotRenormalised, WithReplacement, LongestPath], ids=lambda mutant: mutant.__name__
)
def test_a_wrong_sibling_rule_is_caught(mutant, monkeypatch: pytest.MonkeyPatch):
    world = World(3, 3, 1)
    build = tree_build(world, "2x0.1")
    right = total_variation(push_forward(world, build)[0], world.law())
    monkeypatch.setattr(siblings_module, "_Walk" if mutant is LongestPath else "_Node", mutant)
    wrong = total_variation(push_forward(world, build)[0], world.law())
    print(f"TV mutant {wrong:.2e}, real {right:.1e}")
    assert wrong > 1e-6 and right < 1e-12


def test_a_context_that_is_not_compacted_is_caught(monkeypatch: pytest.MonkeyPatch):
    world = World(3, 4, 1)
    build = tree_build(world, "2")
    assert total_variation(push_forward(world, build)[0], world.law()) < 1e-12
    monkeypatch.setattr(TableTarget, "compact", lambda self, path, count: None)
    assert total_variation(push_forward(world, build)[0], world.law()) > 1e-6


@pytest.mark.parametrize("tree", ["2", "3x2x1", "chain4", "4x3.2.2.1x3.2.2.1.0x3.0x2.0"])
@pytest.mark.parametrize("pictures", [3, 8])
def test_the_seed_exact_tree_gives_plain_ars_tokens(tree: str, pictures: int):
    seeds = list(range(pictures))
    plain = run(HashTarget(12, 40, 3), SJD(window=1), seeds=seeds, pictures=pictures)

    def build(setting) -> Parts:
        world = World(12, 40)
        made = tree_build(world, tree, SeedExactTree)
        return made(setting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tree_worlds.small_world", lambda world, batch: HashTarget(12, 40, batch, sharpness=1.9))
        out = run(HashTarget(12, 40, 3), parts=build, seeds=seeds, pictures=pictures, log_probs=True)
    assert torch.equal(out.tokens, plain.tokens) and out.stats.near_ties == plain.stats.near_ties
    assert out.stats.tokens_per_pass > 1.5 and max(out.stats.accepted_lengths) == TreeShape.parse(tree).depth + 1
