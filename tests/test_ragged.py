"""Ragged batches: prompts, seeds, lengths and strategies mix, freed rows take waiting pictures, order is kept."""

from __future__ import annotations

import pytest
import torch
from tiny_pipeline import TOKENS, class_pipeline, hushed, one_clear_line, seeded, text_pipeline

from arsd import SJD, Autoregressive
from arsd.decoding import CounterNoise, DecodeRequest, LawConfig, Laws, Setting, build_parts, decode
from arsd.errors import InputError, NonFiniteLogitsError, StrategyError

PROMPTS = ["red apple", "a pear", "dog face", "blue heart", "green pear", "red heart", "face"]
STRATEGIES = ["ar", "sjd:window=4", "sjd:window=7,init=left", "sjd:window=2,init=above", "sjd:window=16,init=random"]


@pytest.fixture(scope="module")
def pipe():
    """In float64, where equality is promised without conditions."""
    return hushed(text_pipeline()).to(torch.float64)


@pytest.fixture(scope="module")
def alone(pipe):
    """Each prompt by itself, plain AR, one-token passes."""
    rows = [pipe(p, generator=seeded(i), decoder="ar", output_type="latent").tokens[0] for i, p in enumerate(PROMPTS)]
    assert len({tuple(row.tolist()) for row in rows}) == len(PROMPTS)
    return torch.stack(rows)


def generators(count: int = len(PROMPTS)) -> list[torch.Generator]:
    return [seeded(i) for i in range(count)]


@pytest.mark.parametrize("decoder", ["ar", "ar:pass_tokens=5", "sjd:window=4", "sjd:window=3,pass_tokens=8", "sjd:window=9"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 50])
def test_a_queue_gives_every_picture_as_if_it_were_alone_in_the_order_asked(pipe, alone, decoder, batch_size):
    out = pipe(PROMPTS, generator=generators(), decoder=decoder, batch_size=batch_size, output_type="latent")
    assert torch.equal(out.tokens, alone)
    assert out.stats.tokens == [TOKENS] * len(PROMPTS) and out.stats.batch == min(batch_size, len(PROMPTS))


@pytest.mark.parametrize("coupling", ["gumbel", "maximal", "gumbel-rejection", "independent"])
@pytest.mark.parametrize("init", ["uniform", "left", "above", "random"])
def test_a_refilled_row_starts_afresh_for_every_coupling(pipe, coupling, init):
    """The draws of a picture do not depend on who had its row before, nor on when it got it."""
    strategy = SJD(window=5, coupling=coupling, init=init)
    queued = pipe(PROMPTS, generator=generators(), decoder=strategy, batch_size=2, output_type="latent")
    for i, prompt in enumerate(PROMPTS):
        single = pipe(prompt, generator=seeded(i), decoder=strategy, output_type="latent")
        assert torch.equal(single.tokens[0], queued.tokens[i]), i
        assert single.stats.row_passes[0] == queued.stats.row_passes[i], i


def test_freed_rows_are_refilled_while_the_others_go_on(pipe):
    out = pipe(PROMPTS, generator=generators(), decoder="sjd:window=6", batch_size=2, output_type="latent", trace=True)
    held = [turn.pictures for turn in out.trace]
    assert held[0] == [0, 1] and {p for row in held for p in row} == set(range(len(PROMPTS)))
    changes = [
        sum(a != b for a, b in zip(before, after, strict=True)) for before, after in zip(held, held[1:], strict=False)
    ]
    assert max(changes) == 1 and sum(changes) == len(PROMPTS) - 2, "one row changes hands, the other goes on"
    alone_each = sum(out.stats.row_passes)
    assert out.stats.forward_passes < alone_each, "passes are shared"


def test_every_pass_has_one_shape_however_the_rows_stand(pipe, monkeypatch):
    from arsd.models.target import DecoderTarget

    shapes, original = set(), DecoderTarget._run

    def spy(self, embeds, idle=None, attended=None):
        shapes.add((embeds.reshape(-1, *embeds.shape[2:]).shape[:2], self.cache.get_max_length()))
        return original(self, embeds, idle, attended)

    monkeypatch.setattr(DecoderTarget, "_run", spy)
    pipe(PROMPTS, generator=generators(), decoder="sjd:window=6", batch_size=3, output_type="latent")
    assert [shape for shape, _ in shapes] == [(6, 6)], "three rows in two guidance streams, six tokens, prefill included"


def test_strategies_mix_in_one_batch(pipe, alone):
    chosen = [STRATEGIES[i % len(STRATEGIES)] for i in range(len(PROMPTS))]
    for batch_size in (None, 3, 1):
        out = pipe(PROMPTS, generator=generators(), decoder=chosen, batch_size=batch_size, output_type="latent")
        assert torch.equal(out.tokens, alone), batch_size
        assert [str(d) for d in out.decoders] == chosen
        assert out.stats.row_passes[0] == out.stats.row_passes[5] == TOKENS, "plain AR rows take one token per pass"
        assert max(out.stats.row_passes[4:5]) < TOKENS


