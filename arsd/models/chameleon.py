"""Chameleon (arXiv 2405.09818) as a decoder of image tokens: what Lumina-mGPT and Anole were trained from.

The network is that of transformers. Published folders are read by :mod:`arsd.models.chameleon_files`.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAEConfig,
    PreTrainedModel,  # noqa: F401  diffusers looks it up in a component's module
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from arsd.errors import InputError


class ChameleonForImageGeneration(ChameleonForConditionalGeneration):
    """A ``ChameleonForConditionalGeneration`` that may draw image tokens, and without its picture encoder.

    The stock class sets every image logit to the least number there is, so it can never continue a picture. This one gives
    the logits as they are; for text alone, ``generate`` takes ``suppress_tokens``. Pictures become tokens, and tokens
    pictures, in :class:`arsd.tokenizers.vqgan.VQGANTokenizer`; ``model.vqmodel`` is not part of this network, and such
    weights in a folder are not read.

    Args:
        config: as of the stock class; without a ``vocabulary_map`` it gets an empty one.
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.vqmodel\."]

    def __init__(self, config: ChameleonConfig) -> None:
        own, encoder = copy.copy(config), config.vq_config
        if own.vocabulary_map is None:
            own.vocabulary_map = {}
        # the stock class builds and initialises an encoder: the least there can be, because it goes at once
        own.vq_config = ChameleonVQVAEConfig(
            embed_dim=1, num_embeddings=1, latent_channels=1, base_channels=32, channel_multiplier=[1], num_res_blocks=1
        )
        super().__init__(own)
        del self.model.vqmodel
        own.vq_config = encoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V] of the last ``logits_to_keep`` positions (0: all), or of those that a 1-D tensor lists.

        Args:
            input_ids: [B, T]; or give ``inputs_embeds`` [B, T, D].
            attention_mask: [B, past + T], 0 at padding, or additive [B, 1, T, past + T].
            position_ids: [B, T]; by default they count on from the cache.
            past_key_values: a transformers cache.
            inputs_embeds: in place of ``input_ids``.
            labels: [B, T], -100 where nothing is learnt; the output gets the mean negative log-likelihood as ``loss``.
            use_cache: whether the output has a cache.
            logits_to_keep: see above.
            kwargs: of the stock class.

        Raises:
            InputError: for ``pixel_values``.
        """
        if any(kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs")):
            self._refuse_pictures()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_image_tokens(self, pixel_values: Any) -> NoReturn:
        """Not here, see the class.

        Raises:
            InputError: always.
        """
        self._refuse_pictures()

    def get_image_features(self, pixel_values: Any, **kwargs: Any) -> NoReturn:
        """Not here, see the class.

        Raises:
            InputError: always.
        """
        self._refuse_pictures()

    def _refuse_pictures(self) -> NoReturn:
        raise InputError("this network reads tokens, not pixel_values: encode pictures with the pipeline's VQ tokenizer")
