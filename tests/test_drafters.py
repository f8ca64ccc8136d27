"""Draft models: EAGLE reads what it was trained on, small models what they were given, and neither shows in the picture."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from drafting import PROMPTS, decoded, drafting, inputs
from tiny_pipeline import TOKENS, class_pipeline, codes, hushed, one_clear_line, seeded, text_pipeline, tiny_transformer
from torch import Tensor
from torch.nn import functional as F

import arsd
from arsd import EagleDrafter
from arsd.decoding import CounterNoise, Grammar, LawConfig, Laws, Setting, Step, TreeDrafter
from arsd.decoding.chain import ChainDrafter, ModelDrafter
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import DraftModel
from arsd.errors import ArsdError, InputError, NonFiniteLogitsError, StrategyError
from arsd.exactness.tables import HashTarget
from arsd.models.eagle_draft import EagleDraftModel
from arsd.training.drafter import DrafterLoss, DrafterTask


@pytest.fixture(scope="module", params=["text", "class"])
def pipe(request) -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline() if request.param == "text" else class_pipeline())


# ---------------------------------------------------------------- EAGLE at work is EAGLE in training


@pytest.fixture(scope="module")
def double() -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline().to(torch.float64))


def draft_model(pipe: arsd.LlamaGenPipeline, condition: Tensor, padding: Tensor, window: int = 5) -> EagleDraftModel:
    lm = pipe.transformer.lm
    parts = (pipe.drafter, lm.model.rotary_emb, lm.lm_head, lm.model.embed_tokens)
    return EagleDraftModel(*parts, condition, TOKENS, window, padding)


def test_guess_number_j_reads_what_run_j_of_the_training_read(double):
    """Logits of every guess, in chains that begin at every position, against the training's runs over whole pictures."""
    tokens, condition, padding, target = decoded(double)
    task = DrafterTask(double, DrafterLoss(depth=4))
    embeds, features, bias = task.teach(PROMPTS, tokens)
    kept = target.features[:, : features.shape[1]]
    torch.testing.assert_close(kept[:, -TOKENS:], features[:, -TOKENS:], rtol=0, atol=1e-10)
    head = double.transformer.lm.lm_head
    with torch.inference_mode():
        runs = [head(guessed).unflatten(0, (2, -1)) for guessed in task.runs(double.drafter, embeds, features, bias)]
        model = draft_model(double, condition, padding)
        model.begin(target)
        first = features.shape[1] - TOKENS
        for n in (0, 1, 4, 5, 9, 12):
            read = max(0, n - 3)
            fed = F.pad(tokens, (1, 8))[:, read : read + 5]
            logits = model.catch_up(fed, [read] * len(tokens), [n - read] * len(tokens))
            for j in range(4):
                torch.testing.assert_close(logits, runs[j][:, :, first + n + j], rtol=0, atol=1e-9)
                if n + j < TOKENS - 1:
                    logits = model.extend(tokens[:, n + j])


def test_a_round_uploads_little_however_long_the_chain(double, monkeypatch):
    """Each small tensor made from host numbers makes a GPU wait: two a round, for the chain and for the model's place."""
    original = torch.tensor

    def uploads(decoder: str) -> tuple[int, int]:
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", lambda *args, **options: made.append(args) or original(*args, **options))
            out = double(PROMPTS, decoder=decoder, generator=seeded(0), output_type="latent")
        return len(made), out.stats.forward_passes

    for decoder in ("eagle:draft_length=2", "eagle:draft_length=7", "eagle:tree=2x1x1", "hybrid:window=8"):
        uploads(decoder)  # tables are made once
        (count, passes), (others, _) = uploads(decoder), uploads("sjd:window=8")
        assert passes >= 4 and count - others <= 2 * passes + 20, decoder  # and once a call: conditions, a tree


@pytest.mark.parametrize(
    "decoder", ["cool-sd:budget=2", "lantern:k=5", "eagle", "eagle:coupling=rejection,tree=2x1", "hybrid"]
)
def test_a_drafter_of_nans_is_an_error_and_what_was_made_is_kept(decoder):
    pipe = drafting(text_pipeline())
    with torch.no_grad():
        pipe.drafter.fc.weight.fill_(torch.nan)
    for given in (decoder, [decoder, "ar", "ar", "ar"]) if "tree" not in decoder else (decoder,):
        with pytest.raises(NonFiniteLogitsError) as error:
            pipe(PROMPTS, decoder=given, generator=seeded(0))
        one_clear_line(error.value, "the drafter returned NaN")
        assert error.value.tokens.shape == (4, TOKENS)


