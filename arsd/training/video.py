"""Stage ``video``: train the transformer of emoji-video on the tokens of clips.

The first frame is a picture like those of emoji-128, and what helped there helps here: the text encoder is that of emoji-128
and stays as it is (its slots say what belongs in each row), many first frames begin as another clip's, and some tokens are
random, as in a Jacobi iterate. Later frames are mostly the one before; what moves in them is learned from whole clips, while
most steps look at few frames of many clips, since names and looks take longest to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arsd.devices import has_fast_bfloat16
from arsd.errors import DataError
from arsd.models.cosmos import CosmosTransformer
from arsd.pipelines.auto import AutoARPipeline
from arsd.pipelines.cosmos import CosmosARPipeline
from arsd.sheets import contact_sheet
from arsd.tokenizers.vq import VQTokenizer
from arsd.training.clips import ClipData
from arsd.training.common import Muon, Run
from arsd.training.video_tokens import CLIP_FRAMES, SIDE, ClipTokens, tokenise

NULL_SHARE = 0.15
PLAIN_SHARE = 0.25  # of the clips that begin with a picture as the tokenizer encodes it
SPOILT_SHARE = 0.7  # of the first frames: up to all of their input tokens are another clip's or random
STEPS = ((0.5, 2, 20), (0.3, 4, 10), (0.2, CLIP_FRAMES, 5))  # share of the steps, frames, clips
FRAME_RATE = 4.0
PROBE = 24
SHEET_PROMPTS = (
    "winking face", "red heart", "rocket", "dog face", "waving hand", "pizza", "face with tears of joy", "clapping hands",
)  # fmt: skip


def make_transformer(vocab: int, width: int = 256, layers: int = 4) -> CosmosTransformer:
    """The transformer of emoji-video."""
    grid = SIDE // 8
    return CosmosTransformer(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        intermediate_size=2 * width,
        frames=CLIP_FRAMES,
        rows=grid,
        columns=grid,
        rope_base=100.0,
        norm_eps=1e-5,
        condition_tokens=32,
        caption_dim=256,
        sampling={"guidance_scale": 1.5, "temperature": 0.9, "top_k": 128, "top_p": 1.0},
        frame_rate=FRAME_RATE,
    )


class ClipBatches:
    """Draws training batches of clips: captions, spoilt input tokens, clean labels."""

    def __init__(self, data: ClipData, tokens: ClipTokens, features: Tensor, masks: Tensor, vocab: int) -> None:
        self.tokens, self.features, self.masks, self.vocab = tokens, features, masks, vocab
        self.weights = torch.from_numpy(data.weights)
        self.generator = torch.Generator()

    def draw(self) -> tuple[Tensor, ...]:
        """Features [B, 32, C], mask [B, 32], rows without caption [B], fed tokens and labels [B, T * P] (-100: none)."""
        shares = torch.tensor([share for share, _, _ in STEPS])
        _, frames, size = STEPS[int(torch.multinomial(shares, 1, generator=self.generator))]
        pick = torch.multinomial(self.weights, size, replacement=True, generator=self.generator)
        plain = torch.rand(size, generator=self.generator) < PLAIN_SHARE
        clean = torch.where(plain[:, None, None], self.tokens.plain[pick], self.tokens.tokens[pick])[:, :frames]
        null = torch.rand(size, generator=self.generator) < NULL_SHARE
        labels = clean.clone()
        labels[plain, 0] = -100
        fed = spoilt(clean, null | plain, self.vocab, self.generator)
        whole = null & (torch.rand(size, generator=self.generator) < 0.5)  # no caption at all
        masks = self.masks[pick].masked_fill(whole[:, None], 1)
        return self.features[pick].float(), masks, null, fed.flatten(1), labels.flatten(1)


def spoilt(clips: Tensor, keep: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """What a model is fed in place of ``clips`` [B, T, P].

    First frames: 70 % are spoilt by a share between none and all, half of these begin as the clip's of the row before and
    change over to their own, a quarter is mixed with it place by place, a quarter with random codes; those in ``keep`` [B]
    are not. Later frames: 0-30 % of the tokens fall back to the frame before, and 0-10 % are random.
    """
    batch, frames, places = clips.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    noise = torch.randint(vocab, clips.shape, generator=generator)
    stale = torch.cat([clips[:, :1], clips[:, :-1]], dim=1)
    fed = torch.where(uniform(*clips.shape) < 0.3 * uniform(batch, 1, 1), stale, clips)
    fed = torch.where(uniform(*clips.shape) < 0.1 * uniform(batch, 1, 1), noise, fed)
    first, kind = clips[:, 0], uniform(batch, 1)
    share = torch.where((uniform(batch, 1) < SPOILT_SHARE) & ~keep[:, None], uniform(batch, 1), 0.1 * uniform(batch, 1))
    order = torch.where(kind < 0.5, torch.linspace(0, 1, places + 1)[:-1], uniform(batch, places))
    other = torch.where((kind < 0.75) & ~keep[:, None], first.roll(1, 0), noise[:, 0])
    fed[:, 0] = torch.where(order < share, other, first)
    return fed


class VideoModel(nn.Module):
    """The loss of the transformer, for one compiled call."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.transformer = make_transformer(vocab)

    def forward(self, features: Tensor, mask: Tensor, null: Tensor, fed: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labels."""
        condition = self.transformer.embed_captions(features, mask)
        condition = torch.where(null[:, None, None], self.transformer.embed_null_caption(len(fed)), condition)
        logits = self.transformer(fed, condition, mask)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


@torch.no_grad()
def caption_features(pipe: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    """Features [N, 32, C] in half precision and masks [N, 32] of captions, by the text encoder of emoji-128."""
    known = {name: pipe.encode_prompt(name) for name in dict.fromkeys(names)}
    return torch.cat([known[n][0] for n in names]).half(), torch.cat([known[n][1] for n in names])


def _optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers and caption projection, AdamW for the rest."""
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    matrices = [p for m in linears for p in m.parameters()]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)]


