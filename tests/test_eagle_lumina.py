"""Published EAGLE drafters of Chameleon (Lumina-mGPT) compute what was published, in both streams, and never show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import reference_eagle as reference
import torch
from test_eagle_files import CHAMELEON, chameleon_state, published
from test_eagle_llamagen import caught_up, precise, with_option
from tiny_pipeline import seeded
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

import arsd
from arsd import EagleDrafter
from arsd.decoding import Setting
from arsd.decoding.laws import Grammar, LawConfig, Laws
from arsd.decoding.loop import decode
from arsd.decoding.noise import CounterNoise
from arsd.decoding.types import DecodeRequest
from arsd.models.eagle_draft import EagleDraftModel
from arsd.models.target import DecoderTarget

P, N, WORDS, NEWLINE = 6, 15, 40, 39


class _Line(nn.Module):
    """Rotary table along a line in float64, for heads of width 8."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


@pytest.fixture(scope="module")
def lumina() -> Any:
    """A random Chameleon, prompts [4, P] left-padded with 1, and the padding of both streams [2, 4, P]."""
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1]}
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "attn_implementation": "sdpa"}
        config = ChameleonConfig(
            **sizes, **heads, vq_config=vq | {"num_res_blocks": 1}, vocabulary_map={"<image>": 3}, max_position_embeddings=64
        )
        lm: Any = ChameleonForConditionalGeneration(config).eval().double()
        for name, p in lm.named_parameters():
            if p.ndim == 2 and "vqmodel" not in name:
                nn.init.normal_(p, std=(1.5 if "lm_head" in name else 1.0) / p.shape[-1] ** 0.5)
        nn.init.normal_(lm.model.embed_tokens.weight)
    prompts = torch.randint(4, 30, (4, P), generator=seeded(5))
    padding = torch.zeros(2, 4, P, dtype=torch.bool)
    padding[0, 1, :2] = True
    padding[1, :, : P - 3] = True  # the unconditional stream begins with the tokens that begin the picture
    padding[1, 3, : P - 1] = True
    return SimpleNamespace(lm=lm, prompts=prompts, padding=padding)


def lumina_parts(lumina: Any, drafter: EagleDrafter, rotary: nn.Module | None = None) -> tuple[Any, Any]:
    """(makes the target, makes the draft model) for passes of some tokens."""
    lm, ids = lumina.lm, lumina.prompts.expand(2, -1, -1)
    embed = drafter.embed_tokens if drafter.embed_tokens is not None else lm.model.embed_tokens

    def target(pass_tokens: int, batch: int = 4) -> DecoderTarget:
        condition = lm.model.embed_tokens(ids)
        return DecoderTarget(lm.model, lm.lm_head, lm.model.embed_tokens, condition, N, pass_tokens, lumina.padding, batch)

    def draft(window: int, batch: int = 4) -> EagleDraftModel:
        parts = (rotary or lm.model.rotary_emb, lm.lm_head, lm.model.embed_tokens, embed(ids))
        return EagleDraftModel(drafter, *parts, N, window, lumina.padding, batch)

    return target, draft


def lumina_read(lumina: Any, drafter: EagleDrafter) -> tuple[Tensor, DecoderTarget]:
    """Pictures [4, N], and the target that has read them and kept its features."""
    tokens, none = torch.randint(4, 30, (4, N), generator=seeded(6)), torch.zeros(4, dtype=torch.int64)
    target = lumina_parts(lumina, drafter)[0](N + 1)
    target.keep_features()
    target.prefill([-target.unread] * 4, 4)
    target.rollback(none)
    target.forward(F.pad(tokens, (1, 0)), none, [0] * 4)
    return tokens, target


