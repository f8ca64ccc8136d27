"""Trees through a real decoder: a tree pass equals plain passes, its accepted path leaves the cache that they leave."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_pipeline import TOKENS, VOCAB, hushed, one_clear_line, text_pipeline
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from arsd.cache import RowCache
from arsd.decoding import (
    Autoregressive,
    CounterNoise,
    DecodeRequest,
    DecodeResult,
    Grammar,
    LawConfig,
    Laws,
    SeedExactTree,
    Setting,
    TreeDrafter,
    TreeShape,
    build_parts,
    decode,
    parse_strategy,
)
from arsd.decoding.drafters import NoDraft
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.trees import tables
from arsd.decoding.types import Draft, FixedWindow, Parts
from arsd.errors import StrategyError
from arsd.models.target import DecoderTarget

PROMPTS = ["red apple", "a pear", "dog face", "blue heart", "green pear", "red heart", "face"]
TREES = ["2", "3x2x1", "2x0.1x2", "chain3", "mc_sim_7b_63"]


@pytest.fixture(scope="module")
def pipe():
    return hushed(text_pipeline()).to(torch.float64)


@pytest.fixture(scope="module")
def small():
    """The same weights, shaken: a draft model that is often right."""
    made = hushed(text_pipeline()).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.transformer.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.25 * parameter.std().nan_to_num(0.0) * noise
    return made


def stock_target(pass_tokens: int, batch: int = len(PROMPTS), shaken: float = 0.0) -> DecoderTarget:
    """A Llama with its own 1-D rotary positions (the grid's are 0 in the condition), padded by 0 to 4 of 6 slots."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        model, head = LlamaModel(config).double().eval(), nn.Linear(32, VOCAB, bias=False).double()
    for parameter in [*model.parameters(), *head.parameters()]:
        parameter.data.normal_(std=0.3, generator=generator)
    generator.manual_seed(8)
    for parameter in model.parameters():
        parameter.data += shaken * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    generator.manual_seed(9)
    condition = torch.randn(2, len(PROMPTS), 6, 32, generator=generator, dtype=torch.float64)
    padding = torch.arange(6) < torch.tensor([0, 2, 1, 4, 0, 3, 1])[:, None]
    embed, both = model.embed_tokens, torch.stack([padding, padding.flip(0)])
    return DecoderTarget(model, head, embed, condition, TOKENS, pass_tokens, both, batch)


def target_of(pipe, pass_tokens: int, batch: int | None = None, prompts: list[str] = PROMPTS) -> DecoderTarget:
    if pipe is None:
        return stock_target(pass_tokens, batch or len(prompts))
    conditions = pipe.encode_inputs(prompt=prompts)
    return pipe.target_maker(conditions)(pass_tokens, batch or len(prompts))


def run(
    pipe, small, text: str, batch: int, lengths: Any = TOKENS, keep: bool = False, **request
) -> tuple[DecodeResult, Any]:
    """Decode all prompts with the strategy ``text`` in float64 under guidance, ``batch`` at a time."""
    grammar, count = pipe.make_grammar(), len(PROMPTS)
    noise = CounterNoise(list(range(count)), [0] * count, batch=batch)
    laws = Laws(LawConfig(2.0), grammar)

    def draft_model(pass_tokens: int) -> SmallARDrafter:
        return SmallARDrafter(target_of(small, pass_tokens, batch), pass_tokens)

    setting = Setting(batch, TOKENS, 4, grammar, noise, torch.device("cpu"), laws=laws, draft_model=draft_model)
    parts = parse_strategy(text).build(setting)
    target = target_of(pipe, parts.pass_tokens, batch)
    if keep:
        target.keep_features()
    wanted = DecodeRequest(lengths, 4, pictures=count, **request)
    return decode(target, parts, laws, noise, wanted, batch), target


@pytest.fixture(scope="module")
def plain(pipe, small) -> Tensor:
    return run(pipe, small, "ar", len(PROMPTS))[0].tokens


def paths_of(shape: TreeShape) -> list[list[int]]:
    """Columns from 0 to each column of the tree."""
    paths = [[0]]
    for column, parent in enumerate(shape.parents, start=1):
        paths.append([*paths[parent], column])
    return paths


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("extra", "stock"), [(0, False), (3, False), (0, True)])
@torch.no_grad()
def test_every_column_of_a_tree_pass_equals_a_plain_pass_along_its_path(pipe, tree: str, extra: int, stock: bool):
    """Padded prompts, two guidance streams, rows at other lengths (0: its last condition slot is fed), junk behind."""
    pipe = None if stock else pipe
    shape, starts = TreeShape.parse(tree), [5, 0, 9, TOKENS - 1, 1, 0, 3]
    target, chain = target_of(pipe, shape.columns + extra), target_of(pipe, shape.columns + extra)
    generator, lengths = torch.Generator().manual_seed(3), torch.tensor(starts)
    text = torch.randint(0, VOCAB, (len(PROMPTS), TOKENS), generator=generator)
    fed = torch.randint(0, VOCAB, (len(PROMPTS), shape.columns + extra), generator=generator)
    fed[:, 0] = text.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
    for each in (target, chain):
        each.prefill([-each.unread] * each.batch, 4)
        for start in range(0, TOKENS - 1, shape.columns):
            each.rollback(torch.full_like(lengths, start))
            before = torch.nn.functional.pad(text, (1, shape.columns))[:, start : start + shape.columns]
            each.forward(before, torch.full_like(lengths, start), [start] * each.batch)
        each.rollback(lengths)
    logits = target.forward(fed, lengths, starts, shape)
    for column, path in enumerate(paths_of(shape)):
        chain.rollback(lengths)
        expected = chain.forward(fed[:, path], lengths, starts)[:, :, -1]
        torch.testing.assert_close(logits[:, :, column], expected, rtol=0, atol=1e-10)
    assert float((logits[:, :, 1] - logits[:, :, -1]).abs().max()) > 1e-3


