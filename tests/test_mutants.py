"""The exactness suite can fail: every known way to get this wrong is caught by the statistic that passes the real parts.

Exact mutants are judged by :func:`push_forward` (alarm at a total variation of 1e-6; the real parts stay below 1e-12), noise
mutants by chi-square on 100,000 sequences (alarm at z > 5) or by comparing tokens with plain AR.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arsd.decoding import SJD, Autoregressive, CounterNoise, Draft, LawConfig, Outcome, Parts, Purpose, Setting, Verdict
from arsd.decoding import loop as loop_module
from arsd.decoding import rules as rules_module
from arsd.decoding.drafters import Jacobi
from arsd.decoding.rules import RejectionSampling
from arsd.decoding.types import Step
from arsd.exactness.tables import Build, HashTarget, World, law_z, pairs_z, run, sample, total_variation
from arsd.exactness.tape import push_forward

COUNT = 100_000
WORLD = World(3, 4, 1, LawConfig(guidance_scale=1.5, temperature=1.2))


def with_parts(strategy: SJD, drafter: type | None = None, rule: type | None = None) -> Build:
    """The strategy's own parts, some of them turned into a mutant's class."""

    def build(setting: Setting) -> Parts:
        parts = strategy.build(setting)
        if drafter is not None:
            parts.drafter.__class__ = drafter
        if rule is not None:
            parts.rule.__class__ = rule
        return parts

    return build


def tv(world: World, build: Build) -> float:
    law, _ = push_forward(world, build)
    return total_variation(law, world.law())


def assert_caught(mutant: Build, real: Build, world: World = WORLD) -> None:
    wrong, right = tv(world, mutant), tv(world, real)
    print(f"TV mutant {wrong:.2e}, real {right:.1e}")
    assert wrong > 1e-6 and right < 1e-12


def assert_noise_caught(build: Build, noise: type[CounterNoise], world: World = WORLD) -> None:
    wrong, right = [law_z(world, sample(world, build, COUNT, noise=source)) for source in (noise, CounterNoise)]
    print(f"z mutant {wrong:.1f}, real {right:.1f}")
    assert wrong > 5 and abs(right) < 5


class StaleLaw(Jacobi):
    """q is not updated in a slot whose token was kept (the released SCD code for Lumina and Janus)."""

    def propose(self, step: Step) -> Draft:
        draft = super().propose(step)
        self.old = draft.law
        return draft

    def observe(self, step: Step, law, verdict: Verdict, lengths: Tensor) -> None:
        super().observe(step, law, verdict, lengths)
        first, p = self.last_law
        kept = (verdict.outcome[:, :-1] == int(Outcome.ACCEPTED))[..., None]
        self.last_law = first, torch.cat([torch.where(kept, self.old, p[:, :-1]), p[:, -1:]], dim=1)


def test_law_that_stays_stale_with_a_kept_token():
    strategy = SJD(window=3, coupling="maximal")
    assert_caught(with_parts(strategy, StaleLaw), strategy.build)


@pytest.mark.parametrize("coupling", ["independent", "maximal"])
def test_refused_guess_replaced_by_a_draw_from_p(coupling: str, monkeypatch: pytest.MonkeyPatch):
    build = SJD(window=3, coupling=coupling).build
    right = tv(WORLD, build)
    monkeypatch.setattr(rules_module, "_residual", lambda p, q: p)
    wrong = tv(WORLD, build)
    print(f"TV mutant {wrong:.2e}, real {right:.1e}")
    assert wrong > 1e-6 and right < 1e-12


class HoldBack(RejectionSampling):
    """Commits less than was accepted: ``partner`` gives how many tokens the other row of the pair allows."""

    def verify(self, step: Step, law, draft: Draft) -> Verdict:
        verdict = super().verify(step, law, draft)
        verdict.own_count = verdict.count
        verdict.count = torch.minimum(verdict.count, self.partner(verdict.count))
        return verdict

    def partner(self, count: Tensor) -> Tensor:
        """A partner that never gets further than one token: lockstep at its worst, for a single row."""
        return count.clamp_max(1)


class Lockstep(HoldBack):
    """Rows 2i and 2i + 1 commit the smaller of their counts (a row that is finished holds nobody back)."""

    def partner(self, count: Tensor) -> Tensor:
        return count.view(-1, 2).min(dim=1, keepdim=True).values.expand(-1, 2).reshape(-1)


class HeldKeepsOldLaw(StaleLaw):
    """Guesses that were accepted but not committed stay, and keep the q of before the test (released SJD, batch 2)."""

    def observe(self, step: Step, law, verdict: Verdict, lengths: Tensor) -> None:
        Jacobi.observe(self, step, law, verdict, lengths)
        slots = torch.arange(step.positions.shape[1])
        held = (slots < (verdict.own_count - self.after_accepted)[:, None]) & (slots >= verdict.count[:, None])
        here = self.guesses[self.rows, step.positions]
        self.guesses[self.rows, step.positions] = torch.where(held, verdict.tokens, here)
        first, p = self.last_law
        self.last_law = first, torch.cat([torch.where(held[:, :-1, None], self.law_of(p), p[:, :-1]), p[:, -1:]], dim=1)

    after_accepted = 1  # the resampled token is forgotten

    def law_of(self, p: Tensor) -> Tensor:
        return self.old


class HeldGetsNewLaw(HeldKeepsOldLaw):
    """The repair: the outcome of a test, accepted or resampled, has law p."""

    after_accepted = 0

    def law_of(self, p: Tensor) -> Tensor:
        return p[:, :-1]


def test_lockstep_that_holds_accepted_tokens_under_their_old_law():
    strategy = SJD(window=3, coupling="independent")
    assert_caught(
        with_parts(strategy, HeldKeepsOldLaw, HoldBack), with_parts(strategy, HeldGetsNewLaw, HoldBack), World(2, 4, 1)
    )


def test_lockstep_batches_of_two():
    strategy, world = SJD(window=4, coupling="independent"), World(5, 3, 1, sharpness=2.5)
    mutant, real = [
        law_z(world, sample(world, build, COUNT))
        for build in (with_parts(strategy, HeldKeepsOldLaw, Lockstep), with_parts(strategy, HeldGetsNewLaw, Lockstep))
    ]
    print(f"z mutant {mutant:.1f}, real {real:.1f}")
    assert mutant > 5 and abs(real) < 5


class CopyCalledUniform(Jacobi):
    """A copied neighbour is a point mass; here it is recorded as if it had been drawn uniformly."""

    def _recorded_law(self, positions: Tensor, tokens: Tensor) -> Tensor:
        init, self.init = self.init, "uniform"
        law = super()._recorded_law(positions, tokens)
        self.init = init
        return law


class UniformOverEverything(Jacobi):
    """Initial tokens come from the allowed ids; here they are recorded as uniform over the whole vocabulary."""

    def _recorded_law(self, positions: Tensor, tokens: Tensor) -> Tensor:
        grammar, law = self.grammar, self.grammar.uniform_law
        grammar.uniform_law = lambda at: torch.full((*at.shape, grammar.vocab), 1 / grammar.vocab, dtype=torch.float64)
        recorded = super()._recorded_law(positions, tokens)
        grammar.uniform_law = law
        return recorded


@pytest.mark.parametrize("init", ["left", "above"])
def test_copied_initial_token_recorded_as_uniform(init: str):
    strategy = SJD(window=3, coupling="maximal", init=init)
    assert_caught(with_parts(strategy, CopyCalledUniform), strategy.build)


def test_initial_law_that_forgets_the_grammar():
    strategy = SJD(window=3, coupling="independent")
    world = World(3, 3, 0, LawConfig(guidance_scale=2.0), forbidden={1: 0, 2: 2})
    assert_caught(with_parts(strategy, UniformOverEverything), strategy.build, world)


def test_point_mass_for_a_uniform_draw_is_no_mutant_but_costs_passes():
    """Given the token, a point mass is a true account of it: exact (this is init="random"), only accepted less often."""
    accepted = {}
    for init in ("uniform", "random"):
        build = SJD(window=3, coupling="independent", init=init).build
        assert tv(World(2, 4, 1), build) < 1e-12
        accepted[init] = WORLD.decode(5000, build, CounterNoise(range(5000), [0] * 5000)).stats.tokens_per_pass
    assert accepted["uniform"] > accepted["random"] * 1.02


class LawOfTheSlotBeside(Jacobi):
    """q is looked up by slot of the window, not by absolute position."""

    def _recorded_law(self, positions: Tensor, tokens: Tensor) -> Tensor:
        if self.last_law is not None:
            first, p = self.last_law
            self.last_law = first, p.roll(1, dims=1)
        return super()._recorded_law(positions, tokens)


def test_law_taken_from_the_slot_beside():
    strategy = SJD(window=3, coupling="independent")
    assert_caught(with_parts(strategy, LawOfTheSlotBeside), strategy.build, World(2, 4, 1))


class ReusedUniform(CounterNoise):
    """A slot that is tested again sees the uniform of its first test."""

    def bernoulli(self, probability, purpose, positions, iteration, active) -> Tensor:
        return super().bernoulli(probability, purpose, positions, torch.zeros_like(iteration), active)


class ResidualWithTheDraftsNoise(CounterNoise):
    """The residual is drawn with the very noise that drew the refused guess (one pass earlier)."""

    def categorical(self, weights, purpose, positions, iteration, active) -> Tensor:
        if purpose == Purpose.RESIDUAL:
            return super().categorical(weights, Purpose.REDRAFT, positions, iteration - 1, active)
        return super().categorical(weights, purpose, positions, iteration, active)


class ResidualWithTheTokenGumbel(CounterNoise):
    """The residual is drawn with the position's Gumbel noise, which also drew the guess."""

    def categorical(self, weights, purpose, positions, iteration, active) -> Tensor:
        self.prepare(positions[:, 0].tolist(), positions.shape[1], weights.shape[-1], weights.dtype)
        return (weights.log() + self.token_gumbel(positions, weights.shape[-1], weights.dtype)).argmax(-1)


