"""Drafts that know time: ``init="previous-frame"`` and the drafter that copies the frame before."""

from __future__ import annotations

import pytest
import torch
from test_lookup import Says

import arsd
from arsd.decoding import SJD, FrameCopy, LawConfig, Setting, Speculative
from arsd.decoding.drafters import same_place
from arsd.decoding.frame_copy import FrameCopyDrafter
from arsd.decoding.types import Parts
from arsd.errors import StrategyError
from arsd.exactness.tables import Build, HashTarget, World, law_z, run, sample, total_variation
from arsd.exactness.tape import push_forward
from arsd.exactness.worlds import LAWS, WORLDS, picture, picture_grammar, plain_picture

GUESSES = ("token", "law")


def rejecting(guess: str, window: int = 3) -> Build:
    return Speculative(f"frame-copy:guess={guess}", "rejection", window).build


def test_latest_position_of_the_same_place():
    positions = torch.arange(12).expand(3, -1)
    known = torch.tensor([[5], [9], [2]])
    source, found = same_place(positions, known, 4)
    for row, limit in enumerate(known.flatten().tolist()):
        for n in range(12):
            earlier = [m for m in range(min(n, limit)) if m % 4 == n % 4]
            assert bool(found[row, n]) == bool(earlier)
            assert not earlier or int(source[row, n]) == earlier[-1]
    assert not same_place(positions, known, 0)[1].any(), "a picture has no frames"


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_path_together_gives_exactly_the_law_of_plain_ar(world: str, guess: str):
    for seed, window in enumerate((2, 3, 4)):
        task = WORLDS[world](seed)
        law, paths = push_forward(task, rejecting(guess, window))
        assert total_variation(law, task.law()) < 1e-12, f"over {paths} paths"


@pytest.mark.parametrize("guess", GUESSES)
def test_samples_have_the_law_of_plain_ar(guess: str):
    """100,000 sequences, 80 degrees of freedom."""
    world = World(3, 4, 1, LawConfig(guidance_scale=1.5, temperature=1.2))
    assert abs(law_z(world, sample(world, rejecting(guess), 100_000))) < 5


class CopyCalledADraw(FrameCopyDrafter):
    """The committed token with the law that *it* was drawn from: the target's law has seen the token meanwhile."""

    def propose(self, step):  # type: ignore[no-untyped-def]
        draft = super().propose(step)
        source, known = same_place(step.positions[:, :-1], step.positions[:, :1], self.length)
        draft.tokens = torch.where(known, self.tokens[self.rows, source], draft.tokens)
        return draft


def test_a_copy_that_claims_the_law_of_the_frame_before_is_caught():
    world = World(3, 4, 1, LawConfig(guidance_scale=1.5, temperature=1.2))

    def build(setting: Setting) -> Parts:
        parts = rejecting("law")(setting)
        parts.drafter.__class__ = CopyCalledADraw
        return parts

    law, _ = push_forward(world, build)
    assert total_variation(law, world.law()) > 1e-3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("guess", GUESSES)
def test_tokens_are_those_of_plain_ar(law: str, guess: str):
    for grammar in (None, picture_grammar()):
        expected = plain_picture(law, grammar=grammar)
        for length in (1, 7, 17, 18, 19, 44):
            strategy = FrameCopy(draft_length=length, guess=guess)
            assert torch.equal(picture(strategy.build, law, grammar=grammar), expected), length
            assert torch.equal(picture(strategy.build, law, grammar=grammar, batch=2), expected), length


def test_a_clip_that_stands_still_takes_one_pass_per_window():
    frame = torch.arange(1, 10)
    said = frame.repeat(5)[None]
    for strategy in (FrameCopy(draft_length=8), SJD(window=9, init="previous-frame")):
        result = run(Says(said, 40), strategy, frame_length=9, trace=True)
        assert torch.equal(result.tokens, said)
        behind = [turn.counts[0] for turn in result.trace if int(turn.positions[0, 0]) >= 9]
        assert behind[:-1] == [9] * (len(behind) - 1), "every guess of the second frame and later ones is right"


def test_guesses_of_a_given_beginning_are_copied():
    frame = torch.arange(1, 10)
    said = frame.repeat(4)[None]
    for strategy in (
        FrameCopy(draft_length=8),
        FrameCopy(draft_length=8, guess="law"),
        SJD(window=9, init="previous-frame"),
    ):
        result = run(Says(said, 40), strategy, frame_length=9, given=frame[None])
        assert torch.equal(result.tokens, said)
        assert result.stats.forward_passes == 3, str(strategy)


def test_a_window_of_several_frames_copies_the_latest_known_one():
    frame = torch.arange(1, 6)
    said = frame.repeat(6)[None]
    for strategy in (FrameCopy(draft_length=24), SJD(window=25, init="previous-frame")):
        result = run(Says(said, 40), strategy, frame_length=5, given=frame[None])
        assert result.stats.forward_passes == 1 and torch.equal(result.tokens, said)


@pytest.mark.parametrize("coupling", ["gumbel", "maximal", "independent"])
def test_time_has_no_say_in_a_picture(coupling: str):
    """Without frames the initialiser draws its guesses, and the law is that of plain AR."""
    world = World(2, 4, 3, frame_length=0)
    if coupling == "gumbel":
        target = HashTarget(9, 30, 3)
        plain, ours = (run(target, s).tokens for s in (arsd.Autoregressive(), SJD(window=7, init="previous-frame")))
        assert torch.equal(plain, ours)
        return
    law, _ = push_forward(world, SJD(window=3, coupling=coupling, init="previous-frame").build)
    assert total_variation(law, world.law()) < 1e-12


def test_parts_of_the_strategy():
    strategy = arsd.parse_strategy("frame-copy:draft_length=31,guess=law")
    assert strategy.lossless and strategy.seed_exact and str(strategy) == "frame-copy:draft_length=31,guess=law"
    assert FrameCopy.from_config(strategy.config).config["draft_length"] == 31


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("frame-copy:guess=pixels", "guess"),
        ("frame-copy:draft_length=0", "draft_length"),
        ("frame-copy:draft_length=8,pass_tokens=8", "pass_tokens"),
        ("sjd:init=next-frame", "previous-frame"),
    ],
)
def test_values_that_make_no_sense(text: str, words: str):
    with pytest.raises(StrategyError, match=words):
        arsd.parse_strategy(text)