@pytest.mark.parametrize("tree", ["2", "3x2"])
@pytest.mark.parametrize("stock", [False, True])
@torch.no_grad()
def test_a_row_that_reads_its_condition_in_a_tree_pass_reads_it_as_in_any_other(pipe, tree: str, stock: bool):
    pipe = None if stock else pipe
    shape, starts = TreeShape.parse(tree), [-3, 4, -9, 0, -1, 2, 1]
    starts[2] = -target_of(pipe, 4).unread
    lengths, results = torch.tensor(starts), []
    fed = torch.randint(0, VOCAB, (len(PROMPTS), shape.columns), generator=torch.Generator().manual_seed(5))
    for branches in ((), (shape,)):
        target = target_of(pipe, shape.columns)
        target.prefill([-target.unread] * target.batch, 4)
        target.rollback(torch.zeros_like(lengths))
        target.forward(fed.flip(0), torch.zeros_like(lengths), [0] * target.batch)
        target.rollback(lengths)
        target.forward(fed, lengths, starts, *branches)
        after = torch.where(lengths < 0, (lengths + shape.columns).clamp_max(0), lengths)
        target.rollback(after)
        results.append(target.forward(fed, after, after.tolist()))
    torch.testing.assert_close(*(x[:, lengths < 0] for x in results), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_seed_exact_tree_gives_plain_ars_tokens_in_a_queue_of_padded_prompts(pipe, small, plain, tree: str, batch: int):
    result, _ = run(pipe, small, f"speculative:drafter=tree:shape={tree},rule=seed-exact-tree", batch)
    assert torch.equal(result.tokens, plain)
    stats = result.stats
    assert stats.tokens == [TOKENS] * len(PROMPTS) and stats.pass_tokens == TreeShape.parse(tree).columns
    assert stats.tokens_per_pass > 1.2 and max(stats.accepted_lengths) > 2 - (tree == "2")


def given(model: SmallARDrafter, window: int) -> SmallARDrafter:
    return model


@pytest.mark.parametrize("batch", [2, 7])
def test_a_seed_exact_tree_on_a_stock_llama_gives_plain_ars_tokens(batch: int):
    grammar, count, tree = Grammar(TOKENS, VOCAB, {5: 3}), len(PROMPTS), TreeShape.parse("3x2x1")
    laws, results = Laws(LawConfig(1.5, top_k=12), grammar), []
    for guesses in (False, True):
        noise = CounterNoise(list(range(count)), [0] * count, batch=batch)
        small = SmallARDrafter(stock_target(tree.columns, batch, shaken=0.02), tree.columns)
        call = (batch, TOKENS, 4, grammar, noise, torch.device("cpu"), None, laws, None, partial(given, small))
        drafter: Any = TreeDrafter(Setting(*call), tree) if guesses else NoDraft()
        parts = Parts(drafter, SeedExactTree(), FixedWindow(4 if guesses else 1), tree.columns if guesses else 1)
        request = DecodeRequest(TOKENS, pictures=count)
        results.append(decode(stock_target(parts.pass_tokens, batch), parts, laws, noise, request, batch))
    assert torch.equal(results[0].tokens, results[1].tokens)
    assert results[1].stats.tokens_per_pass > 1.5


def test_pictures_of_several_lengths_and_longer_passes(pipe, small, plain):
    lengths = [TOKENS, 3, 1, 9, TOKENS, 5, 2]
    text = "speculative:drafter=tree:shape=3x2x1,rule=seed-exact-tree,pass_tokens=20"
    result, _ = run(pipe, small, text, 2, lengths, log_probs=True)
    assert result.stats.tokens == lengths and result.stats.pass_tokens == 20
    for row, length in enumerate(lengths):
        assert torch.equal(result.tokens[row, :length], plain[row, :length]) and not result.tokens[row, length:].any()


def spoiled(name: str, patch: pytest.MonkeyPatch) -> None:
    if name == "cache not compacted":
        patch.setattr(RowCache, "compact", lambda self, source: None)
    else:
        begin = RowCache.begin_tree

        def begin_tree(self, depths, sees, attended=None):
            slots = torch.arange(depths.shape[1])
            if name == "siblings seen":
                sees = (slots[:, None] >= slots).expand_as(sees)
            if name == "position of the slot":
                depths = slots.expand_as(depths)
            return begin(self, depths, sees, attended)

        patch.setattr(RowCache, "begin_tree", begin_tree)


@pytest.mark.parametrize("mistake", ["cache not compacted", "siblings seen", "position of the slot"])
def test_a_mistake_in_the_tree_pass_changes_tokens(pipe, small, plain, mistake: str, monkeypatch: pytest.MonkeyPatch):
    text = "speculative:drafter=tree:shape=3x2x1,rule=seed-exact-tree"
    spoiled(mistake, monkeypatch)
    assert not torch.equal(run(pipe, small, text, 3)[0].tokens, plain)


@pytest.mark.parametrize("rule", ["siblings", "seed-exact-tree"])
def test_recorded_log_probs_and_kept_features_are_those_of_plain_passes(pipe, small, rule: str):
    """Of a batch without a queue, so that every row still holds its picture at the end."""
    text = f"speculative:drafter=tree:shape=3x2x1,rule={rule}"
    result, target = run(pipe, small, text, len(PROMPTS), keep=True, log_probs=True)
    assert result.stats.tokens_per_pass > 1.5
    teacher = target_of(pipe, TOKENS)
    teacher.keep_features()
    lengths = torch.zeros(len(PROMPTS), dtype=torch.int64)
    with torch.no_grad():
        teacher.prefill([-teacher.unread] * teacher.batch, 4)
        teacher.rollback(lengths)
        fed = torch.nn.functional.pad(result.tokens[:, :-1], (1, 0))
        logits = teacher.forward(fed, lengths, [0] * teacher.batch)
    law = Laws(LawConfig(2.0), pipe.make_grammar())(logits, torch.arange(TOKENS).expand(len(PROMPTS), -1))
    expected = law.log_probs.gather(-1, result.tokens[..., None])[..., 0]
    torch.testing.assert_close(result.log_probs.double(), expected, rtol=0, atol=1e-5)
    last = teacher.unread + TOKENS - 1  # the last token is never fed
    assert target.features is not None and teacher.features is not None
    torch.testing.assert_close(target.features[:, :last], teacher.features[:, :last], rtol=0, atol=1e-10)


@pytest.mark.parametrize("tree", ["3x2x1", "chain3", "mc_sim_7b_63"])
def test_a_picture_of_a_tree_depends_on_its_seed_only(pipe, small, tree: str):
    text = f"speculative:drafter=tree:shape={tree},rule=siblings"
    together, alone, queued = (run(pipe, small, text, batch)[0] for batch in (len(PROMPTS), 1, 3))
    assert torch.equal(together.tokens, alone.tokens) and torch.equal(together.tokens, queued.tokens)
    assert together.stats.row_passes == alone.stats.row_passes == queued.stats.row_passes


def test_a_draft_model_that_is_the_target_is_always_right(pipe):
    """Every round takes a whole path and one token more: 4, 4, 4, 4."""
    for rule in ("siblings", "seed-exact-tree"):
        result, _ = run(pipe, pipe, f"speculative:drafter=tree:shape=3x2x1,rule={rule}", 4)
        assert dict(result.stats.accepted_lengths) == {4: 4 * len(PROMPTS)}


@torch.no_grad()
def test_small_ar_extends_one_guess_after_another_as_a_plain_pass_does(pipe):
    model, target = SmallARDrafter(target_of(pipe, 8), 8), target_of(pipe, 8)
    model.begin(target)
    text = torch.randint(0, VOCAB, (len(PROMPTS), 8), generator=torch.Generator().manual_seed(2))
    lengths = torch.zeros(len(PROMPTS), dtype=torch.int64)
    target.prefill([-target.unread] * target.batch, 1)
    target.rollback(lengths)
    expected = target.forward(text, lengths, [0] * target.batch)
    logits = [model.catch_up(text[:, :3], [0] * target.batch, [2] * target.batch)]
    logits += [model.extend(text[:, n]) for n in range(3, 8)]
    torch.testing.assert_close(torch.stack(logits, 2), expected[:, :, 2:], rtol=0, atol=1e-10)


def test_trees_and_what_cannot_judge_or_share_them(pipe, small):
    for text, says in (
        ("speculative:drafter=tree:shape=3x2x1,rule=rejection", "judges chains of guesses"),
        ("speculative:drafter=tree:shape=3x2x1,rule=siblings,window=4,pass_tokens=12", "must be at least 16"),
        ("speculative:drafter=tree:shape=3y2,rule=siblings", "is no tree"),
    ):
        with pytest.raises(StrategyError) as error:
            run(pipe, small, text, 2)
        one_clear_line(error.value, says)
    setting = Setting(2, TOKENS, 4, pipe.make_grammar(), CounterNoise([0, 0], [0, 1]), torch.device("cpu"))
    with pytest.raises(StrategyError) as error:
        parse_strategy("speculative:drafter=tree,rule=siblings").build(setting)
    one_clear_line(error.value, "no drafter")

    class Tree(Autoregressive):
        def build(self, setting: Setting) -> Parts:
            parts = super().build(setting)
            parts.drafter.tree = TreeShape.parse("2")  # type: ignore[attr-defined]
            return parts

    with pytest.raises(StrategyError) as error:
        build_parts([Tree(pass_tokens=3), Autoregressive()], setting)
    one_clear_line(error.value, "cannot share a batch")


def test_a_rule_for_chains_under_a_tree_is_one_clear_line(pipe):
    from arsd.decoding.rules import SeedExact

    class Guess:
        needs_law = False

        def propose(self, step) -> Draft:
            return Draft(step.positions[:, :2] * 0, None, TreeShape.parse("chain2"))

    noise, grammar = CounterNoise([0], [0]), pipe.make_grammar()
    parts = Parts(Guess(), SeedExact(), FixedWindow(3), 3)  # type: ignore[arg-type]
    with pytest.raises(StrategyError) as error:
        decode(target_of(pipe, 3, 1), parts, Laws(LawConfig(2.0), grammar), noise, DecodeRequest(TOKENS, pictures=1), 1)
    one_clear_line(error.value, "not trees")


@pytest.mark.parametrize(
    ("text", "levels", "columns"),
    [("3x2x1", [3, 6, 6], 16), ("chain5", [1] * 5, 6), ("chain:2", [1, 1], 3), ("2x0.1x2", [2, 1, 2], 6), (4, [4], 5)],
)
def test_a_tree_as_text(text, levels, columns):
    tree = TreeShape.parse(text)
    assert [len(tree.level(depth)) for depth in range(1, tree.depth + 1)] == levels and tree.columns == columns
    assert TreeShape.parse(str(tree)) == tree
    assert all(tree.head(n).columns == n for n in range(1, columns + 1))


def test_the_published_tree_is_its_list_of_paths():
    """EAGLE's 25 nodes by child ranks: 4 / 8 / 8 / 3 / 2 by depth."""
    tree = TreeShape.parse("mc_sim_7b_63")
    paths = ["0 1 2 3", "00 01 02 10 11 20 21 30", "000 001 002 010 011 020 021 100", "0000 0001 0002", "00000 00001"]
    assert tree == TreeShape.of_paths([[int(rank) for rank in path] for level in paths for path in level.split()])
    assert TreeShape.parse(str(tree)) == tree and [len(tree.level(d)) for d in range(1, 6)] == [4, 8, 8, 3, 2]


@pytest.mark.parametrize("text", ["", "x", "0", "2x0", "2x1.1.1", "chain0", "3x-1", "900", "2x2x2x2x2x2x2x2x2", "a tree"])
def test_a_bad_tree_is_one_clear_line(text):
    with pytest.raises(StrategyError) as error:
        TreeShape.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("paths", [[[0, 0]], [[1]], [[0], [0, 1]], [[]]])
def test_paths_with_gaps_are_refused(paths):
    with pytest.raises(StrategyError, match="no parent or no elder sibling"):
        TreeShape.of_paths(paths)


def test_columns_see_themselves_and_their_ancestors():
    sees = tables(TreeShape.parse("2x1"), 6, torch.device("cpu")).sees
    assert [row.nonzero()[:, 0].tolist() for row in sees] == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 5]]
