"""The one loop: what it reports, when it stops, and what it does when the model breaks."""

from __future__ import annotations

import json

import pytest
import torch

from arsd.decoding import SJD, Autoregressive, CounterNoise, Grammar, LawConfig, Laws, Outcome
from arsd.decoding.rules import NEAR_TIE
from arsd.errors import ArsdError, NonFiniteLogitsError
from arsd.exactness.tables import HashTarget, TableTarget, run

VOCAB, LENGTH, BATCH = 9, 30, 3
COUPLINGS = ("gumbel", "maximal", "gumbel-rejection", "independent")
STRATEGIES = [Autoregressive(), Autoregressive(pass_tokens=8), *(SJD(window=8, coupling=coupling) for coupling in COUPLINGS)]


def target_of(batch: int = BATCH, **options) -> HashTarget:
    return HashTarget(VOCAB, LENGTH, batch, **options)


class Counting(HashTarget):
    """Counts passes and remembers the shapes fed and the prefill."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shapes: list[tuple[int, ...]] = []
        self.prefilled: list[int] = []

    def prefill(self, starts: list[int], pass_tokens: int) -> int:
        self.prefilled.append(pass_tokens)
        return 3

    def forward(self, tokens, lengths, starts):
        self.shapes.append(tuple(tokens.shape))
        return super().forward(tokens, lengths, starts)


class Broken(HashTarget):
    """Returns a bad value in one row from a position on."""

    value, row, position = float("nan"), 1, 12

    def forward(self, tokens, lengths, starts):
        logits = super().forward(tokens, lengths, starts)
        slots = lengths[:, None] + torch.arange(tokens.shape[1])
        bad = (slots >= self.position) & (torch.arange(len(tokens)) == self.row)[:, None]
        return torch.where(bad[..., None], self.value, logits)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_figures_of_a_call_agree_with_each_other_and_with_the_target(strategy):
    target = Counting(VOCAB, LENGTH, BATCH)
    stats = run(target, strategy, trace=True).stats
    assert stats.tokens == [LENGTH] * BATCH
    assert sum(length * times for length, times in stats.accepted_lengths.items()) == LENGTH * BATCH
    assert sum(stats.accepted_lengths.values()) == sum(stats.row_passes)
    assert stats.forward_passes == len(target.shapes) == max(stats.row_passes)
    assert set(target.shapes) == {(BATCH, stats.pass_tokens)}  # every pass has the same shape, the last ones too
    assert target.prefilled == [stats.pass_tokens] and stats.prefill_passes == 3
    assert stats.tokens_per_pass == LENGTH * BATCH / sum(stats.row_passes)
    assert stats.expected_changed_tokens == [0.0] * BATCH
    assert set(stats.seconds) == {"prefill", "draft", "forward", "verify", "other"} and min(stats.seconds.values()) >= 0
    assert 0 < stats.outside_forward_share < 1
    if isinstance(strategy, Autoregressive):
        assert stats.row_passes == [LENGTH] * BATCH and stats.tokens_per_pass == 1
    else:
        assert 1 < stats.tokens_per_pass <= 8 and max(stats.accepted_lengths) <= 8


def test_stats_as_plain_values_are_json():
    stats = run(target_of(), SJD(window=4)).stats
    plain = json.loads(json.dumps(stats.as_dict()))
    assert plain["tokens"] == stats.tokens and plain["accepted_lengths"]["1"] == stats.accepted_lengths[1]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_trace_replays_the_call(strategy):
    result = run(target_of(), strategy, trace=True)
    tokens, starts = torch.full((BATCH, LENGTH), -1), [0] * BATCH
    window = 8 if isinstance(strategy, SJD) else 1
    for turn in result.trace:
        assert turn.positions.shape == turn.tokens.shape == turn.outcome.shape == (BATCH, window)
        assert turn.drafts.shape == (BATCH, window - 1)
        for b, count in enumerate(turn.counts):
            assert turn.positions[b].tolist() == list(range(starts[b], starts[b] + window))
            assert count <= LENGTH - starts[b] and (count > 0) == (starts[b] < LENGTH)
            tokens[b, starts[b] : starts[b] + count] = turn.tokens[b, :count]
            outcomes = [Outcome(o) for o in turn.outcome[b, :count].tolist()]
            accepted = [j for j, o in enumerate(outcomes) if o == Outcome.ACCEPTED]
            assert turn.tokens[b, accepted].tolist() == turn.drafts[b, accepted].tolist()
            assert all(o == Outcome.ACCEPTED for o in outcomes[:-1])
            if count == window:
                assert outcomes[-1] == Outcome.BONUS
            starts[b] += count
    assert torch.equal(tokens, result.tokens) and len(result.trace) == result.stats.forward_passes


def test_nothing_is_recorded_unless_asked_for():
    result = run(target_of(), SJD(window=4))
    assert result.trace == [] and result.log_probs is None and result.entropies is None


def test_forced_tokens_are_reported_as_forced():
    grammar = Grammar(LENGTH, VOCAB, {9: 2, 19: 2, 29: 2})
    result = run(target_of(), SJD(window=8), grammar=grammar, trace=True)
    assert bool((result.tokens[:, [9, 19, 29]] == 2).all())
    for turn in result.trace:
        forced = torch.isin(turn.positions, torch.tensor([9, 19, 29]))
        inside = turn.positions < LENGTH
        assert torch.equal((turn.outcome == int(Outcome.FORCED))[inside], forced[inside])


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_last_window_is_clipped_exactly_at_the_end(coupling: str, length: int):
    """When every guess is right, n tokens take ceil(n / window) passes, and nothing is committed past the end."""
    grammar = Grammar(length, VOCAB, {n: n % VOCAB for n in range(length)})
    stats = run(HashTarget(VOCAB, length, 2), SJD(window=8, coupling=coupling), grammar=grammar).stats
    assert stats.forward_passes == -(-length // 8) and stats.tokens == [length] * 2


def test_rows_end_one_by_one_and_a_finished_row_is_left_alone():
    result = run(target_of(5), SJD(window=8), trace=True)
    assert len(set(result.stats.row_passes)) > 1
    done = [0] * 5
    for turn in result.trace:
        done = [n + c for n, c in zip(done, turn.counts, strict=True)]
    assert done == [LENGTH] * 5
    assert [sum(turn.counts[b] > 0 for turn in result.trace) for b in range(5)] == result.stats.row_passes


def test_on_commit_sees_every_pass_and_can_stop_the_call():
    full = run(target_of(), SJD(window=8))
    seen: list[tuple[int, torch.Tensor]] = []
    run(target_of(), SJD(window=8), on_commit=lambda new, tokens: seen.append((new, tokens.clone())))
    assert sum(new for new, _ in seen) == LENGTH * BATCH and torch.equal(seen[-1][1], full.tokens)

    calls: list[int] = []

    def stop_at_third(new: int, tokens: torch.Tensor) -> bool:
        calls.append(new)
        return len(calls) == 3

    result = run(target_of(), SJD(window=8), on_commit=stop_at_third)
    assert result.stats.forward_passes == 3 and sum(result.stats.tokens) == sum(calls)
    for b, length in enumerate(result.stats.tokens):
        assert 3 <= length < LENGTH
        assert torch.equal(result.tokens[b, :length], full.tokens[b, :length]) and not result.tokens[b, length:].any()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_breaks_gives_one_clear_error_and_the_tokens_made_before(strategy, value: float):
    target = Broken(VOCAB, LENGTH, BATCH)
    target.value = value
    with pytest.raises(NonFiniteLogitsError, match="picture 1 after") as error:
        run(target, strategy)
    assert isinstance(error.value, ArsdError) and "\n" not in str(error.value)
    whole, tokens, lengths = run(target_of(), strategy).tokens, error.value.tokens, error.value.lengths
    assert tokens.shape == (BATCH, LENGTH) and len(lengths) == BATCH
    assert 0 < lengths[1] <= Broken.position and f"after {lengths[1]} tokens" in str(error.value)
    for b, length in enumerate(lengths):
        assert torch.equal(tokens[b, :length], whole[b, :length]) and not tokens[b, length:].any()


def test_a_finished_row_may_return_anything():
    """NaN behind the end of a row, or in the padding of a pass, breaks nothing."""
    target = Broken(VOCAB, LENGTH, BATCH)
    target.position = LENGTH
    strategy = SJD(window=8, pass_tokens=12)
    assert torch.equal(run(target, strategy).tokens, run(target_of(), strategy).tokens)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_log_probs_and_entropies_are_those_of_the_teacher_forced_laws(strategy):
    config, grammar = LawConfig(guidance_scale=2.0, top_k=5), Grammar(LENGTH, VOCAB, {4: 1})
    result = run(target_of(streams=2), strategy, config=config, grammar=grammar, log_probs=True)
    teacher = target_of(streams=2)
    fed = torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), result.tokens[:, :-1]], dim=1)
    logits = teacher.forward(fed, torch.zeros(BATCH, dtype=torch.int64), [0] * BATCH)
    law = Laws(config, grammar)(logits, torch.arange(LENGTH).expand(BATCH, -1))
    expected = law.log_probs.gather(-1, result.tokens[..., None])[..., 0]
    torch.testing.assert_close(result.log_probs.double(), expected, rtol=0, atol=1e-5)
    entropies = torch.special.entr(law.probs).sum(-1)
    torch.testing.assert_close(result.entropies.double(), entropies, rtol=0, atol=1e-5)
    assert bool((result.log_probs[:, 4] == 0).all()) and bool((result.entropies[:, 4] == 0).all())


class Tied(HashTarget):
    """Two tokens are always equally likely, the others impossible, in every row but the first."""

    def forward(self, tokens, lengths, starts):
        logits = super().forward(tokens, lengths, starts).clone()
        logits[:, 1:, :, :] = -torch.inf
        logits[:, 1:, :, 3:5] = 0.0
        return logits


def test_near_ties_are_the_committed_tokens_decided_by_less_than_the_margin():
    """Counted by hand from the noise: the same number for plain AR and every window, since the tokens are the same."""
    noise = CounterNoise([4] * BATCH, list(range(BATCH)))
    target = target_of()
    tokens = run(target, Autoregressive(), seeds=[4] * BATCH).tokens
    fed = torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), tokens[:, :-1]], dim=1)
    target.rollback(torch.zeros(BATCH, dtype=torch.int64))
    logits = target.forward(fed, torch.zeros(BATCH, dtype=torch.int64), [0] * BATCH)[0]
    noise.prepare([0] * BATCH, LENGTH, VOCAB, torch.float64)
    best = (logits + noise.token_gumbel(torch.arange(LENGTH).expand(BATCH, -1), VOCAB, torch.float64)).topk(2).values
    expected = (best[..., 0] - best[..., 1] < NEAR_TIE).sum(1).tolist()
    for strategy in (Autoregressive(), SJD(window=3), SJD(window=16)):
        assert run(target_of(), strategy, seeds=[4] * BATCH).stats.near_ties == expected


def test_near_ties_happen_about_as_often_as_the_margin_says():
    """Two equal tokens: the difference of two Gumbels is logistic, so |difference| < m has probability tanh(m / 2)."""
    length, batch = 400, 51
    ties = run(Tied(VOCAB, length, batch), Autoregressive()).stats.near_ties[1:]
    expected = torch.tanh(torch.tensor(NEAR_TIE / 2)).item() * length * len(ties)
    assert abs(sum(ties) - expected) < 5 * expected**0.5
    forced = Grammar(LENGTH, VOCAB, dict.fromkeys(range(LENGTH), 1))
    assert run(target_of(), SJD(window=4), grammar=forced).stats.near_ties == [0] * BATCH


def test_a_larger_window_needs_no_more_passes_and_gumbel_needs_fewest():
    passes = {w: run(target_of(), SJD(window=w)).stats.forward_passes for w in (1, 2, 4, 8, 16)}
    assert list(passes.values()) == sorted(passes.values(), reverse=True)
    assert passes[1] == LENGTH and passes[16] <= LENGTH / 2
    independent = run(target_of(), SJD(window=16, coupling="independent")).stats.forward_passes
    assert independent > passes[16]


def test_one_call_leaves_nothing_behind_in_the_strategy():
    strategy = SJD(window=6, coupling="maximal", init="left")
    first = run(TableTarget(3, 5, 4), strategy).tokens
    run(target_of(), strategy)
    assert torch.equal(run(TableTarget(3, 5, 4), strategy).tokens, first)