def train_video(
    clips_dir: Path,
    vq_dir: Path,
    out: Path,
    minutes: float = 180,
    lr: float = 3e-3,
    seed: int = 0,
    sheet_minutes: float = 10,
) -> CosmosARPipeline:
    """Train (or go on training) the transformer; writes checkpoints, a log, sample sheets and ``out/pipeline``.

    Args:
        clips_dir: folder made by ``arsd train clips``.
        vq_dir: tokenizer folder made by ``arsd train video-vq``.
        out: run folder; an existing ``checkpoint.pt`` in it is resumed.
        minutes: whole time budget, over all resumed runs; the learning rate is annealed over it.
        lr: peak learning rate, of Muon and AdamW alike.
        seed: seed of weights and batches.
        sheet_minutes: minutes between checkpoints with sample sheets.

    Raises:
        DataError: for a budget that is none, or a folder without a tokenizer.
    """
    if not minutes > 0:
        raise DataError(f"minutes must be positive, not {minutes}")
    if not (Path(vq_dir) / "config.json").is_file():
        raise DataError(f"no tokenizer in {vq_dir}: run `arsd train video-vq` first")
    torch.manual_seed(seed)
    vq, captioner = VQTokenizer.from_pretrained(vq_dir).eval(), AutoARPipeline.from_pretrained("emoji-128")
    data = ClipData.load(clips_dir)
    vocab, names = len(vq.codebook), [clip.name for clip in data.info]
    tokens = tokenise(data, vq, out)
    features, masks = caption_features(captioner, names)
    batches = ClipBatches(data, tokens, features, masks, vocab)
    model = VideoModel(vocab).train()
    run = Run(out, model, _optimizers(model, lr), lr, minutes)
    batches.generator.manual_seed(seed + run.step)
    compiled: Any = torch.compile(model, dynamic=False)

    def averaged() -> CosmosARPipeline:
        copy = VideoModel(vocab).eval()
        copy.load_state_dict(run.average.values)
        text = {"tokenizer": captioner.tokenizer, "text_encoder": captioner.text_encoder}
        return CosmosARPipeline(copy.transformer, vq, **text)

    held_out = torch.from_numpy(data.indices(True))
    probe = torch.from_numpy(np.random.default_rng(0).permutation(data.indices(False))[:PROBE])
    while run.begin_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = compiled(*batches.draw())
        run.finish_step(loss)
        if run.due(sheet_minutes):
            run.save()
            pipe = averaged()
            for name, chosen in (("probe", probe), ("held_out", held_out)):
                figures = clip_losses(pipe.transformer, features[chosen].float(), masks[chosen], tokens.tokens[chosen])
                run.log(**{f"{name}_{k}": v for k, v in figures.items()})
            made: Any = pipe(list(SHEET_PROMPTS), generator=torch.Generator().manual_seed(0), progress=False)
            run.log(sheet_tokens_per_pass=made.stats.tokens_per_pass)
            (out / "sheets").mkdir(exist_ok=True)
            pictures = [frame for clip in made.frames for frame in clip]
            labels = [name if t == 0 else "" for name in SHEET_PROMPTS for t in range(CLIP_FRAMES)]
            contact_sheet(pictures, labels, columns=CLIP_FRAMES).save(out / "sheets" / f"{run.step:06d}.png")
            pipe.save_pretrained(out / "pipeline")
    return averaged()


@torch.no_grad()
def clip_losses(transformer: CosmosTransformer, features: Tensor, masks: Tensor, tokens: Tensor) -> dict[str, float]:
    """Teacher-forced loss in nats per token of clips [N, T, P]: first and later frames, with and without caption."""
    own, null = transformer.embed_captions(features, masks), transformer.embed_null_caption(len(features))
    first = tokens.shape[2]
    found = {}
    for name, condition in (("own", own), ("null", null)):
        logits = transformer(tokens.flatten(1), condition, masks)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens.flatten(1), reduction="none")
        found[f"first_{name}"] = float(losses[:, :first].mean())
        found[f"later_{name}"] = float(losses[:, first:].mean())
    return found
