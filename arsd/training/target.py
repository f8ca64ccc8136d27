"""Stage ``target``: train the text encoder and the autoregressive transformer of emoji-128 jointly on VQ tokens.

What a caption tells about its picture is some 8 nats of 500, too faint a signal for a short training: the model reads
the tokens drawn so far and leaves the caption aside. Four things make it audible. Every caption ends in a slot for each
row of the picture: a name of one word would otherwise be one vector, which cannot tell 256 places what belongs there. The
row slots must also predict their row, linearly; the text encoder learns that alone before the
transformer joins. The input is spoilt while the labels stay clean: many pictures begin as another one, so that the
model learns to believe its caption rather than what has been drawn, and some tokens are random, as in a Jacobi iterate.
And the condition slots have keys, unlike LlamaGen's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from arsd.devices import has_fast_bfloat16
from arsd.errors import DataError
from arsd.models.captions import left_align, tokenize_captions
from arsd.models.llamagen import LlamaGenTransformer
from arsd.pipelines.auto import AutoARPipeline
from arsd.pipelines.llamagen import LlamaGenPipeline
from arsd.sheets import contact_sheet
from arsd.tokenizers.vq import VQTokenizer
from arsd.training.common import Muon, Run, learning_rate_factor, log_line
from arsd.training.data import EmojiData
from arsd.training.vq import to_tensor

ROWS = 16
CONDITION_TOKENS = 16 + ROWS
CAPTION_DIM = 256
CODE_DIM = 8
CAPTION_BATCH = 64  # captions are short, so many of them are cheap
RATE = 0.02
NULL_SHARE = 0.1
ALIAS_SHARE = 0.2
SPOILT_SHARE = 0.8  # of the pictures with a caption: up to all of their input tokens are replaced
PROBE = 48  # training pictures whose loss with and without caption is logged
SHEET_PROMPTS = (
    "red apple", "dog face", "sunflower", "police car", "smiling face with sunglasses", "pizza", "rocket", "blue heart",
    "owl", "woman firefighter medium skin tone", "hamburger", "octopus", "burrito", "guitar", "snowman", "cat face",
)  # fmt: skip


def build_tokenizer(captions: list[list[str]], rows: int = ROWS) -> PreTrainedTokenizerFast:
    """Lower-case word-level tokenizer over all words of the captions, ``<unk>`` for other words.

    A caption ends in ``</s>`` and one token for each row of the picture.
    """
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\w']+"), "removed")
    words: set[str] = set()
    for name in (name for names in captions for name in names):
        assert tokenizer.normalizer is not None and tokenizer.pre_tokenizer is not None
        text = tokenizer.normalizer.normalize_str(name)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    slots = [f"<row_{row}>" for row in range(rows)]
    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words), *slots])}
    tokenizer.model = WordLevel(vocab, unk_token="<unk>")
    tail = ["</s>", *slots]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(["$A", *tail]), special_tokens=[(token, vocab[token]) for token in tail]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=slots
    )


class EmojiModel(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, words: int, layers: int, width: int, vocab: int) -> None:
        super().__init__()
        self.text = T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=CAPTION_DIM,
                d_kv=64,
                d_ff=1024,
                num_layers=4,
                num_heads=4,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
            )  # fmt: skip
        )
        self.transformer = LlamaGenTransformer(
            vocab_size=vocab,
            hidden_size=width,
            num_layers=layers,
            num_heads=width // 64,
            intermediate_size=256 * round(8 * width / 3 / 256),
            grid=16,
            condition="text",
            condition_tokens=CONDITION_TOKENS,
            caption_dim=CAPTION_DIM,
            condition_keys=True,
            sampling={"guidance_scale": 1.5, "temperature": 1.0, "top_k": 128, "top_p": 1.0},
        )
        self.picture = nn.Linear(width, 16 * CODE_DIM)  # for training only: a row of latents from its slot

    def embed(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Condition slots [B, 32, D] and their mask [B, 32] of captions, words and mask [B, 32]."""
        features, kept = left_align(self.text(input_ids=words, attention_mask=mask).last_hidden_state, mask)
        return self.transformer.embed_captions(features, kept), kept

    def picture_loss(self, words: Tensor, mask: Tensor, latents: Tensor) -> Tensor:
        """Mean squared error of the standardised ``latents`` [B, 2048] predicted from the row slots: 1 - R^2."""
        slots = self.embed(words, mask)[0][:, -ROWS:]
        return F.mse_loss(self.picture(F.rms_norm(slots, slots.shape[-1:])).flatten(1), latents)

    def forward(self, words: Tensor, mask: Tensor, null: Tensor, fed: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the clean ``ids`` [B, 256] given the fed ones; rows in ``null`` [B] lose their caption."""
        condition, kept = self.embed(words, mask)
        condition = torch.where(null[:, None, None], self.transformer.embed_null_caption(len(ids)), condition)
        logits = self.transformer(condition, fed, kept)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def encode_pictures(data: EmojiData, vq: VQTokenizer, cache: Path, counts: Tensor | None = None) -> Tensor:
    """Tokens [N, 256] of all pictures (cached on disk), see :func:`quantise`."""
    if cache.is_file() and np.load(cache, mmap_mode="r").shape == (len(data.images), 256):
        return torch.from_numpy(np.load(cache)).long()
    with torch.no_grad():
        chunks = [vq.latents(to_tensor(data.images[i : i + 32])).flatten(0, 2) for i in range(0, len(data.images), 32)]
        ids = quantise(torch.cat(chunks), vq.codebook, RATE, counts).view(-1, 256)
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, ids.numpy().astype(np.int16))
    return ids


def quantise(latents: Tensor, codebook: Tensor, rate: float, counts: Tensor | None = None, rounds: int = 12) -> Tensor:
    """Ids [M] of ``latents`` [M, C]: the code c with the least |z - c|^2 - rate * log p(c).

    Entropy-constrained vector quantisation (Chou, Lookabaugh and Gray 1989) with a fixed codebook. Many codes look alike,
    and which of them the nearest is depends on the rest of the picture, through the group norms of the encoder: plain
    white takes 330 of them, at 5 nats per token. What a picture is can be read off such noise, and a model that
    learns to do so needs no caption.

    Args:
        latents: unit vectors.
        codebook: unit vectors [K, C].
        rate: squared distance that is worth a nat; 0 is plain quantisation.
        counts: how often each code is used, [K]; found by iteration when not given.
        rounds: of that iteration.
    """

    def assign(prices: Tensor) -> Tensor:
        return torch.cat([(prices - 2 * chunk @ codebook.T).argmin(-1) for chunk in latents.split(1 << 16)])

    def prices(counts: Tensor) -> Tensor:
        return -rate * ((counts + 0.05) / (counts + 0.05).sum()).log()

    if counts is not None:
        return assign(prices(counts))
    ids = assign(torch.zeros(len(codebook)))
    for _ in range(rounds if rate else 0):
        ids = assign(prices(torch.bincount(ids, minlength=len(codebook)).float()))
    return ids


class Batches:
    """Draws training batches: weighted pictures, captions or aliases, dropped captions, corrupted input tokens."""

    def __init__(self, data: EmojiData, ids: Tensor, tokenizer: Any, codebook: Tensor) -> None:
        self.data, self.ids, self.tokenizer, self.vocab = data, ids, tokenizer, len(codebook)
        self.weights = torch.from_numpy(data.weights)
        latents = codebook[ids].flatten(1)
        self.latents = latents - latents.mean(0)
        self.latents /= self.latents.square().mean().sqrt().clamp_min(1e-6)
        self.generator = torch.Generator()

    def draw_captions(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B] and the words and mask [B, 32] of one caption of each."""
        pick = torch.multinomial(self.weights, size, replacement=True, generator=self.generator)
        alias = torch.rand(size, generator=self.generator) < ALIAS_SHARE
        captions = [self.data.captions[i][-1 if a else 0] for i, a in zip(pick.tolist(), alias.tolist(), strict=True)]
        return pick, *tokenize_captions(self.tokenizer, captions, CONDITION_TOKENS, "cpu")

    def draw_pictures(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Words and mask [B, 32] of captions and the latents [B, 2048] of their pictures."""
        pick, words, mask = self.draw_captions(size)
        return words, mask, self.latents[pick]

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Words and mask [B, 32], rows without caption [B], fed and clean tokens [B, 256]."""
        pick, words, mask = self.draw_captions(size)
        null = torch.rand(size, generator=self.generator) < NULL_SHARE
        clean = self.ids[pick]
        return words, mask, null, corrupted(clean, null, self.vocab, self.generator), clean


def corrupted(ids: Tensor, null: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """What a model is fed in place of ``ids`` [B, T]: some tokens replaced, at the same positions.

    80 % of the rows are spoilt by a share between none and all of their tokens: half of these start as the picture of the
    row before and change over to their own, a quarter is mixed with it token by token, a quarter with random codes. The
    other rows, and all in ``null`` [B], whose caption could not tell the pictures apart, lose 0-20 % to random codes.
    """
    size = (len(ids), 1)
    spoilt = (torch.rand(size, generator=generator) < SPOILT_SHARE) & ~null[:, None]
    kind = torch.rand(size, generator=generator)
    share = torch.rand(size, generator=generator)
    share = torch.where(spoilt, share, 0.2 * share)
    order = torch.rand(ids.shape, generator=generator)
    order = torch.where(spoilt & (kind < 0.5), torch.linspace(0, 1, ids.shape[1] + 1)[:-1], order)
    noise = torch.randint(vocab, ids.shape, generator=generator)
    other = torch.where(spoilt & (kind < 0.75), ids.roll(1, 0), noise)
    return torch.where(order < share, other, ids)


def _optimizers(model: EmojiModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of decoder, caption projection and text encoder, AdamW for the rest.

    Under AdamW at this learning rate the projection, which has no bias, grew one direction common to all captions: slots
    of norm 481, with a mean cosine of 0.86 between captions.
    """
    parts = (model.transformer.lm.model.layers, model.transformer.caption_projection, model.text.encoder.block)
    linears = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    matrices = [p for m in linears for p in m.parameters()]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)]


def teach_captions(model: EmojiModel, batches: Batches, lr: float, steps: int, size: int = CAPTION_BATCH) -> float:
    """Train text encoder and caption projection alone to predict pictures; returns the mean loss of the last 20 steps."""
    optimizers, losses = _optimizers(model, lr), []
    for step in range(steps):
        loss = model.picture_loss(*batches.draw_pictures(size))
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(step, step / steps, warmup=20)
            optimizer.step()
        losses.append(float(loss.detach()))
    model.zero_grad(set_to_none=True)
    return sum(losses[-20:]) / len(losses[-20:])


def _start_from(model: EmojiModel, folder: Path) -> None:
    pipe: Any = AutoARPipeline.from_pretrained(folder)
    try:
        model.text.load_state_dict(pipe.text_encoder.state_dict())
        model.transformer.load_state_dict(pipe.transformer.state_dict())
    except RuntimeError as error:
        raise DataError(f"{folder} does not fit this data and these sizes: {str(error).splitlines()[-1].strip()}") from None


def train_target(
    data_dir: Path,
    vq_dir: Path,
    out: Path,
    minutes: float = 90,
    batch: int = 16,
    lr: float = 3e-3,
    layers: int = 6,
    width: int = 384,
    seed: int = 0,
    sheet_minutes: float = 12,
    init: Path | None = None,
    caption_steps: int = 500,
) -> LlamaGenPipeline:
    """Train (or go on training) text encoder and transformer; writes checkpoints, a log, sample sheets and ``out/pipeline``.

    Args:
        data_dir: folder made by ``arsd train data``.
        vq_dir: tokenizer folder made by ``arsd train vq``.
        out: run folder; an existing ``checkpoint.pt`` in it is resumed.
        minutes: whole time budget, over all resumed runs; the learning rate is annealed over it.
        batch: pictures per step.
        lr: peak learning rate, of Muon (decoder matrices) and AdamW (everything else) alike.
        layers: decoder layers.
        width: model width, a multiple of 64.
        seed: seed of weights and batches.
        sheet_minutes: minutes between checkpoints with sample sheets.
        init: pipeline folder whose text encoder and transformer to start from (same data and sizes), without its optimizer.
        caption_steps: steps in which text encoder and caption projection first learn alone.
    """
    if not minutes > 0 or width < 64 or width % 64 or layers < 1:
        raise DataError(f"minutes ({minutes}) and layers ({layers}) must be positive, width ({width}) a multiple of 64")
    if not (Path(vq_dir) / "config.json").is_file():
        raise DataError(f"no tokenizer in {vq_dir}: run `arsd train vq` first")
    torch.manual_seed(seed)
    vq = VQTokenizer.from_pretrained(vq_dir).eval()
    data = EmojiData.load(data_dir)
    train, test = data.subset(False), data.subset(True)
    tokenizer = build_tokenizer(train.captions)
    batches = Batches(train, encode_pictures(train, vq, out / "train.npy"), tokenizer, vq.codebook.detach())
    counts = torch.bincount(batches.ids.flatten(), minlength=len(vq.codebook)).float()
    test_ids = encode_pictures(test, vq, out / "test.npy", counts)
    model = EmojiModel(len(tokenizer), layers, width, len(vq.codebook)).train()
    if init is not None:
        _start_from(model, init)
    if caption_steps and not (out / "checkpoint.pt").is_file():
        batches.generator.manual_seed(seed)
        log_line(out, caption_steps=caption_steps, picture_loss=teach_captions(model, batches, lr, caption_steps))
    run = Run(out, model, _optimizers(model, lr), lr, minutes)
    batches.generator.manual_seed(seed + run.step)
    compiled: Any = torch.compile(model)

    def averaged() -> LlamaGenPipeline:
        copy = EmojiModel(len(tokenizer), layers, width, len(vq.codebook)).eval()
        copy.load_state_dict(run.average.values)
        return LlamaGenPipeline(transformer=copy.transformer, vq=vq, tokenizer=tokenizer, text_encoder=copy.text)

    probe = torch.from_numpy(np.random.default_rng(0).permutation(len(train.captions))[:PROBE])
    probe_names = [train.captions[i][0] for i in probe.tolist()]
    probe_ids = batches.ids[probe]
    while run.begin_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = compiled(*batches.draw(batch))
            picture_loss = model.picture_loss(*batches.draw_pictures(CAPTION_BATCH))
        run.finish_step(loss, picture_loss, picture_loss=float(picture_loss.detach()))
        if run.due(sheet_minutes):
            run.save()
            pipe = averaged()
            run.log(held_out_loss=caption_losses(pipe, [names[0] for names in test.captions], test_ids)["right"])
            run.log(**{f"probe_{k}": v for k, v in caption_losses(pipe, probe_names, probe_ids).items()})
            result: Any = pipe(list(SHEET_PROMPTS), generator=torch.Generator().manual_seed(0), progress=False)
            run.log(sheet_tokens_per_pass=result.stats.tokens_per_pass)
            (out / "sheets").mkdir(exist_ok=True)
            contact_sheet(result.images, SHEET_PROMPTS, columns=8).save(out / "sheets" / f"{run.step:06d}.png")
            pipe.save_pretrained(out / "pipeline")
    return averaged()


def ship(pipe: LlamaGenPipeline, folder: Path) -> None:
    """Save a pipeline in bfloat16 for distribution: readable by everybody, without the paths of this machine."""
    pipe.to(torch.bfloat16).save_pretrained(folder)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Files of a saved pipeline become readable by everybody and forget the paths of this machine."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o644)
        if path.suffix == ".json" and path.name != "tokenizer.json":
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def caption_losses(pipe: LlamaGenPipeline, captions: list[str], ids: Tensor) -> dict[str, float]:
    """Teacher-forced cross-entropy in nats per token of pictures ``ids`` [N, 256] given several captions.

    Returns:
        ``right``: their own captions; ``null``: the null caption; ``other``: the caption of the next picture. What a
        caption tells about its picture is 256 * (null - right) nats; about log(number of pictures) if it names just one.
    """
    features, mask = pipe.encode_prompt(captions)
    own = pipe.transformer.embed_captions(features, mask)
    cases = {
        "right": (own, ids, mask),
        "null": (pipe.transformer.embed_null_caption(len(ids)), ids, mask),
        "other": (own.roll(1, 0), ids, mask.roll(1, 0)),
        "strange": (own, ids.roll(1, 0), mask),
    }
    losses = {}
    for name, case in cases.items():
        logits = pipe.transformer(*case)
        losses[name] = float(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    return losses