def test_what_a_draft_model_says_of_idle_rows_is_no_fault():
    class Broken(SmallARDrafter):
        """NaN for the second row."""

        def catch_up(self, *args):
            return super().catch_up(*args).index_fill(1, torch.tensor([1]), torch.nan)

    grammar, noise = Grammar(6, 5), CounterNoise([1, 1], [0, 1])
    model = lambda window: Broken(HashTarget(5, 6, 2), window)  # noqa: E731
    setting = Setting(2, 6, 0, grammar, noise, torch.device("cpu"), laws=Laws(LawConfig(), grammar), draft_model=model)
    for widths, faults in (([2, 0], [False, False]), ([2, 2], [False, True])):
        width, positions = torch.tensor(widths), torch.arange(2).expand(2, -1)
        step = Step(positions, width, width * 0, positions < width[:, None], [0, 0], [], noise)
        for made in (ChainDrafter(replace(setting, window=2)), TreeDrafter(setting, "2")):
            assert made.propose(step).broken.tolist() == faults


def test_a_draft_model_reads_what_was_committed_and_little_more(double, monkeypatch):
    """Under the seed-exact rule; its guesses are those of a model that reads the whole window. Laws need fixed shapes."""
    widths: list[tuple[int, int]] = []
    catch_up, whole = EagleDraftModel.catch_up, ModelDrafter.catch_up

    def watched(self, tokens, read, columns):
        widths.append((tokens.shape[1], max(columns) + 1))
        return catch_up(self, tokens, read, columns)

    def with_all(self, step):
        self.needs_law = True
        logits = whole(self, step)
        self.needs_law = False
        return logits

    def passes(decoder: str) -> list[int]:
        widths.clear()
        out = double(PROMPTS, decoder=decoder, generator=seeded(0), output_type="latent")
        return [*out.stats.row_passes, *out.stats.accepted_lengths.values()]

    monkeypatch.setattr(EagleDraftModel, "catch_up", watched)
    taken = passes("hybrid:window=8,draft_length=3")
    assert all(wide <= 8 and used <= wide < 2 * used for wide, used in widths) and {wide for wide, _ in widths} > {1, 2}
    passes("eagle:draft_length=6,coupling=rejection")
    assert {wide for wide, _ in widths} == {7}
    monkeypatch.setattr(ModelDrafter, "catch_up", with_all)
    assert passes("hybrid:window=8,draft_length=3") == taken


def test_a_row_that_begins_another_picture_forgets_the_one_before(double):
    tokens, condition, padding, target = decoded(double)
    swapped = [2, 0, 3, 1]
    with torch.inference_mode():
        fresh = draft_model(double, condition[:, swapped], padding[:, swapped])
        used = draft_model(double, condition, padding)
        used.begin(target)
        used.catch_up(tokens[:, :5], [0] * 4, [4] * 4)
        used.join([0, 1, 2, 3], swapped)
        order = torch.tensor([s * 4 + b for s in range(2) for b in swapped])
        target.features[:] = target.features[order]
        fresh.begin(target)
        fed = F.pad(tokens[swapped], (1, 0))[:, :5]
        results = [model.catch_up(fed, [0] * 4, [3, 0, 2, 1]) for model in (fresh, used)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_row_that_still_reads_its_condition_waits(double):
    """Junk passes of a waiting row leave no trace."""
    tokens, condition, padding, target = decoded(double)
    fed = F.pad(tokens, (1, 0))[:, :5]
    with torch.inference_mode():
        plain, waited = draft_model(double, condition, padding), draft_model(double, condition, padding)
        for model in (plain, waited):
            model.begin(target)
        waited.catch_up(fed, [0, -1, 0, -1], [2, 0, 1, 0])
        waited.extend(tokens[:, 3])
        results = [model.catch_up(fed, [0] * 4, [3, 2, 1, 0]) for model in (plain, waited)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


# ---------------------------------------------------------------- the drafter does not show


@pytest.mark.parametrize(
    "decoder", ["eagle", "eagle:draft_length=1", "eagle:draft_length=9", "hybrid:window=8", "hybrid:weight=none,window=8"]
)
def test_plain_ars_tokens_whatever_the_drafter(pipe, decoder):
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder), plain)
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder, batch_size=3), plain)
    assert torch.equal(
        codes(pipe, **inputs(pipe), decoder=decoder, guidance_scale=1.0),
        codes(pipe, **inputs(pipe), decoder="ar", guidance_scale=1.0),
    )


