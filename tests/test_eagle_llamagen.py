"""Published EAGLE drafters of LlamaGen compute what was published, and never show in a picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import reference_eagle as reference
import torch
from test_drafters import PROMPTS, decoded, draft_model, drafting
from test_eagle_files import LLAMA, published, same
from tiny_pipeline import GRID, TOKENS, VOCAB, class_pipeline, codes, text_pipeline
from torch import Tensor, nn
from torch.nn import functional as F

import arsd
from arsd import EagleDrafter
from arsd.decoding.laws import Grammar, LawConfig, Laws
from arsd.models.eagle_draft import EagleDraftModel

HEADS = 2
CLASSES = [0, 1, 2, 3]


def precise(drafter: EagleDrafter) -> EagleDrafter:
    """RMS norms in float64: those of transformers, and the published ones, go through float32."""
    layer: Any = drafter.layer
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(layer, name)
        if not isinstance(norm, nn.Identity):
            fine = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=norm.weight.dtype)
            fine.weight = norm.weight
            setattr(layer, name, fine)
    return drafter


def with_option(drafter: EagleDrafter, **option: Any) -> EagleDrafter:
    changed = EagleDrafter.from_config({**drafter.config, **option}).to(drafter.dtype)
    changed.load_state_dict(drafter.state_dict())
    return changed


def guided(logits: Tensor, scale: float) -> Tensor:
    """Published: unconditional logits plus the scaled difference."""
    conditional, unconditional = logits
    return unconditional + scale * (conditional - unconditional)


# ------------------------------------------------------------------------------------------- LlamaGen: what was published


@pytest.fixture(scope="module")
def double() -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline().to(torch.float64))


@pytest.fixture(scope="module")
def read(double) -> Any:
    return decoded(double)


def llamagen_logits(
    state: dict[str, Tensor], head: Tensor, features: Tensor, tokens: Tensor, count: int, shift: int = 1
) -> list[Tensor]:
    """Logits [2, V] of one picture: of token ``count`` on true features, then of the two after it on predicted ones.

    Args:
        features: [2, P + N, D] of the target, conditional and unconditional.
        tokens: [N] of the picture.
        shift: 1 pairs (x_{t+1}, h_t); 0 is the slip in the release's loader for Lumina, (x_t, h_t).
    """
    state = {key: value.double() for key, value in state.items()}
    slots = features.shape[1] - TOKENS
    ids = torch.cat([torch.zeros(slots, dtype=torch.int64), tokens])[shift:].expand(2, -1)
    turns = reference.grid_turns(slots - 1, GRID, state["fc.weight"].shape[0] // HEADS)
    fed, logits = features[:, : slots - 1 + count], []
    for j in range(3):
        length = slots - 1 + count + j
        seen = torch.ones(2, length, dtype=torch.bool)
        last = reference.predict(state, HEADS, 1e-6, ids[:, :length], fed, turns, seen)[:, -1:]
        fed = torch.cat([fed, last], dim=1)
        logits.append(last[:, 0] @ head.T)
    return logits


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1}, {"bias": False}])
@torch.no_grad()
def test_llamagen_logits_are_the_published_ones(tmp_path, double, read, suffix, options):
    """Every row at another position, text left-padded, under guidance: on true features and on predicted ones."""
    tokens, condition, padding, target = read
    features = target.features[:, : condition.shape[2] + TOKENS]
    assert padding.any() and not padding.all(-1).any() and len(condition) == 2
    state = reference.drafter_state(**options)
    folder = published(tmp_path / "drafter", state, suffix=suffix)
    drafter = precise(EagleDrafter.from_single_file(folder, dtype=torch.float64))
    parts = SimpleNamespace(drafter=drafter, transformer=double.transformer)
    head = double.transformer.lm.lm_head.weight
    for counts in ([5, 3, 1, 4], [0, 1, 2, 3], [12, 13, 9, 10]):
        model = draft_model(parts, condition, padding, window=5)
        model.begin(target)
        logits = [caught_up(model, tokens, counts)]
        for j in range(2):
            logits.append(model.extend(torch.stack([row[n + j] for row, n in zip(tokens, counts, strict=True)])))
        for b, n in enumerate(counts):
            expected = llamagen_logits(state, head, features[b::4], tokens[b], n)
            for found, wanted in zip(logits, expected, strict=True):
                torch.testing.assert_close(found[:, b], wanted, rtol=0, atol=1e-9)


def caught_up(model: EagleDraftModel, tokens: Tensor, counts: list[int]) -> Tensor:
    """Read all committed tokens, five at most in a pass, with rows that stand elsewhere."""
    fed, done = F.pad(tokens, (1, 8)), 0
    while True:
        starts = [min(done, n) for n in counts]
        columns = [min(4, n - start) for n, start in zip(counts, starts, strict=True)]
        rows = torch.stack([row[s : s + 5] for row, s in zip(fed, starts, strict=True)])
        logits = model.catch_up(rows, starts, columns)
        if all(s + c == n for s, c, n in zip(starts, columns, counts, strict=True)):
            return logits
        done += 5


@torch.no_grad()
def test_class_conditional_logits_are_the_published_ones(tmp_path):
    """The one condition slot is not read: the first pair is the first token beside its feature."""
    pipe = drafting(class_pipeline().to(torch.float64))
    state = reference.drafter_state()
    drafter = precise(EagleDrafter.from_single_file(published(tmp_path / "a", state), dtype=torch.float64))
    tokens = codes(pipe, class_labels=CLASSES)
    conditions = pipe.encode_inputs(class_labels=CLASSES)
    target, none = pipe.target_maker(conditions)(TOKENS, 4), torch.zeros(4, dtype=torch.int64)
    target.keep_features()
    target.rollback(none)
    target.forward(F.pad(tokens, (1, -1)), none, [0] * 4)
    lm, counts = pipe.transformer.lm, [5, 3, 1, 12]
    parts = (drafter, lm.model.rotary_emb, lm.lm_head, lm.model.embed_tokens)
    model = EagleDraftModel(*parts, conditions.condition, TOKENS, 5, conditions.padding)
    model.begin(target)
    logits = caught_up(model, tokens, counts)
    for b, n in enumerate(counts):
        expected = llamagen_logits(state, lm.lm_head.weight, target.features[b::4, : TOKENS + 1], tokens[b], n)[0]
        torch.testing.assert_close(logits[:, b], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_pairs_guidance_and_embedding_are_not_those_of_the_slips(tmp_path, double, read):
    """Token and feature one apart; u + s (c - u); the drafter's own embedding; padded text read; no norm at the input."""
    tokens, condition, padding, target = read
    features = target.features[:, : condition.shape[2] + TOKENS]
    state = reference.drafter_state()
    folder = published(tmp_path / "drafter", state)
    drafter = precise(EagleDrafter.from_single_file(folder, dtype=torch.float64))
    head = double.transformer.lm.lm_head.weight

    def law_of(drafter: EagleDrafter) -> Tensor:
        model = draft_model(SimpleNamespace(drafter=drafter, transformer=double.transformer), condition, padding)
        model.begin(target)
        logits = caught_up(model, tokens, [4] * 4)
        laws = Laws(LawConfig(guidance_scale=3.0, temperature=9.0), Grammar(TOKENS, VOCAB))
        return laws(logits[:, :, None], torch.full((4, 1), 4)).probs[0, 0].double()

    def reference_law(**slip: Any) -> Tensor:
        logits = llamagen_logits(slip.pop("state", state), head, features[0::4], tokens[0], 4, **slip)[0]
        return (guided(logits, 3.0) / 9.0).softmax(-1)

    found = law_of(drafter)
    torch.testing.assert_close(found, reference_law(), rtol=0, atol=1e-9)
    c, u = llamagen_logits(state, head, features[0::4], tokens[0], 4)[0]
    other = {"embed_tokens.weight": double.transformer.lm.model.embed_tokens.weight}
    slips = [reference_law(shift=0), ((c + 3.0 * (c - u)) / 9.0).softmax(-1), reference_law(state=state | other)]
    for option in ({"see_padding": False}, {"condition_inputs": "embedding"}):
        slips.append(law_of(precise(with_option(drafter, **option))))
    for slip in slips:
        assert (slip - found).abs().sum() > 0.01


