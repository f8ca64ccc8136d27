"""SimpleAR (arXiv 2504.11455): text to square pictures."""

from __future__ import annotations

from typing import Any

from arsd.models.simplear import SIMPLEAR, SimpleARProtocol
from arsd.pipelines.token_images import TokenImagePipeline


class SimpleARPipeline(TokenImagePipeline):
    """SimpleAR 0.5B and 1.5B (SFT and RL, 1024 px; stages of another size with ``image_size=512``).

    ``vq`` is the folder of nvidia/Cosmos-1.0-Tokenizer-DV8x16x16, whose files are programs that run when they are loaded
    (:mod:`arsd.tokenizers.cosmos`). Captions begin with :data:`arsd.models.simplear.OPENING`; ``negative_prompt`` replaces
    upstream's fixed one.
    """

    protocol_class = SimpleARProtocol
    default_size = 1024
    files = SIMPLEAR

    def protocol_options(self) -> dict[str, Any]:
        """How many words and codes the network knows."""
        return {"vocabulary": self.transformer.config.vocab_size}
