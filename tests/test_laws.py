"""From logits to laws: each processor's formula, their order, and that a law depends on the absolute position only."""

from __future__ import annotations

import pytest
import torch

from arsd.decoding import Grammar, LawConfig, Laws
from arsd.errors import ArsdError, InputError

VOCAB, LENGTH = 10, 12


def logits_of(streams: int = 1, batch: int = 2, window: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (3 * torch.randn(streams, batch, window, VOCAB, generator=generator, dtype=torch.float64)).to(dtype)


def positions_of(batch: int = 2, window: int = 5) -> torch.Tensor:
    return torch.tensor([0, 4])[:batch, None] + torch.arange(window)


def law_of(logits: torch.Tensor, grammar: Grammar | None = None, **options):
    return Laws(LawConfig(**options), grammar or Grammar(LENGTH, VOCAB))(logits, positions_of(*logits.shape[1:3]))


def support(law) -> torch.Tensor:
    return law.scores > -torch.inf


def test_without_options_the_law_is_the_softmax_of_the_logits():
    logits = logits_of()
    law = law_of(logits)
    assert torch.equal(law.probs, torch.softmax(logits[0], dim=-1))
    assert torch.equal(law.log_probs, torch.log_softmax(logits[0], dim=-1))
    assert bool(law.finite().all())


def test_guidance_is_u_plus_s_times_c_minus_u():
    logits = logits_of(streams=2)
    conditional, unconditional = logits
    for scale in (0.0, 1.0, 2.5):
        torch.testing.assert_close(
            law_of(logits, guidance_scale=scale).scores,
            unconditional + scale * (conditional - unconditional),
            rtol=0,
            atol=0,
        )


def test_guidance_interval_guides_the_first_token_and_those_of_the_steps_up_to_it():
    """LlamaGen's cfg_interval k counts decoding steps, of which step 0 gives the second token: positions 0..k + 1."""
    logits = logits_of(streams=2)
    guided, plain = law_of(logits, guidance_scale=3.0).scores, logits[0]
    scores = law_of(logits, guidance_scale=3.0, guidance_interval=3).scores
    inside = (positions_of() <= 4)[..., None]
    assert torch.equal(scores, torch.where(inside, guided, plain))
    assert inside.any() and not inside.all()


def test_three_streams_guide_towards_the_pictures_of_a_prompt_and_then_towards_its_words():
    logits = logits_of(streams=3)
    words, pictures, neither = logits
    scores = law_of(logits, guidance_scale=3.0, image_guidance_scale=1.2).scores
    torch.testing.assert_close(scores, neither + 1.2 * (pictures - neither) + 3.0 * (words - pictures), rtol=0, atol=1e-12)
    without = law_of(torch.stack([words, neither, neither]), guidance_scale=3.0, image_guidance_scale=1.2).scores
    two = law_of(torch.stack([words, neither]), guidance_scale=3.0).scores
    torch.testing.assert_close(without, two, rtol=0, atol=1e-12)  # a prompt without pictures needs two streams


def test_temperature_divides_the_logits():
    logits = logits_of()
    torch.testing.assert_close(law_of(logits, temperature=0.5).probs, torch.softmax(logits[0] / 0.5, dim=-1))


def test_temperature_0_is_a_point_mass_on_the_best_allowed_token():
    logits = logits_of()
    law = law_of(logits, temperature=0.0, top_k=3, top_p=0.5)
    assert torch.equal(law.probs, torch.nn.functional.one_hot(logits[0].argmax(-1), VOCAB).double())
    best = int(logits[0, 0, 0].argmax())
    allowed = torch.ones(1, VOCAB, dtype=torch.bool)
    allowed[0, best] = False
    second = int(logits[0, 0, 0].topk(2).indices[1])
    assert float(law_of(logits, Grammar(LENGTH, VOCAB, allowed=allowed), temperature=0.0).probs[0, 0, second]) == 1


@pytest.mark.parametrize("top_k", [1, 3, VOCAB - 1, VOCAB, VOCAB + 5])
def test_top_k_keeps_the_k_most_likely_and_their_proportions(top_k: int):
    logits = logits_of()
    law = law_of(logits, top_k=top_k)
    assert bool((support(law).sum(-1) == min(top_k, VOCAB)).all())
    kept = torch.where(support(law), torch.softmax(logits[0], dim=-1), 0.0)
    torch.testing.assert_close(law.probs, kept / kept.sum(-1, keepdim=True))


def test_top_k_of_many_tokens_is_that_of_a_full_sort():
    logits = torch.randn(1, 1, 7, 1024, generator=torch.Generator().manual_seed(3))
    law = Laws(LawConfig(top_k=128), Grammar(7, 1024))(logits, torch.arange(7)[None])
    rank = logits[0].argsort(dim=-1, descending=True).argsort(dim=-1)
    assert torch.equal(support(law), rank < 128)


def test_top_k_keeps_all_tokens_that_tie_with_the_kth():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -1.0, -1.0, -1.0], dtype=torch.float64)[None, None, None]
    assert support(law_of(logits, top_k=2))[0, 0].tolist() == [True] * 4 + [False] * 6


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.7, 0.95])
def test_top_p_keeps_the_smallest_set_with_the_mass_and_at_least_one_token(top_p: float):
    logits = logits_of()
    law, probs = law_of(logits, top_p=top_p), torch.softmax(logits[0], dim=-1)
    kept = torch.where(support(law), probs, 0.0)
    assert bool((support(law).sum(-1) >= 1).all()) and bool((kept.sum(-1) >= top_p).all())
    smallest_kept = torch.where(support(law), probs, 1.0).amin(-1)
    assert bool((kept.sum(-1) - smallest_kept < top_p).all())
    assert bool((smallest_kept >= torch.where(support(law), 0.0, probs).amax(-1)).all())


