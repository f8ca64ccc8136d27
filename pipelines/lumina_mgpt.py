"""Lumina-mGPT (arXiv 2408.02657) and Lumina-mGPT 2.0 (arXiv 2507.17801): text to pictures of many sizes."""

from __future__ import annotations

from typing import Any

from arsd.models.chameleon_files import CHAMELEON
from arsd.models.lumina import LuminaProtocol
from arsd.pipelines.token_images import TokenImagePipeline


class LuminaMGPTPipeline(TokenImagePipeline):
    """Lumina-mGPT 7B and 34B, and 2.0, from their published folders.

    ``height`` and ``width`` are multiples of 32 (see :func:`arsd.models.lumina.trained_sizes`). A prompt that already is an
    instruction as the models were trained on (:data:`arsd.models.lumina.INSTRUCTION`) is taken as it is. So the tasks of
    2.0 Omni are a dual-panel instruction with the codes of the upper panel as ``image``.
    """

    protocol_class = LuminaProtocol
    default_size = 768
    files = CHAMELEON(kinds=("lumina-mgpt", "lumina-mgpt-2"))

    def protocol_options(self) -> dict[str, Any]:
        """Where the codes of version 2 begin, if the configuration names them."""
        named = self.transformer.config.vocabulary_map or {}
        codes = [number for word, number in named.items() if word.startswith("<MOVQGAN")]
        return {"first_code": min(codes)} if codes else {}
