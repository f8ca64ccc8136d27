"""Stage ``video-chat``: train emoji-video-chat, a Video-LLM that tells what happens in a clip of an animated emoji.

The network is LLaVA-OneVision (arXiv 2408.03326) at toy size: a SigLIP tower reads 96-pixel frames, a projector and
2x2 pooling make 36 tokens of each, and a Qwen2 decoder with grouped queries answers. Answers are facts measured on the very
frames that are shown (:mod:`arsd.training.clip_facts`), so a clip can be shown in ever new ways.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Tokenizer,
)

from arsd.devices import has_fast_bfloat16
from arsd.errors import DataError
from arsd.run_folders import claim_folder
from arsd.training.clip_facts import facts_of, measure
from arsd.training.clip_texts import DESCRIBE, read
from arsd.training.clips import SIDE, ClipData, plain_view, show
from arsd.training.common import Muon, Run
from arsd.training.video_chat_data import (
    END,
    FOLLOWED,
    IGNORED,
    MEASURED,
    PAD,
    SPECIAL,
    VIDEO,
    Batch,
    Batches,
    build_chat_tokenizer,
    followed,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER_TOKENS = 256  # more than any description has
AVERAGE_DECAY = 0.99
SEEING_SHARE = 0.2  # of the time budget, in which the tower first learns to measure single frames


@dataclass(frozen=True)
class ChatSize:
    """Widths and depths; the defaults ship.

    Args:
        width: of the decoder.
        layers: of the decoder.
        heads: of its queries; there are half as many of keys and values.
        mlp: inner width of the decoder.
        vision_width: of the tower.
        vision_layers: of the tower.
        patch: pixels of a patch, of 96.
        vocabulary: tokens.
    """

    width: int = 192
    layers: int = 6
    heads: int = 4
    mlp: int = 512
    vision_width: int = 160
    vision_layers: int = 4
    patch: int = 8
    vocabulary: int = 1200


def build_model(size: ChatSize, vocabulary: int) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model with ``vocabulary`` tokens."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": size.vision_width,
        "intermediate_size": 4 * size.vision_width,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": max(1, size.vision_width // 32),
        "image_size": SIDE,
        "patch_size": size.patch,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        video_token_index=VIDEO,
        tie_word_embeddings=True,
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_aspect_ratio="anyres_max_1",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        places = model.model.vision_tower.embeddings.position_embedding.weight
        places.add_(place_table(SIDE // size.patch, size.vision_width))
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD, max_new_tokens=ANSWER_TOKENS)
    return model


def place_table(side: int, width: int) -> Tensor:
    """Smooth functions of row and column, [side * side, width], to add to the tower's untrained position table.

    Random tables left the tower blind to columns for an hour: centring and gravity tell rows by what is in them.
    """
    waves = torch.arange(1, side)
    basis = torch.cos(torch.pi * waves * (torch.arange(side)[:, None] + 0.5) / side) / waves  # [side, side - 1]
    grid = torch.cat([basis.repeat_interleave(side, 0), basis.repeat(side, 1)], 1)
    return 0.5 * grid @ torch.randn(grid.shape[1], width, generator=torch.Generator().manual_seed(0))


def build_processor(tokenizer: Qwen2Tokenizer, size: ChatSize) -> LlavaOnevisionProcessor:
    """Tokenizer, image and video processor, as transformers loads them."""
    pixels: dict[str, Any] = {
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[SIDE, SIDE]]),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // size.patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        chat_template=TEMPLATE,
    )


class Learner(nn.Module):
    """The model and two linear readers, of its visual tokens and of its decoder half way up, which are for training only."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.reader = nn.Linear(model.model.image_newline.numel(), MEASURED)
        self.follower = nn.Linear(model.model.image_newline.numel(), FOLLOWED)

    def see(self, pixels: Tensor, figures: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens [B, n T + 1, D] of clips [B, T, 3, 96, 96], and the error of the reader on each of them."""
        seen = self.model.model.get_video_features(pixels, return_dict=True).pooler_output
        tokens = (seen.shape[1] - 1) // pixels.shape[1]
        told = self.reader(seen[:, :-1]).float()
        return seen, F.smooth_l1_loss(told, figures.repeat_interleave(tokens, 1), beta=0.1)

    def forward(self, batch: Batch, seeing: bool = False) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the answers (0 while it learns ``seeing`` alone), and the error of the readers."""
        seen, error = self.see(batch.pixels, batch.measured)
        if seeing:
            return error.new_zeros(()), error
        words = self.model.get_input_embeddings()(batch.ids)
        start = int((batch.ids[0] == VIDEO).nonzero()[0])
        embedded = torch.cat([words[:, :start], seen.to(words.dtype), words[:, start + seen.shape[1] :]], 1)
        told = self.model.model.language_model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        middle = told.hidden_states[len(told.hidden_states) // 2][:, start : start + seen.shape[1] - 1]
        past, tokens = followed(batch.measured), middle.shape[1] // batch.pixels.shape[1]
        error = error + F.smooth_l1_loss(self.follower(middle).float(), past.repeat_interleave(tokens, 1), beta=0.1)
        hidden = told.last_hidden_state
        answers = batch.labels[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][answers])
        return F.cross_entropy(logits.float(), batch.labels[:, 1:][answers]), error


def make_optimizers(learner: Learner, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases and what is left."""
    parts = (learner.model.model.vision_tower.encoder, learner.model.model.language_model.layers)
    matrices: list[Any] = [m.weight for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    known = {id(p) for p in matrices}
    rest = [p for p in learner.parameters() if id(p) not in known]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def shape_of(step: int, share: float, seed: int, load: int) -> tuple[int, int]:
    """Frames and clips of a step: mostly few frames at first, 8 to 64 later; ``load`` frames together."""
    odds = [0.85, 0.05, 0.05, 0.05] if share < 0.5 else [0.4, 0.2, 0.2, 0.2]
    frames = int(np.random.default_rng([seed, step, 1]).choice([8, 16, 32, 64], p=odds))
    return frames, max(1, load // frames)


def _started_from(folder: Path, size: ChatSize, vocabulary: int) -> LlavaOnevisionForConditionalGeneration:
    model = build_model(size, vocabulary)
    try:
        found: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict(found.state_dict())
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder} holds no model of these clips and sizes: {str(error).splitlines()[-1].strip()}") from None
    return model


def train_video_chat(
    clips_dir: Path,
    out: Path,
    minutes: float = 80,
    load: int = 128,
    lr: float = 3e-3,
    size: ChatSize | None = None,
    seed: int = 0,
    save_minutes: float = 8,
    init: Path | None = None,
    seeing_share: float = SEEING_SHARE,
) -> Path:
    """Train (or go on training) emoji-video-chat; every checkpoint also renews the folder ``out/shipped``.

    Args:
        clips_dir: folder made by ``arsd train clips``.
        out: run folder; ``checkpoint.pt`` in it is resumed.
        minutes: time budget, over all resumed runs.
        load: frames of a step, over all its clips.
        lr: peak learning rate.
        size: of the model.
        seed: of weights and batches.
        save_minutes: minutes between checkpoints.
        init: model folder to start from, of the same clips and sizes.
        seeing_share: of the budget, in which the tower first learns alone to measure single frames.

    Returns:
        The folder with the model, as transformers loads it.

    Raises:
        DataError: for sizes that make no sense, missing clips, or a run folder of another configuration.
    """
    size, out = size or ChatSize(), Path(out)
    if not minutes > 0 or load < 8:
        raise DataError(f"minutes ({minutes}) must be positive and load ({load}) at least 8")
    data = ClipData.load(clips_dir)
    if not data.weights.any():
        raise DataError(f"{clips_dir} holds no clips to train on: run `arsd train clips` again")
    claim_folder(out, {"clips": len(data.info), "size": vars(size), "load": load, "lr": lr, "seed": seed})
    torch.manual_seed(seed)
    tokenizer = build_chat_tokenizer(data, size.vocabulary)
    processor = build_processor(tokenizer, size)
    learner = Learner(build_model(size, len(tokenizer)) if init is None else _started_from(init, size, len(tokenizer)))
    batches = Batches(data, tokenizer, ((SIDE // size.patch + 1) // 2) ** 2, seed)
    run = Run(out, learner, make_optimizers(learner, lr), lr, minutes)
    run.average.decay = AVERAGE_DECAY
    while run.begin_step():
        seeing = run.clock.spent < seeing_share * minutes
        frames, count = (2, load // 2) if seeing else shape_of(run.step, run.clock.spent / minutes, seed, load)
        batch = batches(run.step, frames, count, silent=seeing)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss, error = learner(batch, seeing)
        run.finish_step(loss, 2 * error, error=float(error.detach()), frames=frames)
        if run.due(save_minutes):
            run.save()
            averaged = Learner(build_model(size, len(tokenizer)))
            averaged.load_state_dict(run.average.values)
            if data.indices(True).size and not seeing:
                run.log(held_out=held_out_scores(averaged.model.eval(), processor, data))
            ship(averaged.model, processor, out / "shipped")
    return out / "shipped"


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    clips: np.ndarray,
    question: str = DESCRIBE[0],
    batch: int = 16,
) -> list[str]:
    """Greedy answers about clips [N, T, H, W, 3] uint8, up to and with the end token if there is one."""
    parts = [{"type": "video"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    told: list[str] = []
    for some in (clips[i : i + batch] for i in range(0, len(clips), batch)):
        videos = [torch.from_numpy(clip).movedim(-1, 1) for clip in some]
        inputs = processor(text=[prompt] * len(some), videos=videos, return_tensors="pt")
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        texts = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
        told += [text.split("<|endoftext|>")[0] for text in texts]
    return told


def held_out_scores(model: Any, processor: Any, data: ClipData, frames: int = 8) -> dict[str, float]:
    """Shares of the held-out clips' facts that their descriptions get right, and of descriptions that end."""
    views = [show(data.frames[index], plain_view(frames)) for index in data.indices(True)]
    told = answers(model, processor, np.stack(views))
    said_of = [read(text.split("<|im_end|>")[0]).facts for text in told]
    pairs = list(zip([facts_of(measure(view)) for view in views], said_of, strict=True))
    right = [said.get(kind) == value for facts, said in pairs for kind, value in facts.items()]
    stated = [facts[kind] == value for facts, said in pairs for kind, value in said.items() if kind in facts]
    ended = [text.endswith("<|im_end|>") for text in told]
    figures = {"right": right, "right_of_stated": stated, "ended": ended}
    return {name: round(float(np.mean(hits or [False])), 4) for name, hits in figures.items()}


def ship(model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor, folder: Path) -> None:
    """Save model (bfloat16) and processor to ``folder``, which is replaced at once when all is written."""
    fresh, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    copy: Any = LlavaOnevisionForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(fresh)
    processor.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
