"""What the transformer of emoji-128 is trained on: tokens, corrupted input, captions that must foretell their pictures."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from arsd import LlamaGenPipeline, VQTokenizer
from arsd.models.captions import tokenize_captions
from arsd.training import target
from arsd.training.common import Muon
from arsd.training.data import EmojiData
from arsd.training.target import build_tokenizer, corrupted, quantise
from arsd.training.vq import EMOJI_VQ, to_tensor


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int) -> np.ndarray:
    """Pictures [count, 128, 128, 3] of 8 x 8 random tiles."""
    tiles = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return tiles.repeat(16, 1).repeat(16, 2)


def test_corruption_is_light_or_another_picture_or_noise_and_leaves_the_labels_alone():
    codes = torch.arange(4000)[:, None].expand(4000, 256) % 1024  # one code per row tells whose tokens these are
    ids, null = codes.clone(), torch.arange(4000) % 10 == 0
    fed = corrupted(ids, null, 1024, rng(1))
    assert torch.equal(ids, codes) and fed.shape == ids.shape and fed.dtype == ids.dtype
    assert int(fed.min()) >= 0 and int(fed.max()) < 1024
    assert torch.equal(fed, corrupted(ids, null, 1024, rng(1)))
    from_other, share = fed == ids.roll(1, 0), (fed != ids).double().mean(1)
    strange = from_other.double().mean(1) > 0.05
    assert (share[null] < 0.27).all() and not strange[null].any()
    assert abs(share[null].mean() - 0.1) < 0.01
    begun = strange & (from_other.int().diff(dim=1) <= 0).all(1) & from_other[:, 0]  # goes over to its own
    rows = float((~null).sum())
    assert abs(strange.sum() / rows - 0.8 * 0.75 * 0.95) < 0.03 and abs(begun.sum() / rows - 0.8 * 0.5 * 0.95) < 0.03
    assert (fed == ids)[begun].double().mean(1).max() > 0.9 and share[begun].max() > 0.98
    assert not (from_other | (fed == ids))[share > 0.9].all()  # and some are noise nearly throughout


def test_corruption_of_a_single_row_has_no_other_picture_and_can_only_add_noise():
    ids, shares = torch.randint(1024, (1, 256), generator=rng()), []
    for seed in range(200):
        fed = corrupted(ids, torch.tensor([False]), 1024, rng(seed))
        shares.append(float((fed != ids).double().mean()))
    untouched = sum(share == 0 for share in shares) / len(shares)
    assert abs(untouched - 0.8 * 0.75) < 0.1  # it would have begun as, or been mixed with, itself
    assert max(shares) > 0.9


def tiny_model() -> target.EmojiModel:
    torch.manual_seed(0)
    return target.EmojiModel(words=40, layers=1, width=64, vocab=64)


def some_batches(count: int = 8, pictures_per_name: int = 1) -> target.Batches:
    captions = [[f"name{i // pictures_per_name}", f"alias{i}"] for i in range(count)]
    emoji = EmojiData(pictures(count), captions, [names[0] for names in captions], np.zeros(count, dtype=bool))
    ids = torch.randint(64, (count, 256), generator=rng(3))
    codebook = torch.randn(64, target.CODE_DIM, generator=rng(4))
    batches = target.Batches(emoji, ids, build_tokenizer(captions), codebook)
    batches.generator.manual_seed(0)
    return batches


def test_batches_pair_tokens_captions_and_standardised_latents():
    batches = some_batches()
    words, mask, null, fed, clean = batches.draw(2000)
    texts = batches.tokenizer.batch_decode(words, skip_special_tokens=True)
    which = torch.tensor([int(re.sub(r"\D", "", text)) for text in texts])
    assert torch.equal(clean, batches.ids[which])
    assert abs(sum(text.startswith("alias") for text in texts) / 2000 - target.ALIAS_SHARE) < 0.04
    assert abs(null.double().mean() - target.NULL_SHARE) < 0.03
    assert fed.shape == clean.shape and not torch.equal(fed, clean) and mask.shape == (2000, 32)
    words, _, latents = batches.draw_pictures(20)
    texts = batches.tokenizer.batch_decode(words, skip_special_tokens=True)
    assert torch.equal(latents, batches.latents[[int(re.sub(r"\D", "", text)) for text in texts]])
    assert batches.latents.shape == (8, 256 * target.CODE_DIM)
    torch.testing.assert_close(batches.latents.mean(0), torch.zeros(256 * target.CODE_DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(batches.latents.square().mean(), torch.tensor(1.0))


def test_a_caption_ends_in_a_slot_for_each_row_of_the_picture():
    tokenizer = build_tokenizer([["red apple"], ["pear"]])
    rows = [f"<row_{row}>" for row in range(16)]
    ids, mask = tokenize_captions(tokenizer, ["pear", "red " * 40], target.CONDITION_TOKENS, "cpu")
    assert tokenizer.convert_ids_to_tokens(ids[0][mask[0] == 1]) == ["pear", "</s>", *rows]
    assert tokenizer.convert_ids_to_tokens(ids[1])[-17:] == ["</s>", *rows]  # what is cut from a long caption are its words
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "pear"


def test_each_row_of_the_picture_is_predicted_from_its_own_slot():
    model, batches = tiny_model().eval(), some_batches()
    nn.init.normal_(model.transformer.caption_projection.fc2.weight, std=1.0)
    words, mask, _ = batches.draw_pictures(4)
    slots = model.embed(words, mask)[0].detach()
    model.embed = lambda *_: (slots, mask)  # type: ignore[method-assign]
    with torch.no_grad():
        predicted = model.picture(F.rms_norm(slots[:, -16:], slots.shape[-1:])).view(4, 16, 16, target.CODE_DIM)
        assert float(model.picture_loss(words, mask, predicted.flatten(1))) == 0
        slots[:, 16 + 3] += torch.randn(slots.shape[-1], generator=rng())
        moved = model.picture(F.rms_norm(slots[:, -16:], slots.shape[-1:])).view(4, 16, 16, target.CODE_DIM)
        assert ((moved != predicted).flatten(2).any(-1) == (torch.arange(16) == 3)).all()
        assert float(model.picture_loss(words, mask, predicted.flatten(1))) > 0


@pytest.mark.slow
def test_captions_learn_to_predict_their_pictures():
    """Of two pictures of one name only the mean can be predicted: half the variance stays, no matter how long."""
    left = {}
    for pictures_per_name in (1, 2):
        torch.manual_seed(0)
        model, batches = target.EmojiModel(words=40, layers=1, width=128, vocab=64), some_batches(8, pictures_per_name)
        batches.data.captions = [names[:1] for names in batches.data.captions]
        left[pictures_per_name] = target.teach_captions(model, batches, lr=1e-2, steps=120, size=16)
        assert all(p.grad is None for p in model.parameters())
    assert left[1] < 0.05 and 0.35 < left[2] < 0.6


def test_the_loss_reads_captions_but_for_the_rows_that_lost_them():
    model, batches = tiny_model().eval(), some_batches()
    nn.init.normal_(model.transformer.caption_projection.fc2.weight, std=1.0)
    words, mask, _, fed, clean = batches.draw(4)
    with torch.no_grad():
        for null in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
            loss, moved = (model(w, mask, null, fed, clean) for w in (words, words.flip(0)))
            assert torch.equal(loss, moved) == bool(null.all())


def test_plain_quantisation_is_the_tokenizers_and_a_rate_saves_entropy():
    vq = VQTokenizer(**{**EMOJI_VQ, "codebook_size": 64})
    codebook = vq.codebook.detach()
    images = to_tensor(pictures(6))
    with torch.no_grad():
        latents = vq.latents(images).flatten(0, 2)
    assert torch.equal(quantise(latents, codebook, 0.0), vq.encode(images).flatten())

    def cost(ids: torch.Tensor, rate: float) -> tuple[float, float, float]:
        p = torch.bincount(ids, minlength=64).double() / len(ids)
        entropy, distortion = (
            -float((p * p.clamp_min(1e-12).log()).sum()),
            float((latents - codebook[ids]).square().sum(-1).mean()),
        )
        return entropy, distortion, distortion + rate * entropy

    plain, priced = (cost(quantise(latents, codebook, rate), 0.1) for rate in (0.0, 0.1))
    assert priced[0] < plain[0] and priced[1] > plain[1] and priced[2] < plain[2]
    ids = quantise(latents, codebook, 0.1)
    counts = torch.bincount(ids, minlength=64).float()
    again = quantise(latents, codebook, 0.1, counts)  # as for held-out pictures: the iteration has (nearly) converged
    assert (again == ids).double().mean() > 0.98
    free = torch.full((64,), 1.0)
    assert torch.equal(quantise(latents, codebook, 0.1, free), quantise(latents, codebook, 0.0))  # equal prices


def test_every_parameter_has_one_optimizer_and_the_caption_projection_has_muon():
    model = tiny_model()
    muon, adam = target._optimizers(model, 1e-3)
    groups = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adam)]
    assert sorted(groups[0] + groups[1]) == sorted(id(p) for p in model.parameters())
    projection = {id(p) for p in model.transformer.caption_projection.parameters()}
    assert isinstance(muon, Muon) and projection and projection <= set(groups[0])
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert {id(model.text.shared.weight), id(model.picture.weight)} <= set(groups[1])


def test_caption_losses_are_the_cross_entropy_of_each_caption():
    model = tiny_model().eval()
    nn.init.normal_(model.transformer.caption_projection.fc2.weight, std=1.0)
    vq = VQTokenizer(**{**EMOJI_VQ, "codebook_size": 64})
    parts = {"tokenizer": build_tokenizer([["red apple"], ["pear"]]), "text_encoder": model.text}
    pipe = LlamaGenPipeline(transformer=model.transformer, vq=vq, **parts)
    ids = torch.randint(64, (2, 256), generator=rng())
    losses = target.caption_losses(pipe, ["red apple", "pear"], ids)

    def by_hand(captions: list[str], null: bool = False, fed: torch.Tensor = ids) -> float:
        features, mask = pipe.encode_prompt(captions)
        condition = pipe.transformer.embed_captions(features, mask)
        condition = pipe.transformer.embed_null_caption(2) if null else condition
        logits = pipe.transformer(condition, fed, mask).log_softmax(-1)
        return -float(logits.gather(-1, ids[..., None]).mean())

    with torch.no_grad():
        assert losses["right"] == pytest.approx(by_hand(["red apple", "pear"]), rel=1e-5)
        assert losses["other"] == pytest.approx(by_hand(["pear", "red apple"]), rel=1e-5)
        assert losses["null"] == pytest.approx(by_hand(["red apple", "pear"], null=True), rel=1e-5)
        assert losses["strange"] == pytest.approx(by_hand(["red apple", "pear"], fed=ids.roll(1, 0)), rel=1e-5)
    assert len(set(losses.values())) == 4
