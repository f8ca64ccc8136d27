"""Anole (arXiv 2407.06135): text, and pictures that the text speaks of, to pictures of 512 x 512 pixels."""

from __future__ import annotations

from arsd.models.anole import AnoleProtocol
from arsd.models.chameleon_files import CHAMELEON
from arsd.pipelines.token_images import TokenImagePipeline


class AnolePipeline(TokenImagePipeline):
    """Anole 7B in its three formats, and Chameleon layouts with a picture decoder beside them.

    ``prompt_images`` are pictures that the prompt speaks of, each at its ``<image>``. Guidance then has three streams:
    ``u + image_guidance_scale (i - u) + guidance_scale (c - i)``, where i has the pictures without the words.
    """

    protocol_class = AnoleProtocol
    default_size = 512
    files = CHAMELEON(kinds=("anole", "anole-meta", "chameleon"))
