"""The cost model: formulas against numbers worked out by hand and against published tables, sizes against real modules."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_pipeline import one_clear_line
from video_llms import KINDS, tiny

from arsd import PassCosts
from arsd.decoding.costs import BANDWIDTH, OVERHEAD, best_length, chance_of, expected_tokens, speedup
from arsd.errors import InputError

QWEN2_7B = {"weights": 14.1e9, "entry": 2 * 28 * 4 * 128 * 2}


def llama(**options) -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes, **options)
    return transformers.LlamaForCausalLM(config)


def test_tokens_of_a_round_by_hand():
    assert expected_tokens(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens(0.0, 7) == 1 and expected_tokens(0.9, 0) == 1 and expected_tokens(1.0, 7) == 8
    assert speedup(0.5, 3, 0.25, 1.25) == 1.875 / 2.0
    assert best_length(0.5, 0.25) == 1 and best_length(0.9, 0.01) > best_length(0.9, 0.3)  # 1.2 > 1.17 > 1.07
    assert best_length(0.9, 0.0, longest=5) == 5


@pytest.mark.parametrize(
    ("share", "p", "tokens"), [(0.478, 0.847, 5.3), (0.529, 0.869, 5.8), (0.734, 0.937, 7.6), (0.818, 0.960, 8.4)]
)
def test_acceptance_of_nine_guesses_tells_the_chance_of_one(share: float, p: float, tokens: float):
    assert chance_of(share, 9) == pytest.approx(p, abs=6e-4)
    assert expected_tokens(p, 9) == pytest.approx(tokens, abs=0.05)


@pytest.mark.parametrize(
    ("rows", "context", "p", "best", "length", "nine"),
    [(1, 100_000, 0.9, 1.12, 2, 0.88), (8, 25_000, 0.9, 1.27, 3, 1.06), (32, 25_000, 0.95, 2.36, 9, 2.36)],
)
def test_sparse_drafts_of_a_7b_model_pay_beyond_the_gate(rows, context, p, best, length, nine):
    """2-digit figures of a table made with another program: 1,024 entries kept, no overhead."""
    costs = PassCosts(**QWEN2_7B, rows=rows, context=context)
    guess = costs.draft_cost(1024)
    found = best_length(p, guess)
    assert found == length
    assert speedup(p, found, guess) == pytest.approx(best, abs=0.006)
    assert speedup(p, 9, guess) == pytest.approx(nine, abs=0.006)
    assert costs.pressure == pytest.approx(rows * context * 57_344 / 14.1e9)


def test_bytes_of_dense_and_sparse_passes():
    costs = PassCosts(weights=1000, entry=2, rows=3, context=50, overhead=100, bandwidth=1e3)
    assert costs.dense() == 1000 + 3 * 2 * 50 + 100 and costs.dense(7) == costs.dense() + 42
    assert costs.sparse(10, 7) == 1000 + 3 * 2 * 17 + 100
    assert costs.sparse(500) == costs.dense(), "no more than all can be kept"
    assert costs.draft_cost(10) == 1160 / 1400 and costs.seconds() == 1.4
    with pytest.raises(InputError) as error:
        PassCosts(1000, 2).seconds()
    one_clear_line(error.value, "bandwidth")


def test_wide_passes_cost_the_same_unless_they_were_measured():
    assert PassCosts(1, 0).verify_cost(64) == 1
    costs = PassCosts(1, 0, wide=((16, 1.5), (8, 1.1), (1, 1.0)))
    assert [costs.verify_cost(tokens) for tokens in (1, 8, 16)] == [1, 1.1, 1.5]
    assert costs.verify_cost(12) == pytest.approx(1.3) and costs.verify_cost(24) == pytest.approx(1.9)
    assert PassCosts(1, 0, wide=((1, 1.0),)).verify_cost(9) == 1


def test_a_fit_finds_overhead_and_bandwidth():
    costs = PassCosts(1e9, 1e5, rows=4)
    seconds = [(size, (size + 5e8) / 2e10) for size in (1e9, 2e9, 5e9)]
    fitted = costs.fitted(seconds)
    assert fitted.bandwidth == pytest.approx(2e10) and fitted.overhead == pytest.approx(5e8) and fitted.rows == 4
    for bad in (seconds[:1], [(1e9, 1.0), (2e9, 0.5)], []):
        with pytest.raises(InputError) as error:
            costs.fitted(bad)
        one_clear_line(error.value, "measure")


@pytest.mark.parametrize("tied", [False, True])
def test_the_sizes_of_a_model_are_those_of_its_layers_and_head(tied: bool):
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    costs = PassCosts.of_model(model, rows=3, context=70)
    layers = sum(p.numel() for p in model.model.layers.parameters()) + 32  # and the last norm
    assert costs.weights == 2 * (layers + 50 * 32), "the head is read whole, the embedding is not"
    assert costs.entry == 2 * 3 * 2 * 8 * 2 and (costs.rows, costs.context) == (3, 70)
    assert costs.bandwidth == BANDWIDTH["cpu"] and costs.overhead == pytest.approx(3 * OVERHEAD["cpu"] * BANDWIDTH["cpu"])
    own = PassCosts.of_model(model.float(), 1, 0, bandwidth=1e9, overhead_seconds=2.0)
    assert own.weights == 2 * costs.weights and own.entry == 2 * costs.entry and own.overhead == 2e9


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_at_pictures_is_no_part_of_a_pass(kind: str):
    model = tiny(kind)[0]
    costs, config = PassCosts.of_model(model, 1, 10), model.config.get_text_config(decoder=True)
    decoder = sum(p.numel() for name, p in model.get_decoder().named_parameters() if "embed_tokens" not in name)
    size = model.dtype.itemsize
    assert costs.weights == size * (decoder + config.vocab_size * config.hidden_size)
    assert costs.weights < size * sum(p.numel() for p in model.parameters())
    assert costs.entry == 2 * 2 * 2 * (config.hidden_size // 4) * size


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError) as error:
        PassCosts.of_model(torch.nn.Linear(2, 2), 1, 1)
    one_clear_line(error.value, "sizes")