def test_strategies_with_and_without_a_drafter_share_a_batch(pipe):
    decoders = ["eagle:draft_length=3", "ar", "hybrid:window=6", "sjd:window=4"]
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoders), plain)
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoders, batch_size=2), plain)


def test_a_drafter_that_knows_the_answer_is_always_right():
    """A small model that is the target itself: every pass takes all guesses, under either rule, and in a queue."""
    pipe = drafting(text_pipeline())
    pipe.drafter = pipe.transformer
    for decoder in ("eagle:draft_length=3", "eagle:draft_length=3,coupling=rejection"):
        for size in (None, 3):
            out = pipe(PROMPTS, generator=seeded(0), decoder=decoder, batch_size=size, output_type="latent")
            assert out.stats.tokens_per_pass == 4 and out.stats.row_passes == [4] * 4


def test_the_weight_of_a_hybrid_goes_from_the_jacobi_iterate_to_the_models_guess(pipe):
    """With none on the model, a guess is what the last pass gave its position; with all, here the target, always right."""
    call = {"generator": seeded(0), "output_type": "latent", "trace": True}
    rounds = pipe(**inputs(pipe), decoder="hybrid:draft_length=4,weight=0,window=6", **call).trace
    compared = 0
    for before, now in itertools.pairwise(rounds):
        for row in range(4):
            first, committed = int(before.positions[row, 0]), before.counts[row]
            iterates = before.tokens[row, committed:][: TOKENS - first - committed]
            if committed:
                assert torch.equal(now.drafts[row, : len(iterates)], iterates[: now.drafts.shape[1]])
                compared += len(iterates)
    assert compared > 50
    mine, pipe.drafter = pipe.drafter, pipe.transformer
    try:
        for decoder in ("hybrid:draft_length=3,weight=none,window=4", "hybrid:draft_length=3,weight=1e6,window=4"):
            out = pipe(**inputs(pipe), decoder=decoder, generator=seeded(0), batch_size=3, output_type="latent")
            assert out.stats.row_passes == [4] * 4
    finally:
        pipe.drafter = mine


def test_a_smaller_model_of_the_same_codes_drafts(pipe):
    other = tiny_transformer(pipe.transformer.config["condition"], seed=1)
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    mine, pipe.drafter = pipe.drafter, other
    try:
        for decoder in ("eagle", "hybrid:window=8", "speculative:drafter=draft-model,rule=seed-exact,window=4"):
            assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder), plain)
    finally:
        pipe.drafter = mine


# ---------------------------------------------------------------- saving, mistakes


def test_a_pipeline_saves_and_loads_its_drafter(tmp_path):
    pipe = drafting(text_pipeline())
    without = text_pipeline()
    without.save_pretrained(tmp_path / "without")
    pipe.save_pretrained(tmp_path / "with")
    loaded = hushed(arsd.AutoARPipeline.from_pretrained(tmp_path / "with"))
    assert isinstance(loaded.drafter, EagleDrafter)
    for key, value in pipe.drafter.state_dict().items():
        assert torch.equal(loaded.drafter.state_dict()[key], value)
    outs = [p(PROMPTS, generator=seeded(0), decoder="eagle") for p in (pipe, loaded)]
    assert outs[0].stats.forward_passes == outs[1].stats.forward_passes
    bare = hushed(arsd.AutoARPipeline.from_pretrained(tmp_path / "without"))
    assert bare.drafter is None and bare.model_hash == loaded.model_hash  # a drafter is no part of the model


def test_a_small_model_is_saved_as_a_drafter_too(tmp_path):
    pipe = drafting(text_pipeline(), tiny_transformer("text", seed=1))
    pipe.save_pretrained(tmp_path)
    loaded = arsd.AutoARPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.drafter, arsd.LlamaGenTransformer)


@pytest.mark.parametrize("decoder", ["eagle", "hybrid:window=8", "speculative:drafter=draft-model,window=4"])
def test_without_a_drafter_there_is_one_clear_error(decoder):
    with pytest.raises(StrategyError) as error:
        hushed(text_pipeline())("red apple", decoder=decoder)
    one_clear_line(error.value, "no drafter")