def test_grammar_comes_before_top_k_so_that_k_allowed_tokens_are_left():
    allowed = torch.ones(1, VOCAB, dtype=torch.bool)
    allowed[0, :6] = False
    logits = logits_of()
    logits[..., :6] += 50
    law = law_of(logits, Grammar(LENGTH, VOCAB, allowed=allowed), top_k=3)
    assert bool((support(law).sum(-1) == 3).all()) and not support(law)[..., :6].any()


def test_top_k_comes_before_top_p_and_temperature_before_both():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1] + [1e-30] * 6, dtype=torch.float64))[None, None, None]
    assert int(support(law_of(logits, top_p=0.6)).sum()) == 2
    assert int(support(law_of(logits, top_k=2, top_p=0.55)).sum()) == 1  # of 4/7 and 3/7
    assert int(support(law_of(logits, temperature=4.0, top_p=0.6)).sum()) == 3  # flatter, so more tokens are needed


def test_forced_position_is_a_point_mass_whatever_the_model_says():
    grammar = Grammar(LENGTH, VOCAB, forced={0: 7, 6: 2})
    logits = logits_of()
    logits[..., 7] = -1e9
    for options in ({}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}):
        probs = law_of(logits, grammar, **options).probs
        assert float(probs[0, 0, 7]) == 1 and float(probs[1, 2, 2]) == 1
        assert float(probs[0, 1].max()) <= 1 and not torch.equal(probs[0, 1], probs[0, 0])


def test_allowed_ids_follow_the_group_of_the_position():
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[0, :5], allowed[1, 5:] = True, True
    grammar = Grammar(LENGTH, VOCAB, allowed=allowed, group=[n % 2 for n in range(LENGTH)])
    law = law_of(logits_of(), grammar)
    assert torch.equal(support(law), allowed[positions_of() % 2])
    assert torch.equal(grammar.uniform_law(positions_of()), allowed[positions_of() % 2].double() / 5)
    assert torch.equal(grammar.num_choices(positions_of()), torch.full((2, 5), 5))
    index = torch.arange(5).expand(2, 5)
    assert torch.equal(grammar.choice(positions_of(), index), index + 5 * (positions_of() % 2))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 3.0, "guidance_interval": 3},
        {"guidance_scale": 2.0, "top_k": 4, "temperature": 0.7},
        {"guidance_scale": 2.0, "top_p": 0.8},
        {"guidance_scale": 2.0, "temperature": 0.0},
    ],
    ids=str,
)
def test_a_window_in_one_call_equals_its_slots_one_by_one(options: dict):
    allowed = torch.ones(3, VOCAB, dtype=torch.bool)
    allowed[1, ::2], allowed[2, 4:] = False, False
    grammar = Grammar(LENGTH, VOCAB, {2: 1, 5: 3}, allowed, [n % 3 for n in range(LENGTH)])
    laws, positions = Laws(LawConfig(**options), grammar), positions_of()
    for dtype in (torch.float64, torch.bfloat16):
        logits = logits_of(streams=2, dtype=dtype)
        together = laws(logits, positions)
        for b in range(2):
            for j in range(5):
                alone = laws(logits[:, b : b + 1, j : j + 1], positions[b : b + 1, j : j + 1])
                assert torch.equal(alone.scores[0, 0], together.scores[b, j])
                assert torch.equal(alone.probs[0, 0], together.probs[b, j])


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_laws_are_made_in_float32_at_least(given: torch.dtype, made: torch.dtype):
    logits = logits_of(streams=2, dtype=given)
    law = law_of(logits, guidance_scale=2.0, top_k=5, top_p=0.9, temperature=0.8)
    assert law.scores.dtype == law.probs.dtype == law.log_probs.dtype == made
    exact = law_of(logits.double(), guidance_scale=2.0, top_k=5, top_p=0.9, temperature=0.8)
    torch.testing.assert_close(law.probs.double(), exact.probs, rtol=0, atol=1e-6)


def test_logits_are_not_written_to():
    logits = logits_of(streams=2)
    before = logits.clone()
    law_of(logits, Grammar(LENGTH, VOCAB, {0: 1}), guidance_scale=2.0, top_k=5, top_p=0.9, temperature=0.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"temperature": 0.5}], ids=str)
def test_a_slot_without_a_law_is_reported_and_only_that_slot(options: dict, value: float):
    logits = logits_of()
    logits[0, 1, 2, 4] = value
    finite = law_of(logits, **options).finite()
    assert not finite[1, 2] and int(finite.sum()) == 9


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_a_slot_whose_allowed_tokens_are_all_impossible_is_reported(options: dict):
    allowed = torch.zeros(1, VOCAB, dtype=torch.bool)
    allowed[0, 3:5] = True
    logits = logits_of()
    logits[0, 0, 1, 3:5] = -torch.inf
    finite = law_of(logits, Grammar(LENGTH, VOCAB, allowed=allowed), **options).finite()
    assert not finite[0, 1] and int(finite.sum()) == 9


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_with_one_line_that_names_them(options: dict):
    with pytest.raises(InputError, match=next(iter(options))) as error:
        LawConfig(**options)
    assert isinstance(error.value, ArsdError) and "\n" not in str(error.value)


def test_grammars_that_make_no_sense_are_refused():
    for forced in ({LENGTH: 0}, {-1: 0}, {0: VOCAB}, {0: -1}):
        with pytest.raises(InputError, match="forced"):
            Grammar(LENGTH, VOCAB, forced)
    with pytest.raises(InputError, match="no token"):
        Grammar(LENGTH, VOCAB, allowed=torch.zeros(1, VOCAB, dtype=torch.bool))
