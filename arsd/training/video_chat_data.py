"""What emoji-video-chat is trained on: a tokenizer, and batches of clips with conversations about them.

Every clip is shown in a new way each time; the answers are the facts of the frames that are shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer

from arsd.training.clip_facts import COLOURS, COURSES, Facts, Measures, facts_of, measure
from arsd.training.clip_texts import DESCRIBE, NAME, QUESTIONS, SENTENCES, describe, fact_sentences, name_sentences
from arsd.training.clips import ClipData, ClipInfo, View, plain_view, random_view, show

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
PAD, END, VIDEO = (SPECIAL.index(token) for token in ("<|endoftext|>", "<|im_end|>", "<video>"))
PLAIN_SHARE = 0.25  # clips that are shown as they are
MEASURED = len(COURSES) + 5 + len(COLOURS)
IGNORED = -100  # label of a token that is no answer


def build_chat_tokenizer(data: ClipData, vocabulary: int) -> Qwen2Tokenizer:
    """Byte-level BPE with at most ``vocabulary`` tokens, trained on the sentences, questions and names of ``data``."""
    texts = [question + "\n" for group in (DESCRIBE, NAME, *QUESTIONS.values()) for question in group for _ in range(30)]
    texts += [sentence + ". It is." for table in SENTENCES.values() for sentence in table.values() for _ in range(30)]
    texts += [" ".join(name_sentences(clip.name, clip.group, clip.keywords)) for clip in data.info if not clip.held_out]
    texts += ["user\nassistant\n"] * 30
    blank = Qwen2Tokenizer(vocab={SPECIAL[0]: 0}, merges=[])
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer = blank.backend_tokenizer.normalizer, blank.backend_tokenizer.pre_tokenizer
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained: Any = json.loads(core.to_str())["model"]
    merges: Any = [tuple(merge) for merge in trained["merges"]]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=16384,
    )


def to_pixels(frames: np.ndarray) -> Tensor:
    """What the tower sees, [..., 3, 96, 96] in -1..1, of frames [..., 96, 96, 3] uint8."""
    return torch.from_numpy(frames).movedim(-1, -3).float() / 127.5 - 1


def measured(measures: Measures) -> np.ndarray:
    """What the tower is taught to tell of each frame, [T, 22]: courses, area, elongation, background, shares of colours."""
    columns = dict(measures.courses)
    tilt = columns.pop("tilt")
    elongation = measures.elongation.clip(0, 1)
    rows = [8 * (columns["across"] - 0.5), 8 * (columns["upright"] - 0.5), 3 * (columns["size"] + 0.7)]
    rows += [4 * columns["outline"], 4 * (columns["light"] - 0.5), 3 * elongation * np.cos(2 * tilt)]
    rows += [3 * elongation * np.sin(2 * tilt), 4 * (measures.area - 0.4)]
    rows += [np.full(len(tilt), 2 * channel / 255 - 1) for channel in measures.background]
    return np.concatenate([np.stack(rows, 1), 4 * measures.shares], 1).astype(np.float32)


FOLLOWED = 4 * 8


def followed(figures: Tensor) -> Tensor:
    """What the decoder is taught to tell at each frame of its past, [B, T, 32], from the figures [B, T, 22] of all frames.

    Of courses, elongation and area: the change from the frame before and from the first, the range and the way so far.
    """
    courses = figures[..., :8]
    steps = torch.diff(courses, dim=1, prepend=courses[:, :1])
    extent = courses.cummax(1).values - courses.cummin(1).values
    return 2 * torch.cat([steps, courses - courses[:, :1], extent, steps.abs().cumsum(1) / 2], -1)


@dataclass
class Batch:
    """Clips that are all shown with the same number of frames, and a conversation about each.

    Args:
        pixels: [B, T, 3, 96, 96].
        measured: [B, T, 22], see :func:`measured`.
        ids: tokens [B, L]; the ``<video>`` tokens are at the same places in all rows.
        labels: [B, L], -100 where no answer is.
    """

    pixels: Tensor
    measured: Tensor
    ids: Tensor
    labels: Tensor


@dataclass
class Batches:
    """Draws training batches; the one of a step depends on seed and step alone.

    Args:
        data: the clips; held-out ones are not drawn.
        tokenizer: of the texts.
        tokens: visual tokens of a frame.
        seed: of all draws.
    """

    data: ClipData
    tokenizer: Qwen2Tokenizer
    tokens: int
    seed: int
    weights: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.weights = self.data.weights / self.data.weights.sum()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, which may hold special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def turns(self, facts: Facts, clip: ClipInfo, source: np.random.Generator) -> list[tuple[str, str]]:
        """Questions and answers about one clip: mostly a description first, then some single facts."""
        known = [kinds for kinds in QUESTIONS if any(kind in facts for kind in kinds)]
        some = [known[i] for i in source.permutation(len(known))[:3]]
        turns = [(str(source.choice(QUESTIONS[kinds])), " ".join(fact_sentences(facts, kinds))) for kinds in some]
        if source.random() < 0.3:
            turns[source.integers(len(turns))] = (str(source.choice(NAME)), name_sentences(clip.name, "", [])[0])
        if source.random() < 0.8:
            full = describe(facts, clip.name, clip.group, clip.keywords)
            turns = [(str(source.choice(DESCRIBE)), full), *turns[:1]]
        return turns

    def conversation(self, frames: int, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Tokens of a conversation about a clip of ``frames`` frames, and the labels."""
        ids = self.encode("<|im_start|>user\n") + [VIDEO] * (self.tokens * frames + 1) + self.encode("\n")
        labels = [IGNORED] * len(ids)
        for number, (question, answer) in enumerate(turns):
            start = "\n<|im_start|>user\n" if number else ""
            asked = self.encode(f"{start}{question}<|im_end|>\n<|im_start|>assistant\n")
            told = [*self.encode(answer), END]
            ids += asked + told
            labels += [IGNORED] * len(asked) + told
        return ids, labels

    def __call__(self, step: int, frames: int, count: int, silent: bool = False) -> Batch:
        """The batch of ``step``: ``count`` clips of ``frames`` frames, and unless ``silent`` conversations about them."""
        source = np.random.default_rng([self.seed, step])
        pixels, figures, rows = [], [], []
        for index in source.choice(len(self.weights), count, p=self.weights).tolist():
            shown, facts, numbers = self.clip(index, frames, source)
            pixels.append(shown)
            figures.append(numbers)
            turns = [] if silent else self.turns(facts, self.data.info[index], source)
            rows.append(self.conversation(frames, turns))
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([some + [IGNORED] * (length - len(some)) for _, some in rows])
        return Batch(to_pixels(np.stack(pixels)), torch.from_numpy(np.stack(figures)), ids, labels)

    def clip(self, index: int, frames: int, source: np.random.Generator) -> tuple[np.ndarray, Facts, np.ndarray]:
        """One clip shown in a random way: frames, facts and what is measured on each frame."""
        plain = source.random() < PLAIN_SHARE
        view: View = plain_view(frames) if plain else random_view(frames, source)
        shown = show(self.data.frames[index], view)
        measures = measure(shown)
        return shown, facts_of(measures), measured(measures)