def test_a_drafter_of_another_model_is_refused():
    pipe = text_pipeline()
    for drafter, says in (
        (EagleDrafter(hidden_size=32, num_heads=2, intermediate_size=64), "another model"),
        (tiny_transformer("text", grid=8), "tokens, the model 16"),
    ):
        with pytest.raises(InputError) as error:
            drafting(pipe, drafter)("red apple", decoder="eagle")
        one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("eagle:draft_length=0", "draft_length"),
        ("eagle:draft_length=4,pass_tokens=4", "pass_tokens"),
        ("eagle:coupling=none", "coupling"),
        ("hybrid:draft_length=8,window=8", "window"),
        ("hybrid:init=middle", "init"),
        ("hybrid:weight=-1", "weight"),
        ("hybrid:window=8,pass_tokens=4", "pass_tokens"),
        ("speculative:drafter=draft-model:length=2", "length"),
        ("speculative:drafter=tree:shape=2x1,rule=siblings,pass_tokens=0", "pass_tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(text, says):
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy(text)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("drafter", "says"),
    [
        ("hybrid:length=abc", "length must be a whole number"),
        ("hybrid:length=0", "length must be a whole number"),
        ("hybrid:weight=abc", "weight must be a number"),
        ("hybrid:init=foo", "unknown init 'foo'"),
    ],
)
def test_options_of_drafters_are_refused_when_the_call_begins(pipe, drafter, says):
    with pytest.raises(StrategyError) as error:
        pipe(**inputs(pipe), decoder=f"speculative:drafter={drafter},window=6", output_type="latent")
    one_clear_line(error.value, says)


def test_registered_drafters_with_a_model_give_plain_ars_tokens(pipe):
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    for drafter in ("draft-model,window=4", "hybrid:length=2,window=6", "tree:shape=2x1,rule=seed-exact-tree,pass_tokens=8"):
        assert torch.equal(codes(pipe, **inputs(pipe), decoder=f"speculative:drafter={drafter}"), plain), drafter


def test_blocks_and_inputs_that_do_not_exist_are_refused():
    for options in ({"block": "mamba"}, {"condition_inputs": "none"}, {"num_heads": 3}, {"num_heads": "2"}):
        with pytest.raises(ArsdError) as error:
            EagleDrafter(**{"hidden_size": 64, "num_heads": 2, "intermediate_size": 64, **options})
        one_clear_line(error.value, next(iter(options)))


def test_the_protocol_is_kept(double):
    _, condition, padding, _ = decoded(double)
    model: DraftModel = draft_model(double, condition, padding)
    assert all(callable(getattr(model, name)) for name in ("begin", "catch_up", "extend", "join"))


# ---------------------------------------------------------------- trees of EAGLE's guesses


def test_a_node_of_a_tree_reads_what_a_chain_to_it_reads(double):
    """Logits behind every node with children, against the chain that ends there."""
    tokens, condition, padding, target = decoded(double)
    tree = TreeShape.parse("3x2.1.2x1")
    guesses = torch.randint(0, 32, (4, len(tree.parents)), generator=seeded(4))
    with torch.inference_mode():
        branched, straight = draft_model(double, condition, padding, tree.columns), draft_model(double, condition, padding)
        for model in (branched, straight):
            model.begin(target)
        for n in (0, 1, 5, 9):
            read = max(0, n - 3)
            fed = F.pad(tokens, (1, 8))[:, read : read + 5]
            past = (fed, [read] * 4, [n - read] * 4)
            branched.catch_up(*past)
            for depth in range(1, tree.depth):
                level = [column for column in tree.level(depth)]
                logits = branched.extend_tree(guesses[:, [column - 1 for column in level]], tree, depth)
                for place, column in enumerate(c for c in level if tree.counts[c]):
                    path = [column]
                    while tree.parents[path[0] - 1]:
                        path.insert(0, tree.parents[path[0] - 1])
                    straight.catch_up(*past)
                    for node in path:
                        expected = straight.extend(guesses[:, node - 1])
                    torch.testing.assert_close(logits[:, :, place], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tree", ["3x2x1", "2x2", "chain3"])
def test_trees_of_eagles_guesses_give_plain_ars_tokens(pipe, tree):
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    for size in (None, 3):
        assert torch.equal(codes(pipe, **inputs(pipe), decoder=f"eagle:tree={tree}", batch_size=size), plain)
    alone = codes(pipe, **inputs(pipe), decoder=f"eagle:tree={tree},coupling=rejection", batch_size=1)
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=f"eagle:tree={tree},coupling=rejection"), alone)
