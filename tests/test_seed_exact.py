"""Seed-exact decoding gives plain AR's own tokens, one by one; and a row never depends on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from arsd.decoding import SJD, Autoregressive, Grammar, LawConfig
from arsd.exactness.tables import HashTarget, run
from arsd.exactness.worlds import IMAGES, INITS, LAWS, LENGTH, ROW, SEEDS, VOCAB, picture_grammar
from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.target import DecoderTarget

COUPLINGS = ("gumbel", "maximal", "gumbel-rejection", "independent")


def tokens_of(
    strategy, batch: int = 5, law: str = "plain", first_row: int = 0, grammar: Grammar | None = None
) -> torch.Tensor:
    config, rows = LAWS[law], slice(first_row, first_row + batch)
    target = HashTarget(VOCAB, LENGTH, batch, streams=2 if config.guidance_scale != 1 else 1)
    options = {"config": config, "grammar": grammar, "row_length": ROW}
    return run(target, strategy, seeds=SEEDS[rows], images=IMAGES[rows], **options).tokens


def test_seed_exact_output_equals_plain_ar_for_every_window_from_1_to_64():
    expected = tokens_of(Autoregressive(), batch=3)
    for window in range(1, 65):
        assert torch.equal(tokens_of(SJD(window=window), batch=3), expected), window


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("law", LAWS)
def test_seed_exact_output_equals_plain_ar_for_every_law_init_and_grammar(law: str, init: str):
    for grammar in (None, picture_grammar()):
        expected = tokens_of(Autoregressive(), law=law, grammar=grammar)
        for window in (2, 7, 20):
            assert torch.equal(tokens_of(SJD(window=window, init=init), law=law, grammar=grammar), expected), window
        if grammar is not None:
            ends = torch.arange(LENGTH) % ROW == ROW - 1
            assert torch.equal(expected == VOCAB - 1, ends.expand(5, -1))


@pytest.mark.parametrize("batch", range(1, 6))
def test_ragged_batches_of_mixed_seeds_equal_plain_ar(batch: int):
    expected = torch.cat([tokens_of(Autoregressive(), 1, first_row=row) for row in range(batch)])
    assert len({tuple(row.tolist()) for row in expected}) == batch
    assert torch.equal(tokens_of(SJD(window=8), batch), expected)


@pytest.mark.parametrize("pass_tokens", [16, 17, 64])
def test_padding_of_a_pass_changes_nothing(pass_tokens: int):
    expected = tokens_of(Autoregressive())
    assert torch.equal(tokens_of(Autoregressive(pass_tokens=pass_tokens)), expected)
    assert torch.equal(tokens_of(SJD(window=8, pass_tokens=pass_tokens)), expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("init", INITS)
def test_a_row_of_a_batch_equals_the_same_row_alone_for_every_coupling(init: str, coupling: str):
    strategy = SJD(window=8, coupling=coupling, init=init)
    together = tokens_of(strategy, law="top-k", grammar=picture_grammar())
    for row in range(5):
        alone = tokens_of(strategy, 1, "top-k", first_row=row, grammar=picture_grammar())
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_temperature_0_gives_the_most_likely_tokens_whatever_the_coupling(coupling: str):
    expected = tokens_of(Autoregressive(), law="temperature 0")
    assert torch.equal(expected, expected[:1].expand(5, -1))  # no seed matters
    assert torch.equal(tokens_of(SJD(window=8, coupling=coupling), law="temperature 0"), expected)


def test_other_seeds_and_images_give_other_tokens():
    rows = [tuple(row.tolist()) for row in tokens_of(Autoregressive())]
    assert len(set(rows)) == len(rows)


def test_draws_other_than_gumbel_differ_from_plain_ar_token_by_token():
    """Only the gumbel coupling promises plain AR's own tokens; if the others gave them too, the flag would mean nothing."""
    expected = tokens_of(Autoregressive())
    for coupling in COUPLINGS:
        strategy = SJD(window=8, coupling=coupling)
        assert strategy.lossless and strategy.seed_exact == torch.equal(tokens_of(strategy), expected)


