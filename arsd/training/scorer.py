"""Stage ``scorer``: train emoji-CLIP, a small CLIP (arXiv 2103.00020) that scores how well a picture matches a text.

Some thousand pictures are few for a contrastive model, and names of unseen concepts hold unseen words. Three things help:
the word table is fixed, made of vectors that know general English; a second set of drawings shows what a concept is beside
its style; and targets are soft, so that a picture of one fruit is not held to be as far from another as from a lorry.
Damaged copies (blurred, patches moved or taken from another picture) are further negatives of a text, ranked by damage:
the score has to notice what an autoregressive model draws badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from arsd.devices import has_fast_bfloat16
from arsd.errors import DataError
from arsd.run_folders import claim_folder
from arsd.training.common import Muon, Run
from arsd.training.data import EmojiData
from arsd.training.scorer_data import (
    EOS,
    MAX_WORDS,
    SPECIAL,
    Material,
    blurred,
    build_tokenizer,
    data_hash,
    may_mirror,
    moved_patches,
    without_tone,
)

SIDE = 64  # pixels that the model sees
MARGIN = 16  # white pixels around a picture that a crop may reach into
DRAWING_WEIGHT = 0.35  # of a picture in the second style; one of a concept with one picture weighs 1
WHOLE_SHARE = 0.3  # pictures that are not cropped
KEYWORD_SHARE, ALIAS_SHARE, UNKNOWN_SHARE = 0.3, 0.15, 0.03
SOFT_SHARE, SOFT_TEMPERATURE = 0.3, 0.07
RANK_SCALE = 20.0
RELATION_WORDS, RELATION_TEMPERATURE, RELATION_WEIGHT = 128, 0.1, 0.3
LARGEST_SCALE = 40.0


@dataclass(frozen=True)
class ScorerSize:
    """Widths and depths; the defaults ship.

    Args:
        width: of the picture tower.
        layers: of the picture tower.
        text_width: of the text tower, that of the word vectors.
        text_layers: of the text tower.
        projection: dimension of the features.
        patch: pixels of a patch, of 64.
    """

    width: int = 160
    layers: int = 4
    text_width: int = 128
    text_layers: int = 2
    projection: int = 128
    patch: int = 8


def build_scorer(size: ScorerSize, vectors: Tensor) -> CLIPModel:
    """A CLIPModel with a frozen word table ``vectors`` [V, text_width]."""
    head = 32  # width of an attention head
    text = {
        "vocab_size": len(vectors),
        "hidden_size": size.text_width,
        "intermediate_size": 2 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": max(1, size.text_width // head),
        "max_position_embeddings": MAX_WORDS,
        "pad_token_id": SPECIAL.index("<pad>"),
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": EOS,
    }
    vision = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.width // head),
        "image_size": SIDE,
        "patch_size": size.patch,
    }
    shared: dict[str, Any] = {"projection_dim": size.projection}
    config = CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, **shared)
    model = CLIPModel(config)
    model.set_attn_implementation("eager")  # short sequences: on a CPU twice as fast backwards as the fused kernel
    table = model.text_model.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(vectors)
    table.requires_grad_(False)
    return model


def features(model: CLIPModel, pixels: Tensor | None = None, **texts: Tensor) -> Tensor:
    """Unit features [B, P] float32 of pictures (pixels [B, 3, 64, 64]) or of texts (``input_ids``, ``attention_mask``)."""
    out = model.get_text_features(**texts) if pixels is None else model.get_image_features(pixel_values=pixels)
    return F.normalize((out if isinstance(out, Tensor) else out.pooler_output).float(), dim=-1)


@dataclass
class Batch:
    """One step's pictures and texts.

    Args:
        pixels: [B + 2 D, 3, 64, 64]: clean pictures, then a mild and a severe damage of the first D.
        texts: ``input_ids`` and ``attention_mask`` [B, 24].
        fits: [B, B], whether text i also fits picture j.
        meanings: unit vectors [B, E] of the pictures' names.
    """

    pixels: Tensor
    texts: dict[str, Tensor]
    fits: Tensor
    meanings: Tensor


class Batches:
    """Draws batches; the one of a step depends on seed and step alone.

    Args:
        data: training pictures.
        material: keywords, second drawings, meanings.
        tokenizer: of the texts.
        batch: clean pictures.
        damaged: how many of them also come damaged, twice.
        seed: of all draws.
    """

    def __init__(
        self, data: EmojiData, material: Material, tokenizer: PreTrainedTokenizerFast, batch: int, damaged: int, seed: int
    ) -> None:
        self.material, self.tokenizer, self.size, self.damaged, self.seed = material, tokenizer, batch, damaged, seed
        by_name = {captions[0]: (captions, concept) for captions, concept in zip(data.captions, data.concepts, strict=True)}
        extra = [by_name.get(name, ([name], name)) for name in material.drawn]
        self.captions = [*data.captions, *(captions for captions, _ in extra)]
        self.concepts = [*data.concepts, *(concept for _, concept in extra)]
        self.images, self.drawings = data.images, material.drawings.numpy()
        weights = np.concatenate([data.weights, np.full(len(extra), DRAWING_WEIGHT)])
        self.weights = weights / weights.sum()
        place = {name: index for index, name in enumerate(material.names)}
        self.meanings = material.meanings[[place[captions[0]] for captions in self.captions]]
        sample = np.asarray(self.images[:: max(1, len(self.images) // 512)], dtype=np.float64) / 255
        self.mean, self.std = (np.round(f(sample, axis=(0, 1, 2)), 3).tolist() for f in (np.mean, np.std))

    def picture(self, index: int) -> np.ndarray:
        """[128, 128, 3] uint8."""
        return np.asarray(self.images[index] if index < len(self.images) else self.drawings[index - len(self.images)])

    def text(self, index: int, source: np.random.Generator) -> tuple[str, bool]:
        """A text that fits a picture, and whether it is the full name."""
        captions = self.captions[index]
        known, draw = self.material.keywords.get(without_tone(captions[0]), []), source.random()
        if draw < KEYWORD_SHARE and known:
            some = [known[i] for i in source.permutation(len(known))[: source.integers(1, 5)]]
            return " ".join([captions[0], *some[:2]] if source.random() < 0.5 else some), False
        if draw < KEYWORD_SHARE + ALIAS_SHARE and len(captions) > 1:
            return captions[source.integers(1, len(captions))], False
        return captions[0], True

    def views(self, pictures: list[np.ndarray], mirror: bool, source: np.random.Generator) -> list[np.ndarray]:
        """The same crop, mirroring and light of several versions of one picture; each [64, 64, 3] float32 in 0..1."""
        side = pictures[0].shape[0]
        box: tuple[float, float, float, float] = (0, 0, side, side)
        if source.random() >= WHOLE_SHARE:
            width = source.uniform(0.875, 1.125) * side
            left, top = (MARGIN + (side - width) / 2 + source.uniform(-0.06, 0.06, 2) * side).clip(
                0, side + 2 * MARGIN - width
            )
            box = (left, top, left + width, top + width)
            pictures = [np.pad(p, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255) for p in pictures]
        light, tint = source.uniform(0.92, 1.05), source.uniform(0.97, 1.03, 3)
        made = []
        for picture in pictures:
            small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
            view = np.asarray(small, dtype=np.float32) / 255
            made.append(np.clip((view[:, ::-1] if mirror else view) * (light * tint), 0, 1).astype(np.float32))
        return made

    def damage(self, picture: np.ndarray, source: np.random.Generator) -> list[np.ndarray]:
        """A mildly and a more severely damaged copy, of one kind."""
        kind, (low, high) = source.integers(3), np.sort(source.uniform(0, 1, 2))
        if kind == 0:
            return [blurred(picture, 0.7 * 14.0**level) for level in (low, high)]
        other = self.picture(int(source.integers(len(self.captions)))) if kind == 1 else None
        state = source.integers(2**31)  # the severe copy moves the patches of the mild one, and more
        return [moved_patches(picture, 0.05 + 0.95 * level, np.random.default_rng(state), other) for level in (low, high)]

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``."""
        source = np.random.default_rng([self.seed, step])
        pick = source.choice(len(self.weights), self.size, replace=False, p=self.weights)
        versions: list[list[np.ndarray]] = [[], [], []]  # clean, mild, severe
        texts, full = [], []
        for place, index in enumerate(pick.tolist()):
            text, whole = self.text(index, source)
            texts.append(text)
            full.append(whole)
            pictures = [self.picture(index)]
            if place < self.damaged:
                pictures += self.damage(pictures[0], source)
            mirror = source.random() < 0.5 and may_mirror(self.captions[index][0] + " " + text)
            for some, view in zip(versions, self.views(pictures, mirror, source), strict=False):
                some.append(view)
        tokens = dict(self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_WORDS, return_tensors="pt"))
        unknown = torch.from_numpy(source.random(tokens["input_ids"].shape) < UNKNOWN_SHARE)
        tokens["input_ids"][unknown & (tokens["input_ids"] >= len(SPECIAL))] = SPECIAL.index("<unk>")
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        pixels, fits = self.normalised([*versions[0], *versions[1], *versions[2]]), self.fitting(pick.tolist(), texts, full)
        return Batch(pixels, inputs, fits, self.meanings[pick])

    def normalised(self, views: Sequence[np.ndarray]) -> Tensor:
        """Model inputs [N, 3, 64, 64] of pictures in 0..1."""
        pixels = (np.stack(views) - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    def fitting(self, pick: list[int], texts: list[str], full: list[bool]) -> Tensor:
        """[B, B], whether text i fits picture j: same name or text, or same concept and a text that names no tone."""
        names, concepts = ([column[i] for i in pick] for column in ([c[0] for c in self.captions], self.concepts))
        rows = [
            [a == b or x == y or (c == d and not whole) for b, y, d in zip(names, texts, concepts, strict=True)]
            for a, x, c, whole in zip(names, texts, concepts, full, strict=True)
        ]
        return torch.tensor(rows)


def soft_cross_entropy(logits: Tensor, fits: Tensor, meanings: Tensor) -> Tensor:
    """Mean cross-entropy of the rows of ``logits`` [B, B + ...], whose own column is most of the target.

    The rest of it goes to columns of like ``meanings`` [B, E]; other columns that fit, by ``fits`` [B, B], are left out.
    """
    own = torch.eye(len(logits), dtype=torch.bool)
    skipped = fits & ~own
    likeness = (meanings @ meanings.T / SOFT_TEMPERATURE).masked_fill(skipped, -torch.inf).softmax(1)
    targets = SOFT_SHARE * likeness + (1 - SOFT_SHARE) * own.float()
    hidden = F.pad(skipped, (0, logits.shape[1] - len(logits)))
    laws = logits.masked_fill(hidden, -torch.inf).log_softmax(1)[:, : len(logits)]
    return -(targets * laws.masked_fill(skipped, 0)).sum(1).mean()


def scorer_loss(model: CLIPModel, batch: Batch, damaged: int) -> tuple[Tensor, Tensor]:
    """Two losses: symmetric InfoNCE, damaged copies among the negatives of a text, and -log p of the order by damage.

    The order is that of Plackett and Luce: first the clean picture, then the mild damage, then the severe one.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
        texts, pictures = features(model, **batch.texts), features(model, batch.pixels)
    size = len(texts)
    scores, scale = texts @ pictures.T, model.logit_scale.exp().clamp(max=LARGEST_SCALE)
    contrast = soft_cross_entropy(scale * scores, batch.fits, batch.meanings)
    contrast = (contrast + soft_cross_entropy(scale * scores[:, :size].T, batch.fits.T, batch.meanings)) / 2
    if not damaged:
        return contrast, contrast.new_zeros(())
    rows = torch.arange(damaged)[:, None]
    own = RANK_SCALE * scores[rows, rows + torch.tensor([0, size, size + damaged])]  # clean, mild, severe
    rank = own.logsumexp(1) - own[:, 0] + own[:, 1:].logsumexp(1) - own[:, 1]
    return contrast, rank.mean()


def relation_loss(model: CLIPModel, vectors: Tensor, source: torch.Generator) -> Tensor:
    """KL from how alike random words are to how alike their text features are: keeps unseen words in place."""
    words = torch.randint(len(SPECIAL), len(vectors), (RELATION_WORDS,), generator=source)
    ids = torch.full((RELATION_WORDS, 3), EOS)
    ids[:, 0], ids[:, 1] = SPECIAL.index("<s>"), words
    mine = features(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    known = F.normalize(vectors[words], dim=-1)
    hidden = words[:, None] == words
    laws = [(x @ x.T / RELATION_TEMPERATURE).masked_fill(hidden, -1e4).log_softmax(1) for x in (known, mine)]
    return F.kl_div(laws[1], laws[0], log_target=True, reduction="batchmean")


def make_optimizers(model: CLIPModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for what is left; the word table is frozen."""
    matrices: list[Any] = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def train_scorer(
    data: EmojiData,
    material: Material,
    out: Path,
    minutes: float = 30,
    batch: int = 128,
    damaged: int = 32,
    lr: float = 4e-3,
    size: ScorerSize | None = None,
    seed: int = 0,
    save_minutes: float = 3,
) -> CLIPModel:
    """Train (or go on training) emoji-CLIP and save it to ``out/scorer``.

    Args:
        data: emoji-128; only the part that is not held out is trained on.
        material: of :func:`arsd.training.scorer_data.prepare_material`.
        out: run folder; ``checkpoint.pt`` in it is resumed.
        minutes: time budget, over all resumed runs.
        batch: pictures per step.
        damaged: how many of them also come damaged, twice.
        lr: peak learning rate.
        size: of the model.
        seed: of weights and batches.
        save_minutes: minutes between checkpoints.

    Returns:
        The averaged model, float32.

    Raises:
        DataError: for sizes that make no sense, or a run folder of another configuration.
    """
    size = size or ScorerSize()
    if not minutes > 0 or not 0 <= damaged <= batch or batch < 2:
        raise DataError(
            f"minutes ({minutes}) must be positive, batch ({batch}) at least 2 and damaged ({damaged}) at most that"
        )
    known = data.subset(False)
    if batch > len(known.captions):
        raise DataError(f"a batch of {batch} needs as many training pictures, and there are {len(known.captions)}")
    claim_folder(
        out, {"data": data_hash(data), "size": vars(size), "batch": batch, "damaged": damaged, "lr": lr, "seed": seed}
    )
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(material.words)
    model = build_scorer(size, material.vectors)
    batches = Batches(known, material, tokenizer, batch, damaged, seed)
    run = Run(out, model, make_optimizers(model, lr), lr, minutes)
    while run.begin_step():
        drawn = batches(run.step)
        source = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
        contrast, rank = scorer_loss(model, drawn, damaged)
        relation = relation_loss(model, material.vectors, source)
        scale = model.logit_scale.detach().exp()
        figures = {"rank": float(rank.detach()), "relation": float(relation.detach()), "scale": float(scale)}
        run.finish_step(contrast, rank, RELATION_WEIGHT * relation, **figures)
        if run.due(save_minutes):
            run.save()
            run.log(held_out=held_out_recall(averaged(run, size, material.vectors), tokenizer, batches, data.subset(True)))
    model = averaged(run, size, material.vectors)
    ship_scorer(model, tokenizer, batches, out / "scorer")
    return model


def averaged(run: Run, size: ScorerSize, vectors: Tensor) -> CLIPModel:
    """The model of the averaged weights."""
    model = build_scorer(size, vectors)
    model.load_state_dict(run.average.values)
    return model.eval()


def recall(scores: Tensor, k: int = 5) -> float:
    """Share of rows of ``scores`` [N, N] whose own column is among the k largest."""
    own = scores.diagonal()[:, None]
    return float(((scores > own).sum(1) < k).double().mean())


@torch.no_grad()
def held_out_recall(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, batches: Batches, held_out: EmojiData
) -> dict[str, float]:
    """Top-5 recall over one picture of each held-out concept, by name: text to image and image to text."""
    first = {concept: index for index, concept in reversed(list(enumerate(held_out.concepts)))}
    rows = sorted(first.values())
    if not rows:
        return {}
    small = [Image.fromarray(np.asarray(held_out.images[i])).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in rows]
    pixels = batches.normalised([np.asarray(picture, dtype=np.float32) / 255 for picture in small])
    words = tokenizer([held_out.captions[i][0] for i in rows], padding=True, truncation=True, return_tensors="pt")
    texts = features(model, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    scores = texts @ features(model, pixels).T
    return {"text_to_image": round(recall(scores), 4), "image_to_text": round(recall(scores.T), 4)}


def ship_scorer(model: Any, tokenizer: PreTrainedTokenizerFast, batches: Batches, folder: Path) -> None:
    """Save model (float16), tokenizer and image processor as transformers loads them."""
    copy = CLIPModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        resample=Image.Resampling.BICUBIC,
        image_mean=batches.mean,
        image_std=batches.std,
    ).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
