"""Forced tokens that differ between the pictures of a call: every strategy keeps to those of the picture a row holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipeline import one_clear_line

from arsd.decoding import Grammar, LawConfig, Outcome, build_parts, parse_strategy
from arsd.decoding.row_grammar import RowGrammar
from arsd.errors import InputError
from arsd.exactness.tables import HashTarget, run

VOCAB, CODES, LENGTH, ROW, FRAME, PICTURES = 12, 9, 30, 5, 10, 6
SEEDS, IMAGES = [5, 5, -1, 2**63 + 11, 0, 9], [0, 1, 0, 7, 3, 3]
GUIDED = LawConfig(guidance_scale=2.0, top_p=0.9)

ARMS = "ucb-spec:arms=ar+sjd:window=4+frame-copy:draft_length=5,reproducible=true"
SEED_EXACT = [
    *("ar", "ar:pass_tokens=5", "sjd:window=2", "sjd:window=7,init=left", "sjd:window=20,init=above", "sjd:window=64"),
    *("sjd:window=8,init=previous-frame", "frame-copy:draft_length=5", "frame-copy:draft_length=5,guess=law"),
    *("speculative:drafter=draft-model,window=5", "eagle", "eagle:tree=3x2x1", "hybrid:window=6", "prompt-lookup"),
    *("token-recycling", ARMS),
]
OTHERS = [
    *("sjd:window=6,coupling=maximal", "sjd:window=6,coupling=gumbel-rejection", "sjd:window=6,coupling=independent"),
    *("sjd:window=5,coupling=maximal,init=previous-frame", "speculative:drafter=draft-model,rule=rejection,window=5"),
    *("eagle:coupling=rejection,tree=2x2", "cool-sd:delta=2", "cool-sd:delta=2,tree=2x1"),
    *("lantern:k=3,delta=0.3", "grouped"),
]


def tables() -> torch.Tensor:
    """[M, N]: three ids between frames, and one more that stands elsewhere in every picture; the last has none of them."""
    found = torch.full((PICTURES, LENGTH), -1)
    generator = torch.Generator().manual_seed(3)
    for first in range(FRAME - 3, LENGTH, FRAME):
        found[:-1, first : first + 3] = torch.randint(CODES, VOCAB, (PICTURES - 1, 3), generator=generator)
    for picture in range(PICTURES):
        found[picture, 2 + 3 * picture] = picture
    return found


def codes_only() -> torch.Tensor:
    return (torch.arange(VOCAB) < CODES)[None]


def row_grammar() -> RowGrammar:
    return RowGrammar(tables(), VOCAB, codes_only())


def decoded(strategy: Any, grammar: Grammar, pictures: range | list[int], batch: int, **request: Any) -> Any:
    """The given pictures with the grammar, ``batch`` at a time."""
    strategies = [parse_strategy(one) for one in ([strategy] if isinstance(strategy, str) else strategy)]
    keys: dict[str, Any] = {"seeds": [SEEDS[i] for i in pictures], "images": [IMAGES[i] for i in pictures]}
    target = HashTarget(VOCAB, LENGTH, batch, streams=2)
    options = {"config": GUIDED, "row_length": ROW, "frame_length": FRAME, "pictures": len(pictures)}
    return run(target, parts=lambda s: build_parts(strategies, s), grammar=grammar, **options, **keys, **request)


def alone(strategy: str, picture: int) -> Any:
    """One picture by itself, its forced tokens in a grammar as it has always been."""
    forced = {n: int(token) for n, token in enumerate(tables()[picture]) if token >= 0}
    return decoded(strategy, Grammar(LENGTH, VOCAB, forced, codes_only()), [picture], 1)


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    """[M, N] plain AR, picture by picture."""
    return torch.cat([alone("ar", picture).tokens for picture in range(PICTURES)])


def test_forced_tokens_stand_where_they_belong_and_nothing_but_codes_elsewhere(plain):
    forced = tables()
    assert torch.equal(plain[forced >= 0], forced[forced >= 0]) and bool((plain[forced < 0] < CODES).all())
    assert len({tuple(row.tolist()) for row in plain}) == PICTURES


@pytest.mark.parametrize("strategy", SEED_EXACT)
def test_a_queue_gives_plain_ars_tokens_whatever_the_strategy(plain, strategy):
    """Rows change pictures at different times, in batches of 2 and 4."""
    for batch in (2, 4):
        out = decoded(strategy, row_grammar(), range(PICTURES), batch)
        assert torch.equal(out.tokens, plain), batch


@pytest.mark.parametrize("strategy", OTHERS)
def test_a_picture_in_a_queue_is_what_it_is_alone_for_rules_that_draw_otherwise(strategy):
    """Tokens and passes: the guesses of a row that begins another picture are that picture's own, forced ones included."""
    queued = decoded(strategy, row_grammar(), range(PICTURES), 2)
    for picture in range(PICTURES):
        single = alone(strategy, picture)
        assert torch.equal(queued.tokens[picture], single.tokens[0]), picture
        assert queued.stats.row_passes[picture] == single.stats.row_passes[0], picture


