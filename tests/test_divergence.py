"""Teacher forcing: plain AR's law on given prefixes is the pipeline's own, and what is measured there is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pipeline import CAPTIONS, TOKENS, VOCAB, hushed, seeded, text_pipeline

import arsd
from arsd.decoding.relaxed import CoolSDRule
from arsd.errors import InputError, StrategyError
from arsd.metrics.divergence import MOST, Forced, forced_divergence, teacher_force

PROMPTS = [names[0] for names in CAPTIONS] * 2


@pytest.fixture(scope="module")
def pipe():
    return hushed(text_pipeline().to(torch.float64))


def sample(pipe, decoder="ar", prompts=PROMPTS, seed=0, **options):
    seeds = [seeded(seed + i) for i in range(len(prompts))]
    return pipe(prompts, decoder=decoder, generator=seeds, output_type="latent", **options)


@pytest.mark.parametrize("batch,pass_tokens", [(8, 32), (3, 5), (1, 1)])
@pytest.mark.parametrize("sampling", [{}, {"top_k": 7, "temperature": 0.8}, {"guidance_scale": 1.0}])
def test_the_law_is_that_of_decoding(pipe, batch, pass_tokens, sampling):
    out = sample(pipe, log_probs=True, **sampling)
    forced = teacher_force(pipe, PROMPTS, out.tokens, batch, pass_tokens, **sampling)
    torch.testing.assert_close(forced.log_probs, out.log_probs.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(forced.entropies, out.entropies.double(), atol=1e-5, rtol=0)
    assert not forced.impossible.any()


def test_excess_surprise_has_mean_zero_at_every_prefix(pipe):
    """Sum over all next tokens of p(x) (-log p(x) - H) is zero: no sampling is needed to see it."""
    out = sample(pipe, prompts=PROMPTS[:1])
    for position in (0, 3, TOKENS - 1):
        rows = out.tokens.repeat(VOCAB, 1)
        rows[:, position] = torch.arange(VOCAB)
        forced = teacher_force(pipe, PROMPTS[:1] * VOCAB, rows, batch=VOCAB)
        p, h = forced.log_probs[:, position].exp(), forced.entropies[:, position]
        assert abs(float(p.sum()) - 1) < 1e-5 and float(h.std()) < 1e-6
        assert abs(float((p * (-forced.log_probs[:, position] - h)).sum())) < 1e-5


def test_excess_surprise_tells_temperatures_apart(pipe):
    prompts = PROMPTS * 16
    z = {}
    for temperature in (0.85, 1.0, 1.15):
        tokens = sample(pipe, "sjd:window=8", prompts, 1000, temperature=temperature).tokens
        excess = teacher_force(pipe, prompts, tokens).excess_surprise
        z[temperature] = float(excess.mean() / excess.std() * len(excess) ** 0.5)
    assert z[0.85] < -4 and abs(z[1.0]) < 3 and z[1.15] > 4


def test_tokens_outside_the_support_are_counted_and_capped(pipe):
    tokens = torch.zeros(2, TOKENS, dtype=torch.int64)
    forced = teacher_force(pipe, PROMPTS[:2], tokens, top_k=1)
    assert forced.impossible.tolist() == (forced.log_probs == -torch.inf).sum(1).tolist()
    assert (forced.impossible > 0).all() and torch.isfinite(forced.excess_surprise).all()
    assert Forced(torch.tensor([[-torch.inf]]), torch.tensor([[0.0]])).excess_surprise.tolist() == [MOST]


@pytest.fixture(scope="module")
def drafting():
    """A pipeline whose drafter is another tiny transformer."""
    from tiny_pipeline import tiny_transformer

    pipe = text_pipeline()
    pipe.register_modules(drafter=tiny_transformer("text", seed=1))
    return hushed(pipe.to(torch.float64))


def laws(pipe, model, prompt, tokens):
    """[N, V] guided laws of a transformer on one picture's prefixes, from one plain pass over all of it."""
    conditions = pipe.encode_inputs([prompt], guided=True, model=model)
    target = pipe.target_maker(conditions, model)(TOKENS, 1)
    target.prefill([-target.unread], TOKENS)
    target.rollback(torch.tensor([0]))
    fed = torch.cat([tokens.new_zeros(1), tokens[:-1]])[None]
    logits = target.forward(fed, torch.tensor([0]), [0])[:, 0]
    return torch.softmax(logits[1] + 2.0 * (logits[0] - logits[1]), -1)


