"""Janus-Pro (arXiv 2501.17811) and Janus (arXiv 2410.13848): text to pictures of 384 x 384 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import device as Device
from torch import nn

from arsd.errors import InputError
from arsd.models.janus import JanusProtocol
from arsd.models.janus_files import JANUS, load_janus_config
from arsd.models.token_images import BroughtTo
from arsd.pipelines.base import DraftMaker
from arsd.pipelines.outputs import Conditions
from arsd.pipelines.token_images import TokenImagePipeline


class JanusPipeline(TokenImagePipeline):
    r"""Janus-Pro 1B and 7B, and Janus-1.3B, from their published folders of either layout.

    Only what draws is loaded: the model cannot be asked about pictures here. The image tokenizer lies in the same folder;
    ``vq=...`` takes LlamaGen's ``vq_ds16_t2i.pt``, or another Janus folder, in its place. Janus-1.3B was trained on other
    turns, which a prompt may spell out: ``"User: a cat\n\nAssistant:"``.
    """

    protocol_class = JanusProtocol
    default_size = 384
    files = JANUS

    @classmethod
    def _size_of(cls, folder: Path, name: str) -> int | None:
        """See :class:`TokenImagePipeline`: what the configuration says."""
        return int(load_janus_config(folder).vision_config.image_size)

    def protocol_options(self) -> dict[str, Any]:
        """Codes along one side, and how many there are."""
        config = self.transformer.config.vq_config
        return {"grid": config.num_patches, "known": config.num_embeddings}

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """See :class:`ARImagePipeline`.

        Raises:
            InputError: for an EAGLE drafter with an embedding of words.
        """
        if getattr(self.drafter, "embed_tokens", None) is not None:
            raise InputError("the drafter has an embedding of words, but codes of this model are none: it does not fit")
        return super().draft_maker(conditions, batch, encode)

    def _decoder(self, model: Any) -> Any:
        return model.language_model

    def _code_embedding(self, model: Any, device: Device) -> nn.Module:
        return BroughtTo(device, model.code_embedding)

    def _head(self, model: Any, device: Device) -> nn.Module:
        return BroughtTo(device, model.generation_head, self.transformer.config.vq_config.num_embeddings)
