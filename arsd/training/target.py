"""Stage ``target``: train the text encoder and the autoregressive transformer of emoji-128 jointly on VQ tokens.

A share of the input tokens is replaced by random ones (0-25 %, drawn per picture). The labels stay clean, so the model
learns to read a noisy context, which is what a Jacobi iterate is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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
from arsd.training.common import (
    Muon,
    Run,
)
from arsd.training.data import EmojiData
from arsd.training.vq import shifted, to_tensor

CONDITION_TOKENS = 16
CAPTION_DIM = 256
NULL_SHARE = 0.1
ALIAS_SHARE = 0.2
MAX_CORRUPTION = 0.25
VARIANTS = ((0, 0, False), (0, 0, True))  # (right, down, mirrored); more of them ask for more training
_HANDED = re.compile(
    r"left|right|arrow|clock|flag|button|letter|index|input|keycap|number|text|mark|sign|up!|abc|symbol", re.I
)
SHEET_PROMPTS = (
    "red apple", "dog face", "sunflower", "police car", "smiling face with sunglasses", "pizza", "rocket", "blue heart",
    "owl", "woman firefighter medium skin tone", "hamburger", "octopus", "burrito", "guitar", "snowman", "cat face",
)  # fmt: skip


def build_tokenizer(captions: list[list[str]]) -> PreTrainedTokenizerFast:
    """Lower-case word-level tokenizer over all words of the captions, ``</s>`` at the end, ``<unk>`` for other words."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\w']+"), "removed")
    words: set[str] = set()
    for name in (name for names in captions for name in names):
        assert tokenizer.normalizer is not None and tokenizer.pre_tokenizer is not None
        text = tokenizer.normalizer.normalize_str(name)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    vocab = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer.model = WordLevel(vocab, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class EmojiModel(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, words: int, layers: int, width: int, vocab: int) -> None:
        super().__init__()
        self.text = T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=CAPTION_DIM,
                d_kv=64,
                d_ff=512,
                num_layers=3,
                num_heads=4,
                dropout_rate=0.1,
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
            sampling={"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        )

    def forward(self, words: Tensor, mask: Tensor, null: Tensor, fed: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the clean ``ids`` [B, 256] given the fed ones; rows in ``null`` [B] lose their caption."""
        features, kept = left_align(self.text(input_ids=words, attention_mask=mask).last_hidden_state, mask)
        condition = self.transformer.embed_captions(features, kept)
        condition = torch.where(null[:, None, None], self.transformer.embed_null_caption(len(ids)), condition)
        logits = self.transformer(condition, fed, kept)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


@dataclass
class TokenData:
    """Tokens [N, variants, 256] of augmented training pictures, and which variants are mirrored."""

    ids: np.ndarray

    @classmethod
    def make(cls, data: EmojiData, vq: VQTokenizer, cache: Path) -> TokenData:
        """Encode every picture in every variant (cached on disk)."""
        if cache.is_file() and np.load(cache, mmap_mode="r").shape[:2] == (len(data.images), len(VARIANTS)):
            return cls(np.load(cache))
        out = np.zeros((len(data.images), len(VARIANTS), 256), dtype=np.int16)
        for start in range(0, len(data.images), 32):
            images = to_tensor(data.images[start : start + 32])
            for v, (dx, dy, flip) in enumerate(VARIANTS):
                out[start : start + 32, v] = vq.encode(shifted(images, dx, dy, flip)).flatten(1).numpy()
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, out)
        return cls(out)


class Batches:
    """Draws training batches: weighted pictures, variants, captions or aliases, dropped captions, corrupted input tokens."""

    def __init__(self, data: EmojiData, tokens: TokenData, tokenizer: Any, vocab: int, size: int) -> None:
        self.data, self.tokenizer, self.vocab, self.size = data, tokenizer, vocab, size
        self.ids, self.weights = torch.from_numpy(tokens.ids), torch.from_numpy(data.weights)
        self.handed = torch.tensor([bool(_HANDED.search(names[0])) for names in data.captions])
        self.mirrored = torch.tensor([flip for _, _, flip in VARIANTS])
        self.generator = torch.Generator()

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Words and mask [B, 16], rows without caption [B], fed and clean tokens [B, 256]."""
        size, source = self.size, self.generator
        pick = torch.multinomial(self.weights, size, replacement=True, generator=source)
        variant = torch.randint(len(VARIANTS), (size,), generator=source)
        variant = torch.where(self.handed[pick] & self.mirrored[variant], 0, variant)
        alias = torch.rand(size, generator=source) < ALIAS_SHARE
        captions = [self.data.captions[i][-1 if a else 0] for i, a in zip(pick.tolist(), alias.tolist(), strict=True)]
        words, mask = tokenize_captions(self.tokenizer, captions, CONDITION_TOKENS, "cpu")
        null = torch.rand(size, generator=source) < NULL_SHARE
        clean = self.ids[pick, variant].long()
        return words, mask, null, corrupted(clean, self.vocab, source), clean


def corrupted(ids: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """``ids`` [B, T] with a share of 0..25 % (drawn per picture) replaced by uniformly random codes."""
    share = MAX_CORRUPTION * torch.rand(len(ids), 1, generator=generator)
    noise = torch.randint(vocab, ids.shape, generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < share, noise, ids)


def _optimizers(model: EmojiModel, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.transformer.lm.model.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)]


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
    batch: int = 24,
    lr: float = 3e-3,
    layers: int = 6,
    width: int = 384,
    seed: int = 0,
    sheet_minutes: float = 12,
    init: Path | None = None,
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
    batches = Batches(train, TokenData.make(train, vq, out / "train.npy"), tokenizer, len(vq.codebook), batch)
    test_ids = torch.from_numpy(TokenData.make(test, vq, out / "test.npy").ids[:, 0]).long()
    model = EmojiModel(len(tokenizer), layers, width, len(vq.codebook)).train()
    if init is not None:
        _start_from(model, init)
    run = Run(out, model, _optimizers(model, lr), lr, minutes)
    batches.generator.manual_seed(seed + run.step)
    compiled: Any = torch.compile(model)

    def averaged() -> LlamaGenPipeline:
        copy = EmojiModel(len(tokenizer), layers, width, len(vq.codebook)).eval()
        copy.load_state_dict(run.average.values)
        return LlamaGenPipeline(transformer=copy.transformer, vq=vq, tokenizer=tokenizer, text_encoder=copy.text)

    while run.begin_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = compiled(*batches.draw())
        run.finish_step(loss)
        if run.due(sheet_minutes):
            run.save()
            pipe = averaged()
            run.log(held_out_loss=_held_out_loss(pipe, test, test_ids))
            result: Any = pipe(list(SHEET_PROMPTS), generator=torch.Generator().manual_seed(0), progress=False)
            run.log(sheet_tokens_per_pass=result.stats.tokens_per_pass)
            (out / "sheets").mkdir(exist_ok=True)
            contact_sheet(result.images, SHEET_PROMPTS, columns=8).save(out / "sheets" / f"{run.step:06d}.png")
            pipe.save_pretrained(out / "pipeline")
    return averaged()


def ship(pipe: LlamaGenPipeline, folder: Path) -> None:
    """Save a pipeline in bfloat16 for distribution: readable by everybody, without the paths of this machine."""
    pipe.to(torch.bfloat16).save_pretrained(folder)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o644)
        if path.suffix == ".json" and path.name != "tokenizer.json":
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def _held_out_loss(pipe: LlamaGenPipeline, test: EmojiData, ids: Tensor) -> float:
    features, mask = pipe.encode_prompt([names[0] for names in test.captions])
    logits = pipe.transformer(pipe.transformer.embed_captions(features, mask), ids, mask)
    return float(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