@torch.no_grad()
def test_divergence_of_a_chain_is_the_sum_over_its_slots(drafting):
    """With one guess a pass, every guess is at slot 0: TV = sum max(min(q, delta p) - p, 0) at the slots that have one."""
    tokens = sample(drafting).tokens
    found = forced_divergence(drafting, arsd.CoolSD(delta=3.0, draft_length=1), PROMPTS, tokens, batch=3)
    omega = float(CoolSDRule(delta=3.0).schedule(1)[0])
    for i, prompt in enumerate(PROMPTS):
        p = laws(drafting, drafting.transformer, prompt, tokens[i])
        q = laws(drafting, drafting.drafter, prompt, tokens[i])
        costs = (torch.minimum(q, omega * p) - p).clamp_min(0).sum(-1)
        totals = [float(sum(costs[n] for n in chosen)) for chosen in paths(TOKENS)]
        assert any(abs(total - float(found[i])) < 1e-5 for total in totals)
    assert float(found.min()) > 0


def paths(count):
    """Positions that hold a guess, of every way to go: a pass guesses its first position, and takes another one without a
    guess when the guess was right."""
    ways = {-1: [], 0: [()]}
    for n in range(1, count + 1):
        ways[n] = [(*way, n - 1) for way in ways[n - 1]] + [(*way, n - 2) for way in ways[n - 2]]
    return ways[count]


def test_lossless_strategies_do_not_diverge(drafting):
    tokens = sample(drafting).tokens
    for decoder in ("ar", "sjd:window=5", "eagle:coupling=rejection", "sjd:window=4,coupling=independent"):
        assert not forced_divergence(drafting, arsd.parse_strategy(decoder), PROMPTS, tokens).any()


def test_more_relaxed_is_further_away_on_the_same_prefixes(drafting):
    tokens = sample(drafting).tokens
    far = [float(forced_divergence(drafting, arsd.CoolSD(delta=d, nu=0), PROMPTS, tokens).sum()) for d in (1.0, 1.5, 4.0)]
    assert abs(far[0]) < 1e-9 and far[0] < far[1] < far[2]


def test_every_position_is_committed_as_recorded(drafting):
    """A steered run of any rule leaves the picture as it is: its tokens come out again."""
    from arsd.metrics import divergence

    tokens = sample(drafting).tokens
    kept = []
    run = divergence._run
    try:
        divergence._run = lambda *a, **k: kept.append(run(*a, **k)) or kept[-1]
        for decoder in ("cool-sd:budget=2", "lantern:k=5", "sjd:window=5,acceptance=cool-sd:delta=2"):
            forced_divergence(drafting, arsd.parse_strategy(decoder), PROMPTS, tokens, batch=3)
    finally:
        divergence._run = run
    assert len(kept) == 3 and all(torch.equal(out.tokens, tokens) for out in kept)


def test_wrong_shapes_and_trees_are_refused(drafting):
    tokens = sample(drafting).tokens
    with pytest.raises(InputError, match="8 rows of 16"):
        teacher_force(drafting, PROMPTS, tokens[:3])
    with pytest.raises(InputError, match=r"0\.\.31"):
        teacher_force(drafting, PROMPTS, tokens + VOCAB)
    with pytest.raises(StrategyError, match="tree"):
        forced_divergence(drafting, arsd.parse_strategy("cool-sd:tree=2x1"), PROMPTS, tokens)
    assert np.isfinite(teacher_force(drafting, PROMPTS, tokens).excess_surprise.numpy()).all()
