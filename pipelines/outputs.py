"""What a pipeline returns, and what all pictures of a call are made from: noise keys and conditions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from arsd.decoding import DecodeStats, DecodingStrategy, LawConfig
from arsd.errors import InputError

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class Conditions:
    """What the pictures of a call are made of, as a target reads it.

    Args:
        condition: [S, M, P, D] embedded condition of every stream and picture.
        padding: [S, M, P], True at padded slots, or ``None``.
        inputs: [M] the same for people and records: ``{"prompt": ...}``, ``{"class_label": ...}`` or ``{}``.
        raster: how they lie in their tokens: a :class:`arsd.models.raster.Raster` or :class:`arsd.models.volume.Volume`.
        given: [M, F] tokens that the pictures begin with, or ``None``.
        ids: [S, M, P] the words of the condition, where it consists of words.
        extra: [M] what else a family keeps of each picture, for its target or its painting.
    """

    condition: Tensor
    padding: Tensor | None
    inputs: list[dict[str, Any]]
    raster: Any
    given: Tensor | None = None
    ids: Tensor | None = None
    extra: list[Any] | None = None


@dataclass
class ARPipelineOutput(BaseOutput):
    """What a pipeline returns.

    Args:
        images: pictures in the order asked for, in the asked ``output_type``.
        tokens: [B, N] ids as they were decoded: image codes, and the marks of the family behind the last code id (see
            :class:`arsd.models.raster.Raster`; LlamaGen has none).
        stats: figures of the call, :class:`arsd.decoding.DecodeStats`.
        seeds: [B] noise seed of each picture; with ``image_indices`` it fixes the picture of a seed-exact decoder.
        image_indices: [B] index under which each picture's noise was drawn.
        law_config: the sampling options that were in force.
        decoders: [B] strategy of each picture.
        inputs: [B] what each picture was made of: ``{"prompt": ...}``, ``{"class_label": ...}`` or ``{}``; of a picture that
            began with given tokens also how many (``given_tokens``).
        log_probs: [B, N] log-probabilities of the tokens, when asked for.
        entropies: [B, N] entropies (nats) of the tokens' laws, when asked for.
        trace: every pass, when asked for.
    """

    images: Any
    tokens: Tensor
    stats: DecodeStats
    seeds: list[int]
    image_indices: list[int]
    law_config: LawConfig
    decoders: list[DecodingStrategy]
    inputs: list[dict[str, Any]]
    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    trace: Any = None


@dataclass
class ARVideoOutput(BaseOutput):
    """What a video pipeline returns: as :class:`ARPipelineOutput`, with clips in the place of pictures.

    Args:
        frames: clips in the order asked for: a list of PIL pictures for each (``pil``), [B, T, H, W, 3] in [0, 1] (``np``),
            [B, T, 3, H, W] in [0, 1] (``pt``), or the codes [B, t, h, w] (``latent``). ``diffusers.utils.export_to_video``
            takes ``frames[0]``.
        tokens: [B, N] see :class:`ARPipelineOutput`, as all that follow.
        stats: figures of the call.
        seeds: [B] noise seed of each clip.
        image_indices: [B] index under which each clip's noise was drawn.
        law_config: the sampling options that were in force.
        decoders: [B] strategy of each clip.
        inputs: [B] what each clip was made of.
        log_probs: [B, N], when asked for.
        entropies: [B, N], when asked for.
        trace: every pass, when asked for.
    """

    frames: Any
    tokens: Tensor
    stats: DecodeStats
    seeds: list[int]
    image_indices: list[int]
    law_config: LawConfig
    decoders: list[DecodingStrategy]
    inputs: list[dict[str, Any]]
    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    trace: Any = None


def noise_keys(generator: Generators, batch: int) -> tuple[list[int], list[int]]:
    """(seeds, image indices) of ``batch`` pictures.

    One generator gives one seed to all pictures, told apart by their index; a list gives each picture its own seed and index
    0, so that it comes out as in a call of its own. Without a generator the seed is fresh entropy. Drawing the seed advances
    the generator, as diffusers users expect of a second call.

    Raises:
        InputError: when a list has the wrong length.
    """

    def draw(source: torch.Generator) -> int:
        return int(torch.randint(2**63 - 1, (), generator=source, device=source.device))

    if generator is None:
        return [secrets.randbits(63)] * batch, list(range(batch))
    if isinstance(generator, torch.Generator):
        return [draw(generator)] * batch, list(range(batch))
    if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
        raise InputError(f"generator must be a torch.Generator or a list of them, not {generator!r}")
    if len(generator) != batch:
        raise InputError(f"got {len(generator)} generators for {batch} pictures: give one, or one for each")
    return [draw(source) for source in generator], [0] * batch


def to_unit(pixels: Tensor) -> Tensor:
    """Pictures in [-1, 1] as float32 in [0, 1]."""
    return (pixels.float().clamp(-1, 1) + 1) / 2


def to_output(pixels: Tensor, output_type: str) -> Any:
    """Pictures [B, 3, H, W] in [-1, 1] as ``pil``, ``np`` ([B, H, W, 3] in [0, 1]) or ``pt`` ([B, 3, H, W] in [0, 1])."""
    return of_unit(to_unit(pixels), output_type)


def of_unit(unit: Tensor, output_type: str) -> Any:
    """:func:`to_output` of pictures [B, 3, H, W], or clips [B, T, 3, H, W], that are float32 in [0, 1] already."""
    if output_type == "pt":
        return unit
    array = unit.movedim(-3, -1).cpu().numpy()
    if output_type == "np":
        return array
    bytes_ = np.round(array * 255).astype(np.uint8)
    if bytes_.ndim == 5:
        return [[Image.fromarray(frame) for frame in clip] for clip in bytes_]
    return [Image.fromarray(picture) for picture in bytes_]


def with_given(given: Tensor | None) -> dict[str, int]:
    """What the record of a picture says of the tokens that it began with."""
    return {} if given is None else {"given_tokens": given.shape[1]}


def stand_in(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Condition [1, B, 1, D] and padding [1, B, 1] of models without a condition: one slot that nothing attends to.

    The loop reads a token's law in the slot before it; sequences of these models begin with tokens that are given.
    """
    condition = torch.zeros(1, batch, 1, width, dtype=dtype, device=device)
    return condition, torch.ones(condition.shape[:3], dtype=torch.bool, device=device)