GRID, PREFIX = 5, 4


@pytest.fixture(scope="module")
def llama() -> LlamaGenTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaGenTransformer(
            40, 32, 2, 4, 64, num_key_value_heads=2, grid=GRID, condition="text", condition_tokens=PREFIX, caption_dim=8
        )
        for parameter in model.parameters():
            parameter.data.normal_(std=0.25 if parameter.ndim == 1 else 0.35)
    return model.double().eval()


def llama_target(model: LlamaGenTransformer, attention: str, max_pass_tokens: int, rows: slice = slice(3)) -> DecoderTarget:
    """Three captions of 4, 1 and 2 real slots, left-padded, each with its null stream."""
    model.lm.model.config._attn_implementation = attention
    with torch.no_grad():
        features = torch.randn(3, PREFIX, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[rows]
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])[rows]
        condition = torch.stack([model.embed_captions(features, mask), model.embed_null_caption(len(mask))])
    padding = torch.stack([mask == 0, torch.zeros_like(mask, dtype=torch.bool)])
    decoder = model.lm.model
    return DecoderTarget(
        decoder,
        model.lm.lm_head,
        decoder.embed_tokens,
        condition,
        GRID**2,
        max_pass_tokens,
        padding if padding.any() else None,
    )


def llama_tokens(model: LlamaGenTransformer, strategy, attention: str = "eager", rows: slice = slice(3), **request):
    target = llama_target(model, attention, 16, rows)
    config = LawConfig(guidance_scale=2.0, top_k=20)
    row_numbers = list(range(3))[rows]
    seeds, images = [7, 7, 8], [0, 1, 0]
    options = {"seeds": [seeds[b] for b in row_numbers], "images": [images[b] for b in row_numbers], "row_length": GRID}
    return run(target, strategy, config=config, grammar=Grammar(GRID**2, target.vocab), **options, **request)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llamagen_decodes_plain_ar_tokens_in_every_window(llama: LlamaGenTransformer, attention: str):
    expected = llama_tokens(llama, Autoregressive(), attention).tokens
    assert len(expected.unique()) > 15
    for window in range(1, 17):
        init = INITS[window % 4]
        assert torch.equal(llama_tokens(llama, SJD(window=window, init=init), attention).tokens, expected), (window, init)
    assert torch.equal(llama_tokens(llama, SJD(window=6, pass_tokens=16), attention).tokens, expected)
    assert torch.equal(llama_tokens(llama, Autoregressive(pass_tokens=16), attention).tokens, expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_llamagen_rows_do_not_depend_on_their_neighbours(llama: LlamaGenTransformer, coupling: str):
    strategy = SJD(window=6, coupling=coupling)
    together = llama_tokens(llama, strategy).tokens
    for row in range(3):
        assert torch.equal(llama_tokens(llama, strategy, rows=slice(row, row + 1)).tokens[0], together[row]), row


def test_llamagen_log_probs_equal_one_teacher_forced_pass(llama: LlamaGenTransformer):
    result = llama_tokens(llama, SJD(window=6), log_probs=True)
    fed = torch.cat([torch.zeros(3, 1, dtype=torch.int64), result.tokens[:, :-1]], dim=1)
    target = llama_target(llama, "eager", GRID**2)
    target.prefill([-(PREFIX - 1)] * 3, 1)
    target.rollback(torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        conditional, unconditional = target.forward(fed, torch.zeros(3, dtype=torch.int64), [0, 0, 0])
    guided = unconditional + 2.0 * (conditional - unconditional)
    kept = guided.masked_fill(guided < guided.topk(20, dim=-1).values[..., -1:], -torch.inf)
    log_probs = torch.log_softmax(kept, dim=-1)
    chosen = log_probs.gather(-1, result.tokens[..., None])[..., 0]
    torch.testing.assert_close(result.log_probs.double(), chosen, rtol=0, atol=1e-5)
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    torch.testing.assert_close(result.entropies.double(), entropy, rtol=0, atol=1e-5)
