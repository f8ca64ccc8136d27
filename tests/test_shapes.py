"""A pass has one shape, nothing of the cache is copied, and the study of shapes sees it when bits depend on the place."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_pipeline import TOKENS, VOCAB, class_pipeline, hushed, seeded, text_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from arsd.decoding import CounterNoise, DecodeRequest, LawConfig, Laws, Setting, decode, parse_strategy
from arsd.shapes import probe, study_shape

PROMPTS = ["red apple", "a pear", "dog face", "blue heart", "green pear"]


def target_of(batch: int, pass_tokens: int, dtype: torch.dtype = torch.float64):
    pipe = hushed(class_pipeline()).to(dtype)
    conditions = pipe.encode_inputs(class_labels=[2] * batch)
    return pipe.target_maker(conditions)(pass_tokens, batch)


TOKEN_IDS = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("batch", "pass_tokens"), [(1, 1), (1, 8), (3, 5), (2, 16)])
def test_a_slot_gives_the_same_law_wherever_it_stands(batch, pass_tokens):
    report = study_shape(target_of(batch, pass_tokens), TOKEN_IDS, pass_tokens, [1, 6, TOKENS - 1])
    assert max(report.places, report.rows, report.everywhere) < 1e-12, "the study itself feeds what it should"
    other = study_shape(target_of(1, 1), TOKEN_IDS, 1, [1, 6, TOKENS - 1])
    torch.testing.assert_close(report.reference, other.reference, rtol=0, atol=1e-12)


def test_the_study_sees_a_law_that_depends_on_the_place_or_the_row():
    target = target_of(2, 4)
    original = target.forward

    def tilted(by_place: float, by_row: float):
        def forward(tokens, lengths, starts):
            logits = original(tokens, lengths, starts)
            logits[..., 0] += by_place * torch.arange(tokens.shape[1]) + by_row * torch.arange(len(tokens))[:, None]
            return logits

        return forward

    for by_place, by_row in ((1e-6, 0.0), (0.0, 1e-6)):
        target.forward = tilted(by_place, by_row)
        report = study_shape(target, TOKEN_IDS, 4, [6, 10])
        assert not report.holds and (report.places > 5e-7) == (by_place > 0) and (report.rows > 5e-7) == (by_row > 0)


def test_a_probe_follows_the_arithmetic_and_nothing_else():
    prints = {probe(target_of(2, 4), TOKENS, 4) for _ in range(2)}
    assert len(prints) == 1
    assert probe(target_of(2, 4, torch.float32), TOKENS, 4) not in prints
    assert probe(target_of(2, 5), TOKENS, 5) not in prints


class CacheTouches(TorchDispatchMode):
    """Counts the operations that read the key/value buffers, and the bytes of what they produce outside of them."""

    def __init__(self, cache) -> None:
        super().__init__()
        self.storages = {x.untyped_storage().data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)}
        self.made: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if any(self.is_cache(x) for x in args):
            results = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)]
            self.made[name] += sum(x.numel() * x.element_size() for x in results if not self.is_cache(x))
            if name.endswith("_"):
                self.written[name] += args[-1].numel() * args[-1].element_size()
        return out

    def is_cache(self, x) -> bool:
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.storages


@pytest.mark.parametrize("decoder", ["ar", "sjd:window=4", "sjd:window=4,coupling=maximal", "sjd:window=3,pass_tokens=6"])
def test_not_one_byte_of_the_cache_is_copied_beyond_the_new_entries(decoder):
    """Refilled rows included: what reads the buffers is attention, what writes them is one scatter of the pass's entries."""
    pipe = hushed(text_pipeline())
    conditions = pipe.encode_inputs(prompt=PROMPTS)
    noise, grammar = CounterNoise(list(range(5)), [0] * 5, batch=2), pipe.make_grammar()
    parts = parse_strategy(decoder).build(Setting(2, TOKENS, 4, grammar, noise, torch.device("cpu")))
    target = pipe.target_maker(conditions)(parts.pass_tokens, 2)
    with CacheTouches(target.cache) as touches:
        request = DecodeRequest(TOKENS, 4, pictures=5)
        stats = decode(target, parts, Laws(LawConfig(2.0), grammar), noise, request, 2).stats
    readers = {name for name, size in touches.made.items() if size}
    assert readers and all("attention" in name for name in readers), touches.made
    assert set(touches.written) == {"index_copy_"}
    layers, heads, width = 2, 2, 32
    one_token = 2 * layers * heads * width * 4 * 2 * 2  # keys and values, two rows, two guidance streams, float32
    passes = stats.forward_passes * parts.pass_tokens
    prefill = stats.prefill_passes * (parts.pass_tokens if parts.pass_tokens > 1 else conditions.condition.shape[2] - 1)
    assert touches.written["index_copy_"] == (passes + prefill) * one_token


def test_the_counter_of_touches_can_fail(monkeypatch):
    from arsd.cache import RowCacheLayer

    original = RowCacheLayer.update

    def copying(self, *args, **kwargs):
        keys, values = original(self, *args, **kwargs)
        return keys.clone(), values

    monkeypatch.setattr(RowCacheLayer, "update", copying)
    with pytest.raises(AssertionError):
        test_not_one_byte_of_the_cache_is_copied_beyond_the_new_entries("sjd:window=4")


def test_a_picture_is_the_same_in_every_row_of_a_shape():
    """float32, where it is measured and not promised: one prompt and seed in every row of one batch gives one picture."""
    pipe = hushed(text_pipeline())
    for decoder in ("ar:pass_tokens=8", "sjd:window=8"):
        out = pipe(["dog face"] * 6, generator=[seeded(4) for _ in range(6)], decoder=decoder, output_type="latent")
        assert len({tuple(row.tolist()) for row in out.tokens}) == 1
