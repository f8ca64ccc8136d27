"""RowCache through a stock decoder equals recomputation from scratch, whatever was written and forgotten before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from arsd.cache import STEP, RowCache, harmless_step

LAYERS, HEADS, KV_HEADS, WIDTH, SIZE = 2, 4, 2, 32, 40
ATTENTION = ["eager", "sdpa"]


def model_of(attention: str, kv_heads: int = KV_HEADS) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaModel(config).double().eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    return model


def cache_of(batch: int, hidden: torch.Tensor | None = None, kv_heads: int = KV_HEADS) -> RowCache:
    return RowCache(LAYERS, batch, kv_heads, SIZE, WIDTH // HEADS, torch.float64, hidden=hidden)


def tokens_of(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: LlamaModel, cache: RowCache, tokens: torch.Tensor) -> torch.Tensor:
    positions, mask = cache.begin(tokens.shape[1])
    out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.last_hidden_state


@torch.no_grad()
def recomputed(model: LlamaModel, tokens: torch.Tensor, first: int = 0) -> torch.Tensor:
    """No cache at all: the hidden states [T, D] of one sequence whose first token stands at ``first``."""
    positions = torch.arange(first, first + len(tokens))[None]
    return model(input_ids=tokens[None], position_ids=positions, use_cache=False).last_hidden_state[0]


def close(got: torch.Tensor, expected: torch.Tensor, attention: str = "sdpa") -> None:
    """To 1e-10; transformers' eager attention takes its softmax in float32 whatever the model's type."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 if attention == "sdpa" else 2e-6)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS, 1])
def test_ragged_writes_and_rollbacks_with_junk_equal_recomputation(attention: str, kv_heads: int):
    """Three rows read their own text at their own speed; a pass feeds some right tokens, then junk, which is forgotten."""
    model, cache = model_of(attention, kv_heads), cache_of(3, kv_heads=kv_heads)
    text, generator = tokens_of(3, SIZE), torch.Generator().manual_seed(2)
    expected = torch.stack([recomputed(model, row) for row in text])
    lengths = torch.zeros(3, dtype=torch.int64)
    for width in (5, 1, 8, 3, 8, 8, 2, 6):
        right = torch.randint(0, width + 1, (3,), generator=generator)
        right = torch.minimum(right, torch.tensor([SIZE - 12, SIZE - 9, SIZE - 10]) - lengths).clamp_min(0)
        slots = torch.arange(width)
        fed = text.gather(1, lengths[:, None] + slots)
        junk = torch.randint(0, 50, fed.shape, generator=generator)
        known = slots < right[:, None]
        hidden = feed(model, cache, torch.where(known, fed, junk))
        for b in range(3):
            close(hidden[b, : right[b]], expected[b, lengths[b] : lengths[b] + right[b]], attention)
        lengths = lengths + right
        cache.rollback(lengths)
    assert len(set(lengths.tolist())) == 3 and int(lengths.min()) > 10


@pytest.mark.parametrize("attention", ATTENTION)
def test_one_token_at_a_time_equals_transformers_dynamic_cache(attention: str):
    model, cache, dynamic = model_of(attention), cache_of(2), DynamicCache()
    text = tokens_of(2, 12)
    for n in range(12):
        ours = feed(model, cache, text[:, n : n + 1])
        cache.rollback(torch.full((2,), n + 1))
        with torch.no_grad():
            theirs = model(input_ids=text[:, n : n + 1], past_key_values=dynamic, use_cache=True).last_hidden_state
        close(ours, theirs, attention)


@pytest.mark.parametrize("attention", ATTENTION)
def test_row_may_go_back_to_any_length_and_read_on_from_there(attention: str):
    model, cache, text = model_of(attention), cache_of(1), tokens_of(1, 30)
    feed(model, cache, text[:, :20])
    for length in (17, 3, 0, 11):
        other = torch.cat([text[:, :length], tokens_of(1, 6, seed=length)], dim=1)
        cache.rollback(torch.tensor([length]))
        close(feed(model, cache, other[:, length:])[0], recomputed(model, other[0])[length:], attention)
        cache.rollback(torch.tensor([0]))
        feed(model, cache, text[:, :20])


@pytest.mark.parametrize("attention", ATTENTION)
def test_nothing_is_ever_reallocated_and_the_mask_buffer_is_reused(attention: str):
    model, cache, text = model_of(attention), cache_of(2), tokens_of(2, SIZE)
    before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    masks = set()
    for start in range(0, 24, 4):
        feed(model, cache, text[:, start : start + 4])
        masks.add(cache.begin(4)[1].data_ptr())
        cache.rollback(torch.tensor([start + 4, start + 1]))
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == before
    assert len(masks) == 1
    assert all(layer.keys.shape[2] == SIZE for layer in cache.layers)


