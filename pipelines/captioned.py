"""What pipelines share whose transformers hold a language model, and whose models read captions (LlamaGen, emoji-video)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.types import DraftModel
from arsd.devices import in_use
from arsd.errors import InputError, warn_caller
from arsd.models.captions import clean_caption, encode_captions, unknown_words
from arsd.models.eagle import EagleDrafter
from arsd.models.eagle_draft import EagleDraftModel
from arsd.models.target import DecoderTarget
from arsd.pipelines.checks import check_prompts
from arsd.pipelines.core import ARPipeline, DraftMaker, TargetMaker
from arsd.pipelines.outputs import Conditions


class WithLanguageModel(ARPipeline):
    """Pipelines whose transformer has a language model ``lm`` with its head, and tells its ``num_tokens``."""

    @property
    def sampling(self) -> dict[str, Any]:
        """See :class:`ARPipeline`."""
        return self.transformer.config["sampling"] or {}

    @property
    def counts_padding(self) -> bool:
        """Whether padded condition slots count in the positions of what follows."""
        return True

    def target_maker(self, conditions: Conditions, model: Any = None) -> TargetMaker:
        """See :class:`ARPipeline`."""
        lm, total = (model or self.transformer).lm, conditions.raster.num_tokens

        def make_target(pass_tokens: int, batch: int) -> DecoderTarget:
            inputs = (conditions.condition, total, pass_tokens, conditions.padding, batch, conditions.given)
            return DecoderTarget(lm.model, lm.lm_head, lm.model.embed_tokens, *inputs, self.counts_padding)

        return make_target

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """See :class:`ARPipeline`."""
        drafter, lm, total = self.drafter, self.transformer.lm, self.transformer.num_tokens

        def make_eagle(window: int) -> DraftModel:
            parts = (lm.model.rotary_emb, lm.lm_head, lm.model.embed_tokens, conditions.condition, total)
            return EagleDraftModel(drafter, *parts, window, conditions.padding, batch, conditions.given, self.counts_padding)

        def make_small(window: int) -> DraftModel:
            if drafter.num_tokens != total:
                raise InputError(f"the drafter draws {drafter.num_tokens} tokens, the model {total}: they must be the same")
            maker = self.target_maker(encode(model=drafter), drafter)
            return SmallARDrafter(maker(max(window, 2), batch), window)

        if drafter is None:
            return None
        return make_eagle if isinstance(drafter, EagleDrafter) else make_small


class Captioned(WithLanguageModel):
    """Captions to condition slots.

    Components beside those of :class:`ARPipeline`: ``tokenizer`` and ``text_encoder``, a T5 encoder, both or neither.
    """

    tokenizer: Any
    text_encoder: Any

    def check_captions(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
    ) -> None:
        """Raise InputError for prompts or features that cannot be read."""
        if prompt is not None:
            check_prompts(prompt)
            if self.tokenizer is None or self.text_encoder is None:
                raise InputError("this pipeline has no text encoder: load one, or give prompt_embeds")
        if prompt_embeds is not None and prompt_attention_mask is None:
            raise InputError("prompt_embeds need their prompt_attention_mask")

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded caption features [B, T, caption_dim] and mask [B, T]; warns of words the tokenizer does not know.

        Each prompt is encoded by itself: its features must not depend on the others, not even in the last bit.

        Raises:
            InputError: when the pipeline has no text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise InputError("this pipeline has no text encoder: load one, or give prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.config.get("clean_captions"):
            prompts = [clean_caption(text) for text in prompts]
        strange = sorted({word for text in prompts for word in unknown_words(self.tokenizer, text)})
        if strange:
            warn_caller(f"the text encoder does not know: {', '.join(strange)}")
        length = self.transformer.config["condition_tokens"]
        encoded = [encode_captions(self.tokenizer, self.text_encoder, [text], length) for text in prompts]
        return torch.cat([features for features, _ in encoded]), torch.cat([mask for _, mask in encoded])

    def caption_slots(
        self,
        model: Any,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Condition slots [B, T, D], mask [B, T] and what the records say; ``model`` embeds.

        A prompt is encoded unless its ``prompt_embeds`` are given as well.

        Raises:
            InputError: for features and masks that do not fit.
        """
        inputs: list[dict[str, Any]] = [{"prompt": text} for text in ([prompt] if isinstance(prompt, str) else prompt or [])]
        if prompt is not None and prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        assert prompt_embeds is not None and prompt_attention_mask is not None
        device = self._execution_device
        embeds, mask = prompt_embeds.to(device, model.dtype), prompt_attention_mask.to(device)
        if embeds.shape[:1] != mask.shape[:1] or not len(embeds):
            raise InputError("prompt_embeds and prompt_attention_mask must have the same number of rows, at least one")
        pairs = zip(embeds.split(1), mask.split(1), strict=True)  # one by one, as encode_prompt does
        with in_use(model):
            rows = torch.cat([model.embed_captions(*pair) for pair in pairs])
        return rows, mask, inputs or [{}] * len(rows)

    def caption_streams(self, model: Any, rows: Tensor, mask: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
        """Condition [S, B, T, D] and padding [S, B, T]; the null stream has the conditional padding, as LlamaGen's has."""
        padding = (mask == 0)[None]
        if not guided:
            return rows[None], padding
        return torch.stack([rows, model.embed_null_caption(len(rows))]), padding.expand(2, -1, -1)
