"""Sparse-to-Dense: the text is plain decoding's for every policy, budget, length, batch and seed; only acceptance varies."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import torch
from tiny_pipeline import class_pipeline
from torch import Tensor
from video_llms import clip, inputs, tiny

import arsd
from arsd import generate_fn
from arsd.errors import StrategyError
from arsd.models import compact_cache, sparse_draft
from arsd.models.selection import POLICIES

KINDS = ("qwen2.5-vl", "llava-onevision", "smolvlm")  # three-axis rope, one rope, pictures among text
QUESTIONS = ["What happens?", "What is seen in the clip, and then?", "Go?"]
NEW = 32


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    if dtype == torch.float32:
        return tiny(kind)[0]
    model = tiny(kind)[0]
    twin = type(model)(model.config).to(dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@cache
def asked(kind: str, rows: int = 1, frames: int = 16, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    made = inputs(kind, [clip(frames, seed=i) for i in range(rows)], QUESTIONS[:rows])
    return {k: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in made.items()}


def run(
    kind: str, strategy: Any, rows: int = 1, frames: int = 16, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    how = strategy if callable(strategy) else generate_fn(strategy)
    fed = asked(kind, rows, frames, dtype)
    return model_of(kind, dtype).generate(**fed, **options, custom_generate=how, return_dict_in_generate=True)


@cache
def generated(kind: str, rows: int, frames: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    fed = asked(kind, rows, frames, dtype)
    return model_of(kind, dtype).generate(**fed, max_new_tokens=NEW, do_sample=False)


@cache
def sampled(kind: str, rows: int, seed: int) -> Tensor:
    return run(kind, "ar", rows, do_sample=True, temperature=0.9, top_k=40, seed=seed).sequences


def acceptance(out: Any, length: int) -> float:
    """Accepted guesses per guess, leaving out the last pass of each row, which the end cuts."""
    stats = out.stats
    passes = sum(stats.row_passes)
    return (sum(stats.tokens) - passes) / (passes * length)


pytestmark = pytest.mark.usefixtures("quiet_transformers")


# ----------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_greedy_text_is_that_of_generate(kind, rows, policy):
    out = run(kind, arsd.SparseToDense(budget=8, draft_length=4, policy=policy), rows)
    assert torch.equal(out.sequences, generated(kind, rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 8, 24, 10_000, "all"])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_every_budget_and_length_gives_the_same_text(kind, budget, length):
    out = run(kind, arsd.SparseToDense(budget=budget, draft_length=length), 2)
    assert torch.equal(out.sequences, generated(kind, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", [3, 4])
def test_sampled_text_is_that_of_plain_decoding_with_the_seed(kind, policy, seed):
    how = f"std:budget=12,draft_length=5,policy={policy},refresh=0.7"
    out = run(kind, how, 3, do_sample=True, temperature=0.9, top_k=40, seed=seed)
    assert torch.equal(out.sequences, sampled(kind, 3, seed))
    assert not torch.equal(out.sequences, sampled(kind, 3, 7 - seed))


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_as_well(kind):
    out = run(kind, "std:budget=8,draft_length=4", 2, dtype=torch.float64)
    assert torch.equal(out.sequences, generated(kind, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_all_visual_entries_are_a_draft_that_is_always_right(kind):
    out = run(kind, "std:budget=all,draft_length=4", 2)
    assert out.stats.accepted_lengths[5] == sum(out.stats.accepted_lengths.values()) - 2  # the end cuts one in each row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [40, 64])
def test_positions_behind_long_clips_are_those_of_generate(kind, frames):
    """Qwen's text goes on behind the frame's extent, not behind the largest position of the clip."""
    out = run(kind, "std:budget=8,draft_length=4", 1, frames)
    assert torch.equal(out.sequences, generated(kind, 1, frames))
    everything = run(kind, "std:budget=all,draft_length=4", 1, frames)
    assert torch.equal(everything.sequences, out.sequences) and everything.stats.tokens_per_pass > 4


def test_a_larger_budget_accepts_more():
    rates = [acceptance(run("qwen2.5-vl", f"std:budget={n},draft_length=4", 3), 4) for n in (1, 16, "all")]
    assert rates[0] < rates[1] < rates[2]


def test_an_end_token_inside_the_accepted_guesses_ends_the_row():
    text = generated("llava-onevision", 2)[:, -NEW:]
    end = int(text[0, 7])
    fed = asked("llava-onevision", 2)
    plain = model_of("llava-onevision").generate(
        **fed, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    out = run("llava-onevision", "std:budget=all,draft_length=9", 2, eos_token_id=end, pad_token_id=0)
    assert torch.equal(out.sequences, plain) and out.stats.tokens[0] <= 8


def test_guidance_streams_draft_as_well():
    options = {"cfg_scale": 1.5, "do_sample": True, "seed": 5}
    plain = run("llava-onevision", "ar", 2, **options)
    out = run("llava-onevision", "std:budget=all,draft_length=4", 2, **options)
    assert torch.equal(out.sequences, plain.sequences) and out.stats.tokens_per_pass > 4


def test_rejection_coupling_is_plain_decoding_without_sampling():
    out = run("llava-onevision", "std:budget=8,draft_length=4,coupling=rejection", 2)
    assert torch.equal(out.sequences, generated("llava-onevision", 2))
    assert not arsd.SparseToDense(coupling="rejection").seed_exact and arsd.SparseToDense(coupling="rejection").lossless


def test_a_prompt_of_plain_text_leaves_out_its_middle():
    model = model_of("qwen2.5-vl")
    ids = torch.randint(20, 300, (2, 150), generator=torch.Generator().manual_seed(0))
    fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**fed)
    some, every = (
        model.generate(**fed, custom_generate=generate_fn(f"std:budget={n},draft_length=4"), return_dict_in_generate=True)
        for n in (8, "all")
    )
    assert torch.equal(some.sequences, plain) and torch.equal(every.sequences, plain)
    assert some.stats.tokens_per_pass < every.stats.tokens_per_pass


# ------------------------------------------------------------------------------------------------- what the tests can see


def test_wrong_positions_of_the_draft_are_seen_in_its_acceptance(monkeypatch):
    """Positions that begin anew at the length of the small cache stay exact, and draft badly."""
    right = run("llava-onevision", "std:budget=all,draft_length=4", 2)
    begin = compact_cache.CompactCache.begin_row_passes

    def shifted(self, lengths, starts, width):
        positions, mask = begin(self, lengths, starts, width)
        return positions - 7, mask

    monkeypatch.setattr(compact_cache.CompactCache, "begin_row_passes", shifted)
    wrong = run("llava-onevision", "std:budget=all,draft_length=4", 2)
    assert torch.equal(wrong.sequences, right.sequences)
    assert acceptance(wrong, 4) < 0.6 * acceptance(right, 4)


def test_missing_entries_of_the_text_are_seen(monkeypatch):
    """The last guess of a pass was never read by a draft: without its dense entry even a full draft goes wrong."""
    right = run("llava-onevision", "std:budget=all,draft_length=4", 2)
    monkeypatch.setattr(compact_cache.CompactCache, "copy", lambda self, first, width, unread: None)
    wrong = run("llava-onevision", "std:budget=all,draft_length=4", 2)
    assert torch.equal(wrong.sequences, right.sequences)
    assert wrong.stats.tokens_per_pass < right.stats.tokens_per_pass


def test_the_draft_attends_to_as_few_entries_as_it_says(monkeypatch):
    seen = []
    saw = compact_cache.CompactCache.saw

    def look(self, layer, query, key, scaling):
        seen.append(key.shape[2])
        saw(self, layer, query, key, scaling)

    monkeypatch.setattr(compact_cache.CompactCache, "saw", look)
    fed = asked("llava-onevision")
    text = int((fed["input_ids"] != model_of("llava-onevision").config.video_token_id).sum())
    run("llava-onevision", "std:budget=8,draft_length=4")
    assert min(seen) == text - 1 + 8 + 1 and max(seen) <= text + 8 + NEW + 4  # guesses go on behind the end


# --------------------------------------------------------------------------------------------------------------- manners


def test_a_choice_is_made_anew_only_when_guesses_are_refused(monkeypatch):
    made = []
    choose = sparse_draft.SparseDraft._choose
    monkeypatch.setattr(sparse_draft.SparseDraft, "_choose", lambda self: (made.append(1), choose(self))[1])
    run("llava-onevision", "std:budget=all,draft_length=4,refresh=0.7")
    assert len(made) == 1
    run("llava-onevision", "std:budget=2,draft_length=4,refresh=0.7")
    assert len(made) > 3


def test_the_model_is_left_as_it_was():
    model = model_of("llava-onevision")
    before = model.config.get_text_config()._attn_implementation, model.config._attn_implementation
    run("llava-onevision", "std:budget=8,refresh=1")
    assert (model.config.get_text_config()._attn_implementation, model.config._attn_implementation) == before
    assert before == ("sdpa", "sdpa")


def test_eager_attention_is_refused_in_one_line():
    model = model_of("llava-onevision")
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(StrategyError, match="load the model with 'sdpa'"):
            run("llava-onevision", "std:budget=8")
        arms = run("llava-onevision", "ucb-spec").stats.arms
        assert list(arms) == ["ar", "prompt-lookup", "token-recycling"], "a bandit goes without it, unless it was named"
        assert model.config.get_text_config()._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")


def test_models_of_pictures_refuse_it():
    with pytest.raises(StrategyError, match="VideoLLMPipeline or generate_fn"):
        class_pipeline()(class_labels=1, decoder="std")


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0},
        {"budget": -1},
        {"budget": "some"},
        {"budget": 1.5},
        {"draft_length": 0},
        {"policy": "best"},
        {"refresh": -1},
        {"coupling": "none"},
        {"draft_length": 9, "pass_tokens": 9},
    ],
)
def test_bad_options_are_one_clear_error(options):
    with pytest.raises(StrategyError):
        arsd.SparseToDense(**options)


def test_it_is_a_strategy_like_all_others(tmp_path):
    strategy = arsd.parse_strategy("std:budget=256,draft_length=5,policy=h2o,refresh=0.7")
    strategy.save_pretrained(tmp_path)
    assert str(arsd.SparseToDense.from_pretrained(tmp_path)) == str(strategy) and strategy.lossless and strategy.seed_exact


def test_threads_that_share_a_model_do_not_see_each_other():
    """The implementation is switched while a pass is looked at; nobody else may take it for the model's own."""
    texts: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            texts[number] = [run("llava-onevision", "std:budget=8,draft_length=3").sequences for _ in range(3)]
        except Exception as error:  # told below
            texts[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    plain = generated("llava-onevision", 1)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(found, list) and all(torch.equal(text, plain) for text in found) for found in texts.values()), (
        texts
    )
    assert model_of("llava-onevision").config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {}])
def test_a_bandit_leaves_out_trees_where_chains_are_needed(options):
    plain = model_of("llava-onevision").generate(**asked("llava-onevision"), max_new_tokens=NEW, do_sample=False, **options)
    how = generate_fn("ucb-spec", recheck=None if options else 0.01)
    out = run("llava-onevision", how, **options)
    assert torch.equal(out.sequences, plain)
    assert "token-recycling" not in out.stats.arms and "std:budget=256,draft_length=3" in out.stats.arms
    assert "token-recycling" in run("llava-onevision", "ucb-spec").stats.arms
