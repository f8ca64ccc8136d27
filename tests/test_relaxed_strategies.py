"""Relaxed strategies behind the pipeline: labelled, metered, kept to their budget, and refused where they make no sense."""

from __future__ import annotations

import pytest
import torch
from drafting import drafting, inputs
from tiny_pipeline import TOKENS, class_pipeline, codes, one_clear_line, seeded, text_pipeline

import arsd
from arsd.errors import StrategyError


@pytest.fixture(scope="module", params=["text", "class"])
def pipe(request) -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline() if request.param == "text" else class_pipeline())


RELAXED = [
    "cool-sd:delta=2",
    "cool-sd:budget=3",
    "cool-sd:delta=2,tree=2x1",
    "cool-sd-published:delta=2",
    "cool-sd-published:delta=2,tree=2x1",
    "lantern:k=5",
    "lantern-plus-plus:k=5",
    "grouped",
]


@pytest.mark.parametrize("decoder", RELAXED)
def test_relaxed_strategies_say_that_they_are_and_what_they_cost(pipe, decoder):
    strategy = arsd.parse_strategy(decoder)
    assert not strategy.lossless and not strategy.seed_exact
    out = pipe(**inputs(pipe), decoder=strategy, generator=seeded(0), output_type="latent")
    assert max(out.stats.expected_changed_tokens) > 0 and out.stats.changed_per_token > 0
    assert out.stats.changed_per_token == pytest.approx(sum(out.stats.expected_changed_tokens) / (4 * TOKENS))
    again = codes(pipe, **inputs(pipe), decoder=strategy, batch_size=2)
    assert torch.equal(again, out.tokens)  # rows and queues do not show
    assert type(strategy).from_config(dict(strategy.config)).config == strategy.config


def test_a_budget_is_never_exceeded(pipe):
    for budget in (0.25, 1.0, 4.0):
        out = pipe(**inputs(pipe), decoder=arsd.CoolSD(budget=budget), generator=seeded(0), batch_size=3)
        assert max(out.stats.expected_changed_tokens) <= budget
        assert max(out.stats.expected_changed_tokens) > 0.9 * budget  # this drafter is bad enough to use it up


def test_without_a_budget_to_spend_cool_sd_is_speculative_sampling(pipe):
    plain = codes(pipe, **inputs(pipe), decoder="eagle:coupling=rejection")
    for decoder in ("cool-sd:budget=0", "cool-sd:delta=1,nu=0"):
        assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder), plain)


def test_the_published_form_is_the_one_that_is_not_clamped(pipe):
    published = codes(pipe, **inputs(pipe), decoder=arsd.PublishedCoolSD(delta=0.1))
    assert torch.equal(published, codes(pipe, **inputs(pipe), decoder="cool-sd:delta=0.1,floor=0"))
    assert not torch.equal(published, codes(pipe, **inputs(pipe), decoder=arsd.CoolSD(delta=0.1)))


def test_a_relaxed_strategy_names_its_rule_for_jacobi_guesses(pipe):
    named = arsd.SJD(window=6, acceptance=arsd.CoolSD(delta=2, floor=0.5))
    assert not named.lossless and arsd.SJD.from_config(dict(named.config)).config == named.config
    text = "sjd:window=6,acceptance=cool-sd:delta=2:floor=0.5"
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=named), codes(pipe, **inputs(pipe), decoder=text))
    with pytest.raises(StrategyError, match="must name a rule"):
        arsd.SJD(acceptance=arsd.Eagle())
    with pytest.raises(StrategyError, match="leave out tree"):
        arsd.SJD(acceptance=arsd.CoolSD(tree="3x2x1"))


def test_the_word_none_is_a_value(pipe):
    given = arsd.CoolSD(delta=2.5, normalize="none")
    tokens = codes(pipe, **inputs(pipe), decoder=given)
    for text in ("cool-sd:delta=2.5,normalize=none", str(given)):
        assert torch.equal(codes(pipe, **inputs(pipe), decoder=text), tokens)
    assert not arsd.SJD(acceptance=given).lossless
    assert not torch.equal(codes(pipe, **inputs(pipe), decoder="cool-sd:delta=2.5"), tokens)


def test_a_schedule_that_falls_to_nothing_is_one_for_trees_too(pipe):
    steep = "cool-sd-published:nu=1000,tree=2x1x1"
    assert codes(pipe, **inputs(pipe), decoder=steep).shape == (4, TOKENS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cool-sd:delta=0", "delta"),
        ("cool-sd:budget=-1", "budget"),
        ("cool-sd:budget=1,tree=2x1", "tree"),
        ("cool-sd:normalize=max", "normalize"),
        ("lantern:k=0", "k"),
        ("lantern-plus-plus:lam=0.5", "lam"),
        ("grouped:group=0", "group"),
        ("eagle:tree=3y", "tree"),
        ("eagle:tree=3x2,pass_tokens=4", "pass_tokens"),
    ],
)
def test_relaxed_options_that_make_no_sense_are_refused(text, says):
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy(text)
    one_clear_line(error.value, says)
