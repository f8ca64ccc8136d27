"""Draft models and relaxed rules in the pipelines whose codes are words: published EAGLE layouts, small models, LANTERN."""

from __future__ import annotations

from typing import Any

import pytest
import reference_eagle
import torch
from families import CODES, PROMPTS
from test_eagle_files import CHAMELEON, published
from tiny_pipeline import one_clear_line, seeded

from arsd import EagleDrafter
from arsd.errors import ArsdError
from arsd.models.chameleon import ChameleonForImageGeneration

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")
CHAMELEONS = ("lumina-mgpt", "anole")  # whose published drafters have a layout of their own
KINDS = (*CHAMELEONS, "emu3-hf")


def call_of(samples: Any, kind: str) -> dict[str, Any]:
    height, width = samples.sample(kind).size
    return {"prompt": [*PROMPTS, "a dog"], "height": height, "width": width, "output_type": "latent"}


def drafter_of(samples: Any, kind: str, folder: Any, own_embedding: bool) -> EagleDrafter:
    """A published Chameleon drafter with random weights."""
    words = samples.pipe(kind).transformer.config.vocab_size
    state = reference_eagle.drafter_state(chameleon=True, width=64, heads=4, hidden=48, vocab=words)
    lm = samples.pipe(kind).transformer
    if not own_embedding:
        state["embed_tokens.weight"] = lm.model.embed_tokens.weight.detach()
    drafter = EagleDrafter.from_single_file(published(folder / "drafter", state, CHAMELEON), lm=lm)
    assert (drafter.embed_tokens is not None) == own_embedding
    return drafter


@pytest.mark.parametrize("kind", CHAMELEONS)
@pytest.mark.parametrize("own_embedding", [True, False])
def test_a_published_drafter_does_not_show(samples, kind, own_embedding, tmp_path):
    pipe, call = samples.sample(kind).load(), call_of(samples, kind)
    pipe.register_modules(drafter=drafter_of(samples, kind, tmp_path, own_embedding))
    plain = pipe(**call, decoder="ar", generator=seeded(1))
    for decoder in ("eagle", "eagle:tree=2x2", "hybrid:window=6"):
        for rows in (None, 2):
            out = pipe(**call, decoder=decoder, generator=seeded(1), batch_size=rows)
            assert torch.equal(out.tokens, plain.tokens), (decoder, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_that_is_the_model_itself_is_always_right(samples, kind):
    """So it has read the prompts of both streams, padding and all, and every code and mark in its place."""
    pipe, call = samples.sample(kind).load(), call_of(samples, kind)
    pipe.register_modules(drafter=pipe.transformer)
    out = pipe(**call, decoder="speculative:drafter=draft-model,window=5", generator=seeded(1))
    assert out.stats.forward_passes == -(-out.tokens.shape[1] // 5)
    plain = pipe(**call, decoder="ar", generator=seeded(1))
    assert torch.equal(out.tokens, plain.tokens)


def test_another_chameleon_may_draft_too(samples):
    pipe, call = samples.sample("anole").load(), call_of(samples, "anole")
    config = pipe.transformer.config.__class__.from_dict(pipe.transformer.config.to_dict() | {"num_hidden_layers": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = ChameleonForImageGeneration(config).eval().double()
    pipe.register_modules(drafter=small)
    plain = pipe(**call, decoder="ar", generator=seeded(1))
    for decoder in ("speculative:drafter=draft-model,window=4", "hybrid:window=6"):
        assert torch.equal(pipe(**call, decoder=decoder, generator=seeded(1)).tokens, plain.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["lantern:k=4:delta=0.3", "lantern-plus-plus:k=4", "grouped:group=3", "cool-sd:delta=1"])
def test_relaxed_rules_keep_the_grammar_and_state_their_cost(samples, kind, rule):
    """Marks have no neighbours among the codes, and no code has a mark for a neighbour."""
    pipe, call = samples.pipe(kind), call_of(samples, kind)
    out = pipe(**call, decoder=f"sjd:window=8,acceptance={rule}", generator=seeded(1))
    raster = pipe.make_raster(call["height"], call["width"])
    forced = torch.tensor(sorted(raster.forced))
    marks = torch.tensor([raster.forced[int(n)] for n in forced])
    assert torch.equal(out.tokens[:, forced], marks.expand(3, -1))
    assert int(out.images.max()) < CODES and not out.decoders[0].lossless
    assert all(cost >= 0 for cost in out.stats.expected_changed_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_marks_lie_far_from_every_code(samples, kind):
    pipe = samples.pipe(kind)
    vectors = pipe.codebook
    count = len(pipe.vq.codebook)
    among = torch.cdist(vectors[:count], vectors[:count]).amax()
    for mark in range(count, len(vectors)):
        others = torch.cat([vectors[:mark], vectors[mark + 1 :]])
        assert torch.cdist(vectors[mark : mark + 1], others).amin() > 100 * among


def test_a_drafter_of_another_model_is_refused_in_one_line(samples, tmp_path):
    pipe, call = samples.sample("anole").load(), call_of(samples, "anole")
    state = reference_eagle.drafter_state(chameleon=True, width=32, heads=4, hidden=48, vocab=40)
    drafter = EagleDrafter.from_single_file(published(tmp_path / "other", state, CHAMELEON), dtype=torch.float64)
    pipe.register_modules(drafter=drafter)
    with pytest.raises(ArsdError) as error:
        pipe(**call, decoder="eagle", generator=seeded(1))
    one_clear_line(error.value, "belongs to another model")
