"""Near-ties: counted where they are, greedily too, and decided again in a pass of one token where that is asked for."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arsd import generate_fn
from arsd.decoding import loop
from arsd.errors import StrategyError

NEW = 48


def model_of(dtype: torch.dtype, seed: int = 0, width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.08, **size)
    return LlamaForCausalLM(config).to(dtype).eval()


def text_of(model, strategy: str, recheck: float | None = None, **options):
    ids = torch.randint(5, 300, (4, 40), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    how = {"custom_generate": generate_fn(strategy, recheck=recheck), "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, **how)


def differences(models, strategy: str, recheck: float | None, **options) -> tuple[int, int, int]:
    """Rows that part from one-token decoding, near-ties and rechecks, over several models."""
    parted = ties = again = 0
    for model in models:
        plain, out = text_of(model, "ar", **options), text_of(model, strategy, recheck, **options)
        parted += int((plain.sequences != out.sequences).any(1).sum())
        ties, again = ties + sum(out.stats.near_ties), again + out.stats.rechecked
    return parted, ties, again


@pytest.fixture(scope="module")
def halves():
    return [model_of(torch.bfloat16, seed, 768) for seed in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "seed": 3}])
def test_in_bfloat16_near_ties_are_counted_and_passes_of_one_token_give_plain_decoding(halves, options):
    """A margin that takes in every token leaves nothing of the wide passes: their entries are written anew, too."""
    strategy = "std:budget=8,draft_length=5"
    parted, ties, again = differences(halves, strategy, None, **options)
    assert parted > 0 and ties > 0 and again == 0  # else there is nothing to cure
    assert differences(halves, strategy, 1e9, **options)[0] == 0


@pytest.mark.slow
def test_a_margin_decides_a_share_of_the_tokens_again(halves):
    """Entries before a near-tie still come from wide passes, so that a margin helps without being a promise."""
    found = [differences(halves, "std:budget=8,draft_length=5", margin) for margin in (None, 0.1, 1.0)]
    assert found[0][2] < found[1][2] < found[2][2] < 4 * 4 * NEW
    assert found[2][0] < found[0][0]


@pytest.mark.parametrize("strategy", ["sjd:window=6", "std:budget=8,draft_length=5", "prompt-lookup:draft_length=5"])
@pytest.mark.parametrize("margin", [0.05, 1e9])
def test_in_float32_the_text_is_the_same_at_any_margin(strategy, margin):
    model = model_of(torch.float32)
    plain = text_of(model, "ar", do_sample=True, seed=4)
    out = text_of(model, strategy, margin, do_sample=True, seed=4)
    assert torch.equal(out.sequences, plain.sequences)
    if margin > 1:  # every token is decided again, in a pass of its own
        assert out.stats.rechecked == 4 * NEW and out.stats.tokens_per_pass == 1
        assert out.stats.pass_shapes[1] == NEW and out.stats.forward_passes == 2 * NEW


def test_passes_of_one_token_decide_and_not_the_wide_ones(monkeypatch):
    """A wide pass that is always wrong: what is decided again is right all the same, so the recheck really asks anew."""
    model = model_of(torch.float32)
    plain = text_of(model, "ar")
    seen = loop.recheck

    def spoilt(margin, step, law, verdict, *rest):
        verdict.tokens[:, 0] = (verdict.tokens[:, 0] + 1) % 300
        return seen(margin, step, law, verdict, *rest)

    monkeypatch.setattr(loop, "recheck", spoilt)
    out = text_of(model, "sjd:window=4", 1e9)
    assert torch.equal(out.sequences, plain.sequences)


def test_greedy_near_ties_are_counted():
    model = model_of(torch.float32)
    with torch.no_grad():
        model.lm_head.weight[150:] = model.lm_head.weight[:150]  # every id has a twin
    assert text_of(model, "ar").stats.near_ties == [NEW] * 4
    assert sum(text_of(model_of(torch.float32), "ar").stats.near_ties) < NEW


def test_it_goes_with_seed_exact_chains_only():
    with pytest.raises(StrategyError, match="seed-exact"):
        generate_fn("sjd:coupling=maximal", recheck=0.1)
    with pytest.raises(StrategyError, match="recheck must be a number"):
        generate_fn("sjd", recheck=-1)
    with pytest.raises(StrategyError, match="trees"):
        text_of(model_of(torch.float32), "token-recycling", 0.1)
