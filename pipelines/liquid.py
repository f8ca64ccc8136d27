"""Liquid (arXiv 2412.04332): text to pictures of 512 x 512 pixels."""

from __future__ import annotations

from typing import Any

from arsd.models.liquid import LIQUID, LiquidProtocol
from arsd.pipelines.token_images import TokenImagePipeline


class LiquidPipeline(TokenImagePipeline):
    """Liquid 7B; ``vq`` is Chameleon's ``vqgan.ckpt``. Prompts end with :data:`arsd.models.liquid.REQUEST`."""

    protocol_class = LiquidProtocol
    default_size = 512
    files = LIQUID

    def protocol_options(self) -> dict[str, Any]:
        """How many words and codes the network knows."""
        return {"vocabulary": self.transformer.config.vocab_size}