# ------------------------------------------------------------------------------------------------ LlamaGen: in a pipeline


@pytest.mark.parametrize("make", [text_pipeline, class_pipeline])
@pytest.mark.parametrize("with_lm", [True, False])
def test_a_published_drafter_does_not_show_in_the_picture(tmp_path, make, with_lm):
    pipe = make()
    lm = pipe.transformer.lm
    drafter = EagleDrafter.from_single_file(published(tmp_path / "a", reference.drafter_state()), lm=lm if with_lm else None)
    pipe = drafting(arsd.LlamaGenPipeline(**{**pipe.components, "drafter": drafter}), drafter)
    given = {"prompt": PROMPTS} if make is text_pipeline else {"class_labels": CLASSES}
    plain = codes(pipe, **given, decoder="ar")
    for decoder in ("eagle", "eagle:draft_length=7", "hybrid:window=8"):
        assert torch.equal(codes(pipe, **given, decoder=decoder), plain)
    assert torch.equal(codes(pipe, **given, decoder="eagle", batch_size=3), plain)
    assert torch.equal(
        codes(pipe, **given, decoder="eagle", guidance_scale=1.0), codes(pipe, **given, decoder="ar", guidance_scale=1.0)
    )


def test_a_pipeline_saves_a_drafter_with_its_own_embedding(tmp_path):
    pipe = text_pipeline()
    folder = published(tmp_path / "a", reference.drafter_state(), LLAMA | {"embed_upscale": 1.5})
    drafting(pipe, EagleDrafter.from_single_file(folder)).save_pretrained(tmp_path / "pipe")
    loaded = arsd.AutoARPipeline.from_pretrained(tmp_path / "pipe").drafter
    assert (
        same(loaded.state_dict(), pipe.drafter.state_dict())
        and dict(loaded.config).items()
        >= {
            "embed_upscale": 1.5,
            "vocab_size": 32,
        }.items()
    )
    assert not loaded.embed_tokens.weight.requires_grad
