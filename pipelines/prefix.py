"""Pictures that begin as another one does: continuation and variation of a given picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from arsd.errors import InputError
from arsd.models.raster import Raster


def kept_rows(strength: float, rows: int) -> int:
    """How many of ``rows`` rows of tokens are kept: ``1 - strength`` of them, rounded, and never all.

    Raises:
        InputError: for a strength outside (0, 1].
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise InputError(f"strength must lie in (0, 1], the share of the picture that is made anew, not {strength!r}")
    return min(rows - 1, round((1 - strength) * rows))


def to_pixels(image: Any, height: int, width: int, factor: int) -> Tensor:
    """Pictures of any kind that diffusers takes (PIL, arrays, tensors in [0, 1], lists) as [n, 3, height, width] in [-1, 1].

    PIL pictures of another size are scaled to fill the area and cropped around their centre.

    Raises:
        InputError: for anything else.
    """
    image = [_unit(one) for one in image] if isinstance(image, (list, tuple)) else _unit(image)
    try:
        processor = VaeImageProcessor(vae_scale_factor=factor, do_convert_rgb=True)
        pixels = processor.preprocess(image, height, width, resize_mode="crop" if _is_pil(image) else "default")
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, NotImplementedError) as error:
        raise InputError(f"image cannot be read as a picture: {' '.join(str(error).split())[:200]}") from None
    if not bool(torch.isfinite(pixels).all()) or float(pixels.abs().max()) > 1 + 1e-3:
        raise InputError("image has values outside [0, 1]: give floating point in this range, or bytes")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise InputError(f"image must be pictures of three channels, not {tuple(pixels.shape)}")
    return pixels


def encode_pictures(vq: Any, image: Any, raster: Raster) -> Tensor:
    """Tokens [n, N] of pictures, marks included; each by itself, so that a picture never depends on the others.

    Args:
        vq: image tokenizer.
        image: see :func:`to_pixels`.
        raster: what size the pictures get.

    Raises:
        InputError: for what is no picture.
    """
    if raster.first:
        raise InputError("a picture of this model begins with a preview of its own: it cannot be given")
    factor = vq.downsample_factor
    pixels = to_pixels(image, raster.rows * factor, raster.columns * factor, factor).to(vq.device, vq.dtype)
    return raster.from_codes(torch.cat([vq.encode(one[None]) for one in pixels]))


def encode_beginnings(vq: Any, image: Any, strength: float, raster: Raster, prompts: int, per_prompt: int) -> Tensor | None:
    """Tokens [prompts * per_prompt, F] of the rows that are kept of ``image``; ``None`` where that is nothing.

    Args:
        vq: image tokenizer.
        image: one picture for all prompts, or one for each; or codes [n, r, w] of the rows that are kept.
        strength: share of the rows that are made anew, from the bottom up; of codes all are kept.
        raster: of the pictures that are made.
        prompts: how many.
        per_prompt: pictures of each.

    Raises:
        InputError: for pictures or numbers that do not fit.
    """
    if isinstance(image, Tensor) and not image.is_floating_point() and image.dtype != torch.uint8:
        rows, tokens = image.shape[1] if image.ndim == 3 else 0, _of_codes(image, raster)
    else:
        rows, tokens = kept_rows(strength, raster.rows), encode_pictures(vq, image, raster)
    if len(tokens) not in (1, prompts):
        raise InputError(f"got {len(tokens)} pictures for {prompts} prompts: give one, or one for each")
    if not rows:
        return None
    kept = tokens[:, : rows * raster.row_length]
    return kept.expand(prompts, -1).repeat_interleave(per_prompt, dim=0).contiguous()


def _of_codes(codes: Tensor, raster: Raster) -> Tensor:
    shape = tuple(codes.shape)
    if codes.ndim != 3 or not len(codes) or not 0 < shape[1] < raster.rows or shape[2] != raster.columns:
        wanted = f"[n, 1..{raster.rows - 1}, {raster.columns}]"
        raise InputError(f"image holds codes of shape {shape}: give {wanted}, or pixels in [0, 1] as floating point")
    if int(codes.min()) < 0 or int(codes.max()) >= raster.codes:
        raise InputError(f"image holds codes outside 0..{raster.codes - 1}")
    return replace(raster, rows=shape[1], tail=(), between=False).from_codes(codes.long())


def _unit(image: Any) -> Any:
    """Bytes to [0, 1]; floating point that is not in this range is left, to be refused."""
    if getattr(image, "dtype", None) in (np.uint8, torch.uint8):
        return image / np.float32(255) if isinstance(image, np.ndarray) else image.float() / 255
    values = torch.as_tensor(image) if isinstance(image, (np.ndarray, Tensor)) else None
    if values is not None and values.is_floating_point() and values.numel():
        low, high = float(values.min()), float(values.max())
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN included
            raise InputError("image has values outside [0, 1]: give floating point in this range, or bytes")
    return image


def _is_pil(image: Any) -> bool:
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    return hasattr(first, "convert")