def test_rows_of_every_coupling_mix_and_each_decodes_as_in_a_batch_of_its_own(pipe):
    chosen = [f"sjd:window={4 + i % 3},coupling={c}" for i, c in enumerate(("gumbel", "maximal", "independent") * 2)]
    chosen.append("sjd:window=5,coupling=gumbel-rejection,init=left")
    mixed = pipe(PROMPTS, generator=generators(), decoder=chosen, batch_size=4, output_type="latent")
    for i, (prompt, decoder) in enumerate(zip(PROMPTS, chosen, strict=True)):
        single = pipe(prompt, generator=seeded(i), decoder=decoder, output_type="latent")
        assert torch.equal(single.tokens[0], mixed.tokens[i]), decoder
        assert single.stats.row_passes[0] == mixed.stats.row_passes[i], decoder


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("names", [["ar"], ["sjd:window=6"], ["ar", "sjd:window=4", "sjd:window=6,coupling=maximal"]])
def test_lengths_mix_and_short_pictures_end_where_they_should(pipe, alone, batch, names):
    lengths = [TOKENS, 3, 1, 9, TOKENS, 5]
    conditions = pipe.encode_inputs(prompt=PROMPTS[:6])
    seeds = [int(torch.randint(2**63 - 1, (), generator=seeded(i))) for i in range(6)]
    noise, grammar = CounterNoise(seeds, [0] * 6, batch=batch), pipe.make_grammar()
    strategies = [pipe.check_decoder(names[i % len(names)])[0] for i in range(6)]
    parts = build_parts(strategies, Setting(batch, TOKENS, 4, grammar, noise, torch.device("cpu")))
    target = pipe.target_maker(conditions)(parts.pass_tokens, batch)
    request = DecodeRequest(lengths, 4, pictures=6, log_probs=True)
    result = decode(target, parts, Laws(LawConfig(2.0), grammar), noise, request, batch)
    assert result.stats.tokens == lengths
    for i, length in enumerate(lengths):
        if strategies[i].seed_exact:
            assert torch.equal(result.tokens[i, :length], alone[i, :length])
        assert not result.tokens[i, length:].any() and bool((result.log_probs[i, :length] < 0).all())


def test_captions_of_other_lengths_and_their_padding_follow_their_row(pipe, alone):
    """The picture that is refilled into a row has more padding, then less, than the one before it."""
    order = [3, 1, 6, 0, 5, 2, 4]
    prompts, sources = [PROMPTS[i] for i in order], [seeded(i) for i in order]
    out = pipe(prompts, generator=sources, decoder="sjd:window=5", batch_size=2, output_type="latent")
    assert torch.equal(out.tokens, alone[order])


def test_class_labels_queue_too():
    pipe = hushed(class_pipeline()).to(torch.float64)
    labels = [0, 4, 2, 2, 1]
    out = pipe(class_labels=labels, generator=generators(5), decoder="sjd:window=5", batch_size=2, output_type="latent")
    for i, label in enumerate(labels):
        single = pipe(class_labels=label, generator=seeded(i), decoder="ar", output_type="latent")
        assert torch.equal(single.tokens[0], out.tokens[i])


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0, "all"])
def test_a_batch_size_that_is_none_is_one_clear_line(pipe, batch_size):
    with pytest.raises(InputError) as error:
        pipe(PROMPTS, batch_size=batch_size)
    one_clear_line(error.value, "batch_size must be at least 1")


def test_a_wrong_number_of_decoders_is_one_clear_line(pipe):
    with pytest.raises(InputError) as error:
        pipe(PROMPTS, decoder=["ar", "sjd"])
    one_clear_line(error.value, "got 2 decoders for 7 pictures")


def test_a_drafter_that_cannot_begin_another_picture_is_one_clear_line(pipe, monkeypatch):
    from arsd.decoding.drafters import NoDraft

    monkeypatch.delattr(NoDraft, "join")
    assert len(pipe(PROMPTS[:2], decoder="ar", output_type="latent").tokens) == 2
    with pytest.raises(StrategyError) as error:
        pipe(PROMPTS, decoder="ar", batch_size=2)
    one_clear_line(error.value, "leave out batch_size")


def test_interrupting_a_queue_keeps_what_is_done(pipe, alone):
    def stop(pipe, step, done, tensors):
        pipe._interrupt = done >= 3 * TOKENS
        return {}

    options = {"decoder": "sjd:window=4", "batch_size": 2, "callback_on_step_end": stop, "output_type": "latent"}
    out = pipe(PROMPTS, generator=generators(), **options)
    assert sum(out.stats.tokens) >= 3 * TOKENS and 0 in out.stats.tokens and out.stats.tokens[0] == TOKENS
    for i, length in enumerate(out.stats.tokens):
        assert torch.equal(out.tokens[i, :length], alone[i, :length])


def test_a_model_that_breaks_in_a_queue_names_the_picture_and_hands_over_the_others(pipe, alone, monkeypatch):
    from arsd.models.target import DecoderTarget

    original = DecoderTarget.forward

    def breaks(self, tokens, lengths, starts):
        logits = original(self, tokens, lengths, starts)
        bad = (self.pictures == 4) & (lengths >= 6)
        return torch.where(bad[:, None, None], torch.nan, logits)

    monkeypatch.setattr(DecoderTarget, "forward", breaks)
    with pytest.raises(NonFiniteLogitsError, match="in picture 4 after") as error:
        pipe(PROMPTS, generator=generators(), decoder="sjd:window=4", batch_size=2)
    lengths = error.value.lengths
    assert lengths[0] == TOKENS and 6 <= lengths[4] < TOKENS and len(lengths) == len(PROMPTS)
    for i, length in enumerate(lengths):
        assert torch.equal(error.value.tokens[i, :length], alone[i, :length])


def test_plain_ar_is_what_a_window_of_one_is(pipe):
    """Down to the parts: an automatic window of 1 must not cost what guessing costs."""
    setting = Setting(1, TOKENS, 4, pipe.make_grammar(), CounterNoise([0], [0]), torch.device("cpu"))
    kinds = [[type(x) for x in (p.drafter, p.rule)] for p in (s.build(setting) for s in (SJD(window=1), Autoregressive()))]
    assert kinds[0] == kinds[1]
