"""Token Recycling guesses what the model last thought likely behind each token, and never shows in the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_generate_fn import both, prompts, tiny
from test_lookup import assert_plain
from tiny_pipeline import one_clear_line
from torch import Tensor

import arsd
from arsd.decoding import (
    Autoregressive,
    CounterNoise,
    Grammar,
    LawConfig,
    Parts,
    SeedExactTree,
    Setting,
    Step,
    TokenRecycling,
)
from arsd.decoding.recycling import TREES, RecyclingDrafter, tree_of
from arsd.errors import StrategyError
from arsd.exactness.tables import HashTarget, run

pytestmark = pytest.mark.usefixtures("quiet_transformers")


class Follows(HashTarget):
    """A target of which every token has one law of the next, whatever stands before: the matrix can learn it all."""

    def __init__(self, table: Tensor, num_tokens: int, batch: int = 1) -> None:
        super().__init__(table.shape[1], num_tokens, batch)
        self.table = table.double()

    def forward(self, tokens, lengths, starts, tree=None) -> Tensor:
        self.remember(tokens, lengths, starts)
        return self.table[tokens][None]


def round_trip(period: int, vocab: int) -> Tensor:
    """Logits [V, V]: the tokens 0, 5, 10, ... follow one another in a circle; the second best is the token after that."""
    circle = 5 * torch.arange(period) % vocab
    table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)).double()
    for here, (a, b) in enumerate(zip(circle.roll(-1), circle.roll(-2), strict=True)):
        table[circle[here], a], table[circle[here], b] = 20.0, 15.0
    return table


def drafter(vocab: int = 12, batch: int = 1, prompt: Tensor | None = None, **options: Any) -> RecyclingDrafter:
    call = batch, 20, 0, Grammar(20, vocab), CounterNoise([0] * batch, range(batch)), torch.device("cpu")
    return RecyclingDrafter(Setting(*call, prompt=prompt), **options)


def step_of(batch: int, depth: int) -> Step:
    positions = torch.arange(depth + 1).expand(batch, -1)
    width = torch.full((batch,), depth + 1)
    return Step(positions, width, width * 0, positions >= 0, [0] * batch, [], CounterNoise([0] * batch, range(batch)))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])  # mixtral: float32
@pytest.mark.parametrize("options", ["tree=3x2x1", "tree=small", "tree=2x1,k=2,pass_tokens=9"])
def test_a_text_is_plain_generates_whatever_is_recycled(kind: str, options: str):
    assert_plain(tiny(kind), f"token-recycling:{options}")


def test_child_i_of_a_node_is_entry_i_of_the_row_of_its_token():
    for shape in ("4x3.2.1.1x2.0.1", "small", "published", "chain3"):
        made = drafter(vocab=40, batch=2, shape=shape)
        made.matrix[:] = torch.randint(40, made.matrix.shape, generator=torch.Generator().manual_seed(1)).int()
        made.last[:] = torch.tensor([[7], [11]])
        draft, tree = made.propose(step_of(2, made.tree.depth)), made.tree
        for row, first in enumerate((7, 11)):
            held, children = [first], [0] * tree.columns
            for parent in tree.parents:
                place = row * made.rows + held[parent]
                held.append(int(made.matrix[place, children[parent]]))
                children[parent] += 1
            assert draft.tokens[row].tolist() == held[1:] and draft.tree == tree


def test_the_published_tree_has_the_authors_numbers_of_nodes():
    tree = tree_of("published", 8)
    assert [len(tree.level(depth)) for depth in range(7)] == [1, 8, 21, 25, 15, 8, 3]
    small = tree_of("small", 8)
    assert small.columns == 20 and small.depth == 4 and [*TREES] == ["small", "published"]


@pytest.mark.parametrize("shared", [True, False])
def test_the_last_law_of_a_token_overwrites_its_row_and_what_it_excludes_keeps_its_place(shared: bool):
    generator = torch.Generator().manual_seed(0)
    made = drafter(vocab=9, batch=3, k=3, shape="3", shared=shared)
    rows = {b: made.matrix[:9].tolist() for b in range(1 if shared else 3)}
    for _ in range(20):
        scores = torch.randn(3, 5, 9, generator=generator)
        scores[torch.rand(3, 5, 9, generator=generator) < 0.7] = -torch.inf
        read = torch.randint(9, (3, 5), generator=generator)
        counts = torch.rand(3, 5, generator=generator) < 0.7
        made.learn(scores, read, counts)
        before = {b: [list(row) for row in table] for b, table in rows.items()}
        for n in range(5):
            for b in range(3):
                if counts[b, n]:
                    best = sorted(range(9), key=lambda x: -float(scores[b, n, x]))[:3]  # noqa: B023
                    own, token = 0 if shared else b, int(read[b, n])
                    old = before[own][token]
                    rows[own][token] = [x if scores[b, n, x] > -torch.inf else y for x, y in zip(best, old, strict=True)]
        for b, table in rows.items():
            assert made.matrix[b * made.rows :][:9].tolist() == table


def test_a_greedy_law_teaches_all_its_likely_tokens():
    """And not only the one that it takes."""
    table = round_trip(8, 40)
    made: list[RecyclingDrafter] = []

    def build(setting) -> Parts:
        parts = TokenRecycling(tree="2x1").build(setting)
        made.append(parts.drafter)
        return parts

    run(Follows(table, 60), parts=build, config=LawConfig(temperature=0.0))
    circle = 5 * torch.arange(8)
    assert torch.equal(made[0].matrix[circle].long(), table[circle].topk(8).indices)


def halves(strategy: TokenRecycling | str, **options: Any) -> tuple[float, float]:
    """Tokens per pass of the first and the second half of a text of eight rounds of the same 20 tokens."""
    config = LawConfig(temperature=0.0)
    counts = [
        one.counts[0] for one in run(Follows(round_trip(20, 100), 160), strategy, config=config, trace=True, **options).trace
    ]
    half = next(n for n in range(len(counts)) if sum(counts[:n]) >= 80)
    return sum(counts[:half]) / half, sum(counts[half:]) / (len(counts) - half)


def test_the_second_half_of_a_text_that_repeats_itself_takes_fewer_passes():
    first, second = halves(TokenRecycling(tree="3x2x1"))
    assert first < 3.3 and second > 3.8  # 4 at most, less what the end cuts off
    first, second = halves(TokenRecycling(tree="chain1"))
    assert 1 < first < second and second > 1.9


def test_laws_behind_refused_guesses_are_recycled_too():
    """A rule that does not teach shows the accepted path only: a token must have been committed once to be known."""
    table = torch.randn(60, 60, generator=torch.Generator().manual_seed(3)) * 2

    def passes(rule: Any) -> int:
        def build(setting) -> Parts:
            parts = TokenRecycling(tree="3x2x1").build(setting)
            return parts if rule is None else replace(parts, rule=rule)

        return run(Follows(table, 300), parts=build, seeds=[1]).stats.forward_passes

    plain = run(Follows(table, 300), Autoregressive(), seeds=[1]).stats.forward_passes
    assert passes(None) < 0.95 * passes(SeedExactTree()) < 0.7 * plain


def test_a_call_is_the_same_every_time_in_a_batch_that_shares_its_matrix():
    table = torch.randn(30, 30, generator=torch.Generator().manual_seed(3)) * 3
    runs = [run(Follows(table, 60, 3), TokenRecycling(), seeds=[1, 2, 3], trace=True) for _ in range(2)]
    for a, b in zip(*(one.trace for one in runs), strict=True):
        assert torch.equal(a.drafts, b.drafts) and a.counts == b.counts


def test_rows_of_a_batch_learn_from_each_other_only_when_they_share_a_matrix():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [-1, 7, 1]])
    for shared, guess in ((True, 2), (False, 2)):
        made = drafter(prompt=ids, batch=3, shape="1", shared=shared)
        made.last[:] = 1
        guesses = made.propose(step_of(3, 1)).tokens[:, 0].tolist()
        assert guesses == ([2, 2, 2] if shared else [2, 1, 1]) and guess == guesses[0]
    made.join([0], [1])  # the row forgets its picture
    made.last[:] = torch.tensor([[1], [4], [7]])
    assert made.propose(step_of(3, 1)).tokens[:, 0].tolist() == [1, 5, 1]
    made.last[0] = 4
    assert made.propose(step_of(3, 1)).tokens[0].tolist() == [5]


def test_the_first_guesses_are_what_followed_in_the_prompt_latest_first():
    ids = torch.tensor([[3, 5, 3, 6, 3, 7, 8, 5]])
    made = drafter(prompt=ids, shape="2x2.1")
    assert made.propose(step_of(1, 2)).tokens.tolist() == [[3, 6, 7, 6, 3]]  # of 5: 3, 6 (fresh); of 3: 7, 6; of 6: 3
    with_given = RecyclingDrafter(
        Setting(
            1, 20, 0, Grammar(20, 12), CounterNoise([0], [0]), torch.device("cpu"), prompt=ids, given=torch.tensor([[8, 3]])
        ),
        "2x1",
    )
    assert with_given.propose(step_of(1, 2)).tokens.tolist() == [[7, 6, 8, 3]]


def test_a_processor_that_reads_the_text_is_refused_with_a_tree_and_any_other_is_not():
    model = tiny()
    with pytest.raises(StrategyError, match="chains of guesses"):
        both(model, prompts(1), "token-recycling", repetition_penalty=1.2)
    plain, ours = both(model, prompts(2), "token-recycling", suppress_tokens=[*range(5, 20)])
    assert torch.equal(ours.sequences, plain)


def test_recycling_is_lossless_under_every_rule(command, small_suite):
    status, out, err = command("check-rule", "token-recycling:shape=3x2:k=3", "--quick")
    assert (status, err) == (0, []), out
    assert out.splitlines()[-1].startswith("lossless")


def test_a_shared_matrix_shows_under_a_rule_that_is_not_seed_exact(command, small_suite):
    """Why the drafter's own default is a matrix for every row."""
    status, out, _ = command("check-rule", "token-recycling:shape=3x2:k=3:shared=true", "--quick")
    wrong = [line for line in out.splitlines() if "FAIL" in line]
    assert status == 1 and wrong and all("guesses as fixed tokens" in line for line in wrong)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("token-recycling:tree=9x2", "k (8) must be at least 9"),
        ("token-recycling:tree=3,k=2", "k (2) must be at least 3"),
        ("token-recycling:k=0", "k must be a whole number"),
        ("token-recycling:tree=big", "'big' is no tree"),
        ("token-recycling:tree=3x2,pass_tokens=9", "pass_tokens"),
    ],
)
def test_trees_that_do_not_fit_are_refused(text: str, says: str):
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy(text)
    one_clear_line(error.value, says)


@pytest.mark.slow
def test_the_whole_suite(command):
    status, out, err = command("check-rule", "token-recycling")
    assert (status, err) == (0, []), out
