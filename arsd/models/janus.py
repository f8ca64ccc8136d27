"""Janus-Pro (arXiv 2501.17811) and Janus (arXiv 2410.13848): the part that draws, prompts and sizes.

A picture is a square of codes and nothing else. The codes are no words: they have an embedding of few dimensions, which two
layers lift to the width of the language model, and a head of their own. Published folders are read by
:mod:`arsd.models.janus_files`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    JanusConfig,
    PreTrainedModel,  # noqa: F401  diffusers looks it up in a component's module
)
from transformers.models.janus.modeling_janus import JanusPreTrainedModel, JanusVQVAEAlignerMLP, JanusVQVAEHead

from arsd.errors import CheckpointError, InputError
from arsd.models.raster import Raster
from arsd.models.token_images import TokenProtocol, word_ids

FIRST, PAD, BEGIN = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
ROLES = ("<|User|>", "<|Assistant|>")
OLD_ROLES = ("User", "Assistant")  # of Janus-1.3B
TURNS = re.compile(r"(?s)(<\|User\|>|User): .*\n\n(<\|Assistant\|>|Assistant):")


class JanusForImageGeneration(JanusPreTrainedModel):
    """What ``JanusForConditionalGeneration`` needs to draw: language model, embedding of the codes, head over the codes.

    The encoder that understands pictures (SigLIP and its aligner) and the head over words are not part of it, and such
    weights in a folder are not read; nor is the image tokenizer, see :class:`arsd.tokenizers.vq.VQTokenizer`.

    Args:
        config: as of the stock class.
    """

    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        codes: Any = config.vq_config
        self.language_model = AutoModel.from_config(config.text_config)
        self.generation_embeddings = nn.Embedding(codes.num_embeddings, codes.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(codes)
        self.generation_head = JanusVQVAEHead(codes)
        self.generation_head.out_features = codes.num_embeddings  # told as a linear layer tells it
        self.post_init()

    @property
    def code_embedding(self) -> nn.Sequential:
        """Codes [...] to embeddings [..., D] as the language model reads them."""
        return nn.Sequential(self.generation_embeddings, self.generation_aligner)

    def forward(self, inputs_embeds: Tensor, **options: Any) -> Tensor:
        """Logits [B, T, C] of the codes behind each position.

        Args:
            inputs_embeds: [B, T, D] of words (``get_input_embeddings``) and codes (:attr:`code_embedding`).
            options: of the language model: ``attention_mask``, ``position_ids``, ``past_key_values``, ``use_cache``.
        """
        return self.generation_head(self.language_model(inputs_embeds=inputs_embeds, **options).last_hidden_state)


class JanusProtocol(TokenProtocol):
    """Janus-Pro, and Janus-1.3B.

    The unconditional stream is the conditional one with padding words in the place of all but the first and last, which are
    attended as any others are.

    Args:
        tokenizer: the text tokenizer.
        codes: codes of the image tokenizer.
        factor: pixels per code along one side (16).
        size: side of a picture in pixels (384); there is no other size.
        sampling: sampling options instead of the published ones.
        grid: codes along one side, as the network's configuration says.
        known: codes of the network.

    Raises:
        CheckpointError: when the tokenizer is another model's, or the image tokenizer does not fit.
        InputError: for another size than that of the network.
    """

    def __init__(
        self,
        tokenizer: Any,
        codes: int,
        factor: int,
        size: int = 384,
        sampling: dict[str, float] | None = None,
        grid: int = 24,
        known: int = 16384,
    ) -> None:
        if codes != known:
            raise CheckpointError(f"the model has {known} codes, the image tokenizer {codes}: give its own, vq=...")
        if size != grid * factor:
            what = f"{grid} x {grid} codes of {factor} pixels"
            raise InputError(f"this model makes pictures of {what}: image_size must be {grid * factor}, not {size}")
        self.tokenizer, self.factor, self.size, self.grid = tokenizer, factor, size, grid
        self._first, self._pad, self._begin = word_ids(tokenizer, (FIRST, PAD, BEGIN))
        self._roles = ROLES if set(ROLES) <= set(tokenizer.get_vocab()) else OLD_ROLES
        self.code_ids, self.mark_ids = torch.arange(codes), {}
        self.sampling = sampling or {"guidance_scale": 5.0, "temperature": 1.0}

    def raster(self, height: int, width: int) -> Raster:
        """See :class:`TokenProtocol`."""
        if (height, width) != (self.size, self.size):
            raise InputError(f"this model makes pictures of {self.size} x {self.size} pixels only")
        return Raster(self.grid, self.grid, len(self.code_ids))

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Tensor] = ()) -> list[int]:
        """See :class:`TokenProtocol`; a prompt that has its turns already (:data:`TURNS`) is taken as it is."""
        if images:
            return self.image_only_ids(height, width, images)
        user, assistant = self._roles
        prompt = prompt.strip()
        text = prompt if TURNS.fullmatch(prompt) else f"{user}: {prompt}\n\n{assistant}:"
        return [self._first, *self.tokenizer.encode(text, add_special_tokens=False), self._begin]

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """See :class:`TokenProtocol`: as long as the conditional stream, without its words."""
        return [self._first, *[self._pad] * (len(prompt_ids) - 2), self._begin]
