"""Emu3 (arXiv 2409.18869) and Emu3.5 (arXiv 2510.26583): text to pictures of any ratio of sides."""

from __future__ import annotations

import math
from pathlib import Path

from arsd.models.emu3 import Emu3Protocol, Emu35Protocol
from arsd.models.emu3_files import EMU3, EMU35
from arsd.models.folders import config_of
from arsd.pipelines.token_images import TokenImagePipeline


class Emu3Pipeline(TokenImagePipeline):
    """Emu3-Gen (and weights in its layout: Emu3-Stage1, Emu3-Chat), from the folders of BAAI or of transformers.

    ``height`` and ``width`` are multiples of 8. Upstream's words of quality are appended to prompts
    (:data:`arsd.models.emu3.QUALITY`); ``negative_prompt`` replaces its negative ones.
    """

    protocol_class = Emu3Protocol
    default_size = 720
    files = EMU3

    @classmethod
    def _size_of(cls, folder: Path, name: str) -> int | None:
        """See :class:`TokenImagePipeline`: the side of the area in the configuration (Emu3-Stage1 draws smaller)."""
        area = config_of(folder).get("image_area")
        return math.isqrt(area) if isinstance(area, int) and area > 0 else None


class Emu35Pipeline(TokenImagePipeline):
    """Emu3.5-Image, and Emu3.5 with ``guidance_scale=2``; ``height`` and ``width`` are multiples of 16."""

    protocol_class = Emu35Protocol
    default_size = 1024
    files = EMU35