@pytest.mark.parametrize(
    ("options", "upscale"), [({}, 1.0), ({}, 1.5), ({"shards": 2}, 1.0), ({"kv_heads": 2, "bias": False}, 1.0)]
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@torch.no_grad()
def test_chameleon_logits_are_the_published_ones(tmp_path, lumina, options, upscale, suffix):
    """Places counted from each stream's own beginning, the first of them unread, as the release's padded batch does."""
    state = chameleon_state(**options)
    folder = published(tmp_path / "drafter", state, CHAMELEON | {"embed_upscale": upscale}, suffix)
    drafter = precise(EagleDrafter.from_single_file(folder, dtype=torch.float64))
    tokens, target = lumina_read(lumina, drafter)
    make_draft = lumina_parts(lumina, drafter, _Line())[1]
    state = {key: value.double() for key, value in state.items()}
    for counts in ([5, 3, 1, 4], [1, 2, 7, 11]):
        model = make_draft(5)
        model.begin(target)
        logits = [caught_up(model, tokens, counts)]
        for j in range(2):
            logits.append(model.extend(torch.stack([row[n + j] for row, n in zip(tokens, counts, strict=True)])))
        for b, n in enumerate(counts):
            expected = _lumina_logits(state, lumina, target.features[b::4], tokens[b], b, n, upscale)
            for found, wanted in zip(logits, expected, strict=True):
                torch.testing.assert_close(found[:, b], wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_chameleon_pairs_and_streams_are_not_those_of_the_slips(tmp_path, lumina):
    """The slot whose feature is padding stays unread, text is read with its embedding, the places are the target's own."""
    drafter = EagleDrafter.from_single_file(published(tmp_path / "a", chameleon_state(), CHAMELEON), dtype=torch.float64)
    tokens, target = lumina_read(lumina, drafter)

    def logits(drafter: EagleDrafter, rotary: nn.Module | None = None) -> Tensor:
        model = lumina_parts(lumina, drafter, rotary)[1](5)
        model.begin(target)
        return caught_up(model, tokens, [4] * 4)

    found = logits(drafter)
    torch.testing.assert_close(found, logits(precise(with_option(drafter)), _Line()), rtol=0, atol=1e-4)
    for option in ({"see_first": True}, {"see_padding": True}):
        wrong = logits(with_option(drafter, **option))
        torch.testing.assert_close(wrong[0, 0], found[0, 0], rtol=0, atol=1e-9)  # not padded
        assert (wrong[1] - found[1]).abs().max() > 0.05
    for option in ({"condition_inputs": "zero-token"}, {"embed_upscale": 2.0}):
        assert (logits(with_option(drafter, **option))[0, 0] - found[0, 0]).abs().max() > 0.05


def _lumina_logits(
    state: dict[str, Tensor], lumina: Any, features: Tensor, tokens: Tensor, b: int, count: int, upscale: float
) -> list[Tensor]:
    """As :func:`llamagen_logits`, [2, V]."""
    ids = torch.cat([lumina.prompts[b], tokens])[1:].expand(2, -1)
    padding = F.pad(lumina.padding[:, b], (0, N))
    fed, logits = features[:, : P - 1 + count], []
    for j in range(3):
        length = P - 1 + count + j
        seen = ~padding[:, :length]
        places = (seen.long().cumsum(-1) - 1).clamp_min(0)
        turns = reference.line_turns(places, 8)
        last = reference.predict(state, 4, 1e-5, ids[:, :length], fed, turns, seen, upscale)[:, -1:]
        fed = torch.cat([fed, last], dim=1)
        logits.append(last[:, 0] @ lumina.lm.lm_head.weight.T)
    return logits


@pytest.mark.parametrize("strategy", ["eagle", "eagle:draft_length=1", "eagle:draft_length=7", "hybrid:window=8"])
@pytest.mark.parametrize("own", [True, False])
def test_a_chameleon_decodes_plain_ars_tokens_with_a_published_drafter(tmp_path, lumina, strategy, own):
    """Through the production loop, with guidance, forced ends of line, and rows that take the next picture."""
    state = chameleon_state()
    if not own:
        state["embed_tokens.weight"] = lumina.lm.model.embed_tokens.weight.detach()
    drafter = EagleDrafter.from_single_file(published(tmp_path / "a", state, CHAMELEON), lm=lumina.lm)
    assert (drafter.embed_tokens is not None) == own and drafter.dtype == torch.float64
    make_target, make_draft = lumina_parts(lumina, drafter)
    grammar = Grammar(N, WORDS, {n: NEWLINE for n in range(4, N, 5)})
    laws = Laws(LawConfig(guidance_scale=3.0), grammar)

    def run(text: str, batch: int = 4) -> tuple[Tensor, Any]:
        noise = CounterNoise([0] * 4, list(range(4)), batch=batch)
        setting = Setting(batch, N, 5, grammar, noise, torch.device("cpu"), laws=laws)
        setting.draft_model = lambda window: make_draft(window, batch)
        parts = arsd.parse_strategy(text).build(setting)
        result = decode(make_target(parts.pass_tokens, batch), parts, laws, noise, DecodeRequest(N, 5, pictures=4), batch)
        return result.tokens, result.stats

    plain, _ = run("ar")
    assert plain[:, :4].unique().numel() > 6 and (plain[:, 4::5] == NEWLINE).all()
    for batch in (4, 2):
        tokens, stats = run(strategy, batch)
        assert torch.equal(tokens, plain)
        assert stats.forward_passes < (4 // batch) * N + 4 * P