class ResidualWithTheTestsUniform(CounterNoise):
    """One uniform decides the test and then the residual."""

    def categorical(self, weights, purpose, positions, iteration, active) -> Tensor:
        return super().categorical(weights, Purpose.ACCEPT, positions, iteration, active)


class OneNoiseForAllImages(CounterNoise):
    """Images of one seed share their noise."""

    def __init__(self, seeds, images) -> None:
        super().__init__(seeds, [0] * len(images))


class OneNoiseForTwoImages(CounterNoise):
    """Images 2i and 2i + 1 of one seed share their noise."""

    def __init__(self, seeds, images) -> None:
        super().__init__(seeds, [image // 2 for image in images])


class GumbelBySlot(CounterNoise):
    """The noise belongs to the slot of the window, not to the absolute position."""

    def token_gumbel(self, positions, vocab, dtype) -> Tensor:
        return super().token_gumbel(positions - positions[:, :1], vocab, dtype)

    def prepare(self, starts, window, vocab, dtype) -> None:
        super().prepare([0] * len(starts), window, vocab, dtype)


LARGER = World(4, 5, 1, sharpness=2.5)  # a residual over one or two ids hardly shows whose noise drew it
NOISE_MUTANTS = {
    ReusedUniform: (WORLD, SJD(window=3, coupling="maximal")),
    ResidualWithTheDraftsNoise: (WORLD, SJD(window=3, coupling="independent")),
    ResidualWithTheTokenGumbel: (LARGER, SJD(window=4, coupling="gumbel-rejection", init="left")),
    ResidualWithTheTestsUniform: (WORLD, SJD(window=3, coupling="independent")),
}


@pytest.mark.parametrize("noise", NOISE_MUTANTS, ids=lambda noise: noise.__name__)
def test_noise_used_twice(noise: type[CounterNoise]):
    world, strategy = NOISE_MUTANTS[noise]
    assert_noise_caught(strategy.build, noise, world)


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_two_images_that_share_their_noise(coupling: str):
    """Every image alone has the right law: only pairs show it."""
    build = SJD(window=3, coupling=coupling).build
    shared, own = [sample(WORLD, build, COUNT, noise=source) for source in (OneNoiseForTwoImages, CounterNoise)]
    print(f"z mutant {pairs_z(WORLD, shared):.1f}, real {pairs_z(WORLD, own):.1f}")
    assert pairs_z(WORLD, shared) > 5 and abs(pairs_z(WORLD, own)) < 5
    assert abs(law_z(WORLD, shared[::2])) < 5


def seed_exact_tokens(noise: type[CounterNoise], strategy) -> Tensor:
    return run(HashTarget(12, 40, 3), strategy, noise=noise([1, 1, 2], [0, 1, 0])).tokens


@pytest.mark.parametrize("noise", [GumbelBySlot, OneNoiseForAllImages], ids=lambda noise: noise.__name__)
def test_seed_exact_noise_under_a_wrong_key(noise: type[CounterNoise]):
    expected = seed_exact_tokens(CounterNoise, Autoregressive())
    assert torch.equal(seed_exact_tokens(CounterNoise, SJD(window=8)), expected)
    assert not torch.equal(seed_exact_tokens(noise, SJD(window=8)), expected)


def test_gumbel_noise_by_slot_has_another_law_too():
    assert_noise_caught(SJD(window=3).build, GumbelBySlot)


def clipped(change: int) -> Callable[..., Step]:
    """_Rows.step with a clip that is off by ``change`` slots at the end of the image."""
    real = loop_module._Rows.step

    def step(self, window: int, noise) -> Step:
        made = real(self, window, noise)
        left = self.total - self.lengths
        width = torch.where(left > 0, (left + change).clamp(1, window), 0)
        offsets = torch.arange(window)
        return Step(made.positions, width, made.iteration, offsets < width[:, None], made.starts, made.reading, noise)

    return step


@pytest.mark.parametrize("change", [1, -1])
def test_clip_that_is_off_by_one_at_the_end(change: int, monkeypatch: pytest.MonkeyPatch):
    """With perfect guesses (one forced picture) 6 tokens take 2 passes of window 4, and no row gets a 7th token."""
    world = World(3, 6, 0, forced=dict.fromkeys(range(6), 1))

    def figures() -> tuple[list[int], int]:
        stats = world.decode(2, SJD(window=4).build, CounterNoise([0, 1], [0, 0])).stats
        return stats.tokens, stats.forward_passes

    assert figures() == ([6, 6], 2)
    monkeypatch.setattr(loop_module._Rows, "step", clipped(0))
    assert figures() == ([6, 6], 2)
    monkeypatch.setattr(loop_module._Rows, "step", clipped(change))
    assert figures() != ([6, 6], 2)
