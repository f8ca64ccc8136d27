"""The tests of families and continuations can fail: each slip below is caught by the test that it is run under."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_continuation
import test_emu3
import test_families
import test_llamagen_published
import torch
from test_llamagen_published import files as files  # noqa: PLC0414  a fixture
from tiny_pipeline import hushed, text_pipeline

from arsd.decoding import laws
from arsd.errors import ArsdError
from arsd.models import liquid, target
from arsd.models.emu3 import Emu3Protocol, Emu35Protocol
from arsd.models.janus import JanusForImageGeneration, JanusProtocol
from arsd.models.raster import Raster
from arsd.models.token_images import CodeHead, TokenProtocol
from arsd.pipelines import prefix
from arsd.tokenizers import vqgan

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def caught(test: Any, *arguments: Any) -> None:
    with pytest.raises((AssertionError, ArsdError)):
        test(*arguments)


def logits_test(samples: Any, kind: str) -> None:
    test_families.test_logits_of_both_streams_are_the_published_ones_however_long_the_passes_are(samples, kind)


def test_codes_that_are_one_off(samples, monkeypatch):
    logits_test(samples, "lumina-mgpt")
    kept = CodeHead.__init__

    def shifted(self: Any, head: Any, ids: torch.Tensor, *rest: Any) -> None:
        kept(self, head, ids + 1, *rest)

    monkeypatch.setattr(CodeHead, "__init__", shifted)
    caught(logits_test, samples, "lumina-mgpt")


def test_tokens_that_are_fed_under_the_wrong_word(samples, monkeypatch):
    local = TokenProtocol.local_ids.fget
    monkeypatch.setattr(TokenProtocol, "local_ids", property(lambda self: local(self).roll(1)))
    caught(test_families.test_every_sequence_is_a_whole_picture_by_upstreams_rules, samples, "anole")


def test_padding_that_is_read(samples, monkeypatch):
    kept = target.DecoderTarget.__init__

    def seeing(self: Any, *arguments: Any, **options: Any) -> None:
        parts = list(arguments)
        parts[6] = None
        kept(self, *parts, **options)

    monkeypatch.setattr(target.DecoderTarget, "__init__", seeing)
    caught(logits_test, samples, "lumina-mgpt")


def test_a_grammar_whose_lines_are_one_too_long(samples, monkeypatch):
    def late(self: Raster) -> dict[int, int]:
        return {
            min(n + 1, self.num_tokens - 1): token
            for n, token in Raster.forced.func(self).items()  # type: ignore[attr-defined]
        }

    pipe = samples.sample("lumina-mgpt").load()
    monkeypatch.setattr(
        Raster,
        "grammar",
        lambda self, device="cpu": laws.Grammar(
            self.num_tokens, self.vocab, late(self), (torch.arange(self.vocab) < self.codes)[None], device=device
        ),
    )

    class One:
        def sample(self, kind: str) -> Any:
            return samples.sample(kind)

        def pipe(self, kind: str) -> Any:
            return pipe

    caught(test_families.test_every_sequence_is_a_whole_picture_by_upstreams_rules, One(), "lumina-mgpt")


def test_given_tokens_that_are_not_read(monkeypatch):
    pipe = hushed(text_pipeline()).to(torch.float64)
    tiny = pipe, {"prompt": ["red apple", "dog face"]}
    test_continuation.test_the_law_of_a_continuation_is_the_models_own(tiny)
    kept = target.DecoderTarget.__init__

    def forgetful(self: Any, *arguments: Any, **options: Any) -> None:
        parts = list(arguments)
        if len(parts) > 8 and parts[8] is not None:
            parts[8] = torch.zeros_like(parts[8])
        kept(self, *parts, **options)

    monkeypatch.setattr(target.DecoderTarget, "__init__", forgetful)
    caught(test_continuation.test_the_law_of_a_continuation_is_the_models_own, tiny)


def test_a_row_too_few_that_is_kept(monkeypatch):
    tiny = hushed(text_pipeline()).to(torch.float64), {"prompt": ["red apple", "dog face"]}
    kept = prefix.kept_rows
    monkeypatch.setattr(prefix, "kept_rows", lambda strength, rows: max(0, kept(strength, rows) - 1))
    caught(test_continuation.test_the_kept_rows_are_the_pictures_and_the_rest_is_new, tiny)


def test_an_interval_that_ends_one_token_early(files, monkeypatch):
    check = test_llamagen_published.test_the_guidance_interval_counts_decoding_steps_as_upstream_does
    check(files, 3)

    def early(self: Any, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = logits
        guided = unconditional + self.config.guidance_scale * (conditional - unconditional)
        return torch.where((positions <= self.config.guidance_interval)[..., None], guided, conditional)

    monkeypatch.setattr(laws.Laws, "_guide", early)
    caught(check, files, 3)


def test_a_third_stream_that_is_mixed_the_other_way(samples, monkeypatch, tmp_path):
    test_families.test_pictures_of_a_prompt_make_a_third_stream(samples, tmp_path)

    def mixed(self: Any, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        c, i, u = logits
        return u + self.config.guidance_scale * (i - u) + self.config.image_guidance_scale * (c - i)

    monkeypatch.setattr(laws.Laws, "_guide", mixed)
    caught(test_families.test_pictures_of_a_prompt_make_a_third_stream, samples, tmp_path)


def test_a_line_mark_behind_the_last_row(samples, monkeypatch):
    """Of Emu3.5, whose rows are separated, not ended."""
    made = Emu35Protocol._raster
    monkeypatch.setattr(Emu35Protocol, "_raster", lambda self, *size: replace(made(self, *size), between=False))
    caught(test_families.test_every_sequence_is_a_whole_picture_by_upstreams_rules, samples, "emu3.5")


def test_a_width_that_comes_first(samples, monkeypatch):
    made = Emu3Protocol._opening
    monkeypatch.setattr(Emu3Protocol, "_opening", lambda self, height, width: made(self, width, height))
    caught(test_families.test_prompts_of_both_streams_are_upstreams, samples, "emu3")


def test_a_negative_prompt_that_is_ignored(samples, monkeypatch, tmp_path):
    made = Emu3Protocol.null_ids
    monkeypatch.setattr(Emu3Protocol, "null_ids", lambda self, height, width, *rest: made(self, height, width))
    caught(test_emu3.test_a_negative_prompt_replaces_the_published_one, samples, tmp_path)


def test_codes_that_are_looked_up_by_distance(samples, monkeypatch):
    monkeypatch.setattr(vqgan, "_largest", vqgan._nearest)
    caught(test_emu3.test_codes_of_emu3_5_are_the_largest_inner_products, samples)


def test_an_unconditional_stream_that_is_short(samples, monkeypatch):
    """Of Janus-Pro, whose padding is read."""
    monkeypatch.setattr(JanusProtocol, "null_ids", lambda self, *rest: [self._first, self._begin])
    caught(test_families.test_prompts_of_both_streams_are_upstreams, samples, "janus")


def test_codes_that_are_not_lifted(samples, monkeypatch):
    logits_test(samples, "janus")
    width = samples.pipe("janus").transformer.config.text_config.hidden_size

    def unlifted(self: Any) -> Any:
        return lambda codes: torch.nn.functional.pad(self.generation_embeddings(codes), (0, width))[..., :width]

    monkeypatch.setattr(JanusForImageGeneration, "code_embedding", property(unlifted))
    caught(logits_test, samples, "janus")


def test_codes_that_begin_one_word_too_late(samples, monkeypatch):
    for kind in ("simplear", "liquid"):
        monkeypatch.setattr(samples.pipe(kind).protocol, "code_ids", samples.pipe(kind).protocol.code_ids - 1)
        caught(test_families.test_every_sequence_is_a_whole_picture_by_upstreams_rules, samples, kind)


def test_a_plain_gelu(samples, monkeypatch):
    """Of Liquid, whose configuration names the wrong one."""

    def plain(cls: Any, content: dict[str, Any], path: Any) -> Any:
        config = cls.from_dict(content)
        config.hidden_act = config.hidden_activation = "gelu"
        return config

    monkeypatch.setattr(liquid, "load_config", plain)
    caught(logits_test, samples, "liquid")