def test_committed_entries_are_never_touched_again():
    model, cache, text = model_of("sdpa"), cache_of(2), tokens_of(2, SIZE)
    feed(model, cache, text[:, :10])
    cache.rollback(torch.tensor([6, 9]))

    def committed() -> torch.Tensor:
        rows = [x[b, :, :length] for x in (cache.layers[0].keys, cache.layers[1].values) for b, length in ((0, 6), (1, 9))]
        return torch.cat([row.flatten() for row in rows])

    kept = committed()
    feed(model, cache, text[:, 10:18])
    assert torch.equal(committed(), kept)


@pytest.mark.parametrize("attention", ATTENTION)
def test_hidden_slots_are_as_good_as_absent(attention: str):
    """Rows with 0, 2 and 5 padded slots in front: what stands in them changes nothing, as if they were not there."""
    model, padded = model_of(attention), (0, 2, 5)
    hidden = torch.zeros(3, SIZE, dtype=torch.bool)
    for b, count in enumerate(padded):
        hidden[b, :count] = True
    text, results, ragged = tokens_of(3, 14), [], torch.tensor([8, 7, 6])
    for filler in (0, 33):
        cache, fed = cache_of(3, hidden), text.clone()
        fed[hidden[:, :14]] = filler
        first = feed(model, cache, fed[:, :8])
        cache.rollback(ragged)
        feed(model, cache, tokens_of(3, 4, seed=9))  # junk, forgotten again
        cache.rollback(ragged)
        rest = feed(model, cache, fed.gather(1, ragged[:, None] + torch.arange(5)))
        results.append(torch.cat([first[:, 5:6], rest], dim=1))
        assert bool(torch.isfinite(first).all())
    assert torch.equal(*results)
    for b, count in enumerate(padded):
        start = 8 - b - count
        close(results[0][b, 1:], recomputed(model, text[b, count:], count)[start : start + 5], attention)


def test_hidden_slots_that_are_none_change_nothing():
    cache = cache_of(2, torch.zeros(2, SIZE, dtype=torch.bool))
    positions, mask = cache.begin(3)
    assert mask.shape == (2, 1, 3, SIZE) and positions.tolist() == [[0, 1, 2]] * 2
    assert bool(((mask == 0) == (torch.arange(SIZE) <= positions[:, None, :, None])).all())


def test_finite_junk_behind_a_row_does_not_reach_it():
    model, cache, text = model_of("sdpa"), cache_of(1), tokens_of(1, 12)
    feed(model, cache, text[:, :6])
    cache.rollback(torch.tensor([4]))
    for layer in cache.layers:
        layer.keys[:, :, 4:] = 1e30
        layer.values[:, :, 4:] = -1e30
    close(feed(model, cache, text[:, 4:9])[0], recomputed(model, text[0, :9])[4:])


@pytest.mark.parametrize("hidden", [False, True])
def test_slots_behind_the_farthest_row_may_be_left_out(hidden: bool):
    """The attended part of the buffers gives the same as all of them, ragged rows and padding included."""
    mask = torch.zeros(2, SIZE, dtype=torch.bool)
    mask[1, :3] = hidden
    text, results = tokens_of(2, 20), []
    for attended in (None, 26, 14):
        model, cache = model_of("sdpa"), cache_of(2, mask)
        feed(model, cache, text[:, :12])
        cache.rollback(torch.tensor([10, 6]))
        positions, bias = cache.begin(4, attended=attended)
        assert bias.shape[-1] == cache.attended == (attended or SIZE)
        with torch.no_grad():
            fed = text.gather(1, positions)
            out = model(input_ids=fed, attention_mask=bias, position_ids=positions, past_key_values=cache, use_cache=True)
        results.append(out.last_hidden_state)
    close(results[1], results[0])
    close(results[2], results[0])


def test_the_step_is_taken_only_where_no_bit_changes(monkeypatch: pytest.MonkeyPatch):
    shape = (2, 4, 2, 3, 200, 8, torch.float64, "cpu")
    assert harmless_step(*shape[:4], STEP, *shape[5:]) is None, "nothing to leave out"
    assert harmless_step(*shape[:-1], "cuda:0") is None, "not measured there"
    real = torch.nn.functional.scaled_dot_product_attention

    def rounds_by_length(query, keys, values, mask):
        return real(query, keys, values, mask) * (1 + 1e-15 * keys.shape[2])

    harmless_step.cache_clear()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounds_by_length)
    assert harmless_step(*shape) is None
    harmless_step.cache_clear()
    monkeypatch.undo()
    assert harmless_step(*shape) in (STEP, None)


def test_a_call_leaves_no_buffers_behind():
    """Without the garbage collector: keys and values of a 7B model are gigabytes."""
    gc.collect()
    gc.disable()
    try:
        cache = RowCache(2, 2, 2, 16, 4, torch.float32)
        buffers = [weakref.ref(layer.keys) for layer in cache.layers]
        cache.begin(1)
        cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
        del cache
        assert [buffer() for buffer in buffers] == [None, None]
    finally:
        gc.enable()