@pytest.mark.parametrize("strategy", ["sjd:window=9", "sjd:window=9,init=left", "frame-copy:draft_length=5"])
def test_the_guesses_of_a_refilled_row_know_its_forced_tokens_at_once(strategy):
    queued = decoded(strategy, row_grammar(), range(PICTURES), 2)
    assert queued.stats.row_passes == [alone(strategy, picture).stats.row_passes[0] for picture in range(PICTURES)]


@pytest.mark.parametrize("batch", [3, PICTURES])
def test_strategies_mix_in_one_batch(plain, batch):
    chosen = [SEED_EXACT[i] for i in (0, 4, 3, 7, 9, 2)]
    assert torch.equal(decoded(chosen, row_grammar(), range(PICTURES), batch).tokens, plain)


def test_near_ties_that_are_decided_again_keep_the_forced_tokens(plain):
    out = decoded("sjd:window=8", row_grammar(), range(PICTURES), 2, recheck=0.5)
    assert torch.equal(out.tokens, plain) and sum(out.stats.tokens) == PICTURES * LENGTH


def test_forced_tokens_are_told_apart_and_cost_no_information(plain):
    out = decoded("sjd:window=7", row_grammar(), range(PICTURES), 2, trace=True, log_probs=True)
    forced = tables()
    assert bool((out.log_probs[forced >= 0] == 0).all()) and bool((out.entropies[forced >= 0] == 0).all())
    assert bool((out.log_probs[forced < 0] < 0).any())
    for turn in out.trace:
        for b, (count, picture) in enumerate(zip(turn.counts, turn.pictures, strict=True)):
            expected = forced[picture, turn.positions[b, :count]] >= 0
            assert torch.equal(turn.outcome[b, :count] == Outcome.FORCED, expected)


@pytest.mark.parametrize("strategy", ["ar", "sjd:window=7", "eagle:tree=2x1"])
def test_a_grammar_that_is_not_told_who_holds_a_row_is_found_out(plain, strategy, monkeypatch):
    """A mutant: the tests above can fail."""
    monkeypatch.setattr(RowGrammar, "join", lambda self, rows, pictures: None)
    assert torch.equal(decoded(strategy, row_grammar(), range(PICTURES), PICTURES).tokens, plain)
    assert not torch.equal(decoded(strategy, row_grammar(), range(PICTURES), 2).tokens, plain)


def test_one_without_forced_tokens_is_no_other_grammar():
    grammar = RowGrammar(torch.full((2, LENGTH), -1), VOCAB, codes_only())
    assert not grammar.any_forced
    out = decoded("sjd:window=6", grammar, range(2), 2)
    assert torch.equal(out.tokens, decoded("ar", Grammar(LENGTH, VOCAB, None, codes_only()), range(2), 2).tokens)


@pytest.mark.parametrize(
    ("forced", "says"),
    [
        (torch.zeros(3), "whole numbers [pictures, positions]"),
        (torch.zeros(0, 4).long(), "whole numbers [pictures, positions]"),
        (torch.zeros(1, 4), "whole numbers [pictures, positions]"),
        (torch.full((1, 4), VOCAB), "must lie in 0..11"),
        (torch.full((1, 4), -2), "must lie in 0..11"),
    ],
)
def test_tables_that_are_none_are_one_clear_line(forced, says):
    with pytest.raises(InputError) as error:
        RowGrammar(forced, VOCAB)
    one_clear_line(error.value, says)
