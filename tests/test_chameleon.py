"""Chameleon's network as a component: logits of images too, caches, text, and saving it again."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import published_chameleon as published
import pytest
import torch
from diffusers import DiffusionPipeline
from published_chameleon import WRITERS, near, warnings_of
from published_chameleon import some_ids as ids_for
from torch.nn import functional as F
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, DynamicCache

from arsd.errors import InputError
from arsd.models.chameleon import ChameleonForImageGeneration
from arsd.models.chameleon_files import KINDS, load_chameleon, load_tokenizer

load = partial(load_chameleon, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["anole", "chameleon"])
@torch.no_grad()
def test_where_the_stock_class_loads_it_computes_the_same_and_hides_the_image(tmp_path, kind):
    WRITERS[kind](tmp_path)
    ids = ids_for()
    with warnings_of("transformers") as messages:
        stock: Any = ChameleonForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert any("decoder" in message for message in messages) == (kind == "anole")  # so the silence elsewhere is one
    found = load(tmp_path)(ids).logits
    near(found, stock.lm_head(stock.model(ids).last_hidden_state))
    image = stock.model.vocabulary_mapping.image_tokens
    assert image == list(range(4, 4 + published.CODES))
    assert (stock(ids).logits[..., image] == torch.finfo(torch.float32).min).all()  # why there is a class of our own
    assert found[..., image].abs().max() < 20


@torch.no_grad()
def test_chunks_on_a_cache_and_taking_tokens_back_change_nothing(tmp_path):
    published.write_lumina(tmp_path)
    model, ids = load(tmp_path), ids_for(count=20)
    full = model(ids).logits
    cache, found = DynamicCache(config=model.config), []
    for start, end in ((0, 7), (7, 8), (8, 20)):
        found.append(model(ids[:, start:end], past_key_values=cache).logits)
    near(torch.cat(found, dim=1), full)
    cache.crop(-12)
    model(ids_for(count=5).flip(1), past_key_values=cache)  # guesses that are not kept
    cache.crop(-5)
    assert cache.get_seq_length() == 8
    near(model(ids[:, 8:], past_key_values=cache).logits, full[:, 8:])


@torch.no_grad()
def test_only_the_logits_asked_for_are_made_and_labels_give_the_loss(tmp_path):
    published.write_lumina(tmp_path)
    model, ids = load(tmp_path), ids_for()
    full = model(ids).logits
    near(model(ids, logits_to_keep=3).logits, full[:, -3:])
    near(model(ids, logits_to_keep=torch.tensor([2, 9])).logits, full[:, [2, 9]])
    near(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, full)
    assert torch.equal(model(ids, return_dict=False)[0], full)
    near(model(ids, labels=ids).loss, F.cross_entropy(full[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_text_is_generated_and_image_tokens_too_unless_they_are_suppressed(tmp_path):
    published.write_lumina(tmp_path)
    model, tokenizer = load(tmp_path), load_tokenizer(tmp_path)
    prompt = tokenizer(["Hello", "A"], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    out = model.generate(**prompt, **told)
    ids = prompt.input_ids[:1]
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out[:1], ids)
    sampled = {"do_sample": True, "num_return_sequences": 20, "max_new_tokens": 30, "eos_token_id": None}
    image = list(range(4, 4 + published.CODES))
    drawn = torch.isin(model.generate(ids[:, :5], **sampled)[:, 5:], torch.tensor(image)).float().mean()
    assert drawn > 0.02
    text = model.generate(ids[:, :5], **sampled, suppress_tokens=image)[:, 5:]
    assert not torch.isin(text, torch.tensor(image)).any()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_loaded_model_is_saved_and_loaded_bit_for_bit_without_a_warning(tmp_path, kind):
    WRITERS[kind](tmp_path / "a")
    model = load_chameleon(tmp_path / "a")
    with warnings_of("transformers", "diffusers") as messages:
        model.save_pretrained(tmp_path / "b")
        again, info = ChameleonForImageGeneration.from_pretrained(
            tmp_path / "b", dtype=torch.bfloat16, output_loading_info=True
        )
        third = load_chameleon(tmp_path / "b")  # norms are once per head now
    assert messages == []
    assert not any(info.values())
    for other in (again, third):
        assert other.dtype == model.dtype
        ours, theirs = model.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(other(ids_for()).logits, model(ids_for()).logits)
    assert again.config.vocabulary_map == model.config.vocabulary_map
    if kind in ("anole", "chameleon"):  # what is not read is no news
        with warnings_of("transformers") as messages:
            direct = ChameleonForImageGeneration.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
        assert messages == []
        assert all(torch.equal(direct.state_dict()[key], ours[key]) for key in ours)


class Holder(DiffusionPipeline):
    """A pipeline with nothing but the network."""

    def __init__(self, lm: ChameleonForImageGeneration) -> None:
        super().__init__()
        self.register_modules(lm=lm)


@torch.no_grad()
def test_diffusers_saves_and_loads_it_as_a_component(tmp_path):
    published.write_lumina(tmp_path / "a")
    model = load(tmp_path / "a")
    Holder(model).save_pretrained(tmp_path / "b")
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["lm"] == ["arsd.models.chameleon", "ChameleonForImageGeneration"]
    with warnings_of("transformers", "diffusers") as messages:
        again = Holder.from_pretrained(tmp_path / "b")
    assert messages == []
    assert torch.equal(again.lm(ids_for()).logits, model(ids_for()).logits)


def test_a_config_alone_makes_a_network_without_an_encoder(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = ChameleonConfig(vocab_size=50, num_key_value_heads=4, **sizes)
    assert config.vocabulary_map is None
    model = ChameleonForImageGeneration(config)
    assert config.vocabulary_map is None  # the caller's own stays as it was
    assert config.vq_config is None or model.config.vq_config.to_dict() == config.vq_config.to_dict()
    assert not any("vqmodel" in name for name, _ in model.named_modules())
    assert model(ids_for(vocab=50)).logits.shape == (2, 17, 50)
    model.save_pretrained(tmp_path)
    assert ChameleonForImageGeneration.from_pretrained(tmp_path).config.vocabulary_map == {}
    pixels = torch.zeros(1, 3, 8, 8)
    for call in (
        lambda: model(ids_for(vocab=50), pixel_values=pixels),
        lambda: model.get_image_tokens(pixels),
        lambda: model.get_image_features(pixels),
    ):
        with pytest.raises(InputError, match="reads tokens, not pixel_values"):
            call()
