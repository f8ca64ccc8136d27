"""Pictures of a run: what is decided so far, and the grid that says how every token came about."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from arsd.app.progress import UNDECIDED
from arsd.decoding import Outcome
from arsd.models.raster import Raster

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {
    Outcome.ACCEPTED: (0, 158, 115),
    Outcome.RELAXED: (204, 121, 167),
    Outcome.RESAMPLED: (213, 94, 0),
    Outcome.BONUS: (0, 114, 178),
    Outcome.FORCED: (140, 140, 140),
}
EARLY, LATE = np.array([13, 8, 135]), np.array([240, 249, 33])  # of the colours of passes
MIDDLE = np.array([204, 71, 120])


def picture(pipe: Any, raster: Raster, tokens: np.ndarray, outcomes: np.ndarray) -> Image.Image:
    """A picture RGBA as far as it is decided [N]; transparent elsewhere."""
    pixels = pipe.sketch(torch.from_numpy(tokens)[None].to(pipe._execution_device), raster)[0]
    decided = cells(raster, outcomes) != UNDECIDED
    mask = Image.fromarray(np.where(decided, 255, 0).astype(np.uint8)).resize(pixels.size, Image.Resampling.NEAREST)
    pixels.putalpha(mask)
    return pixels


def cells(raster: Raster, values: np.ndarray) -> np.ndarray:
    """Values of tokens [N] as they lie in the picture [h, w]; marks are left out."""
    found: np.ndarray = values[raster.places.numpy()]
    return found


def how_grid(raster: Raster, outcomes: np.ndarray) -> Image.Image:
    """One pixel RGBA for each token, in the colour of how it came about."""
    kinds = cells(raster, outcomes)
    table = np.zeros((max(COLOURS) + 2, 4), dtype=np.uint8)  # the last row is that of UNDECIDED, -1
    for kind, colour in COLOURS.items():
        table[kind] = (*colour, 255)
    return Image.fromarray(table[kinds])


def pass_grid(raster: Raster, outcomes: np.ndarray, passes: np.ndarray) -> Image.Image:
    """One pixel RGBA for each token: dark in the first pass, light in the last."""
    number, decided = cells(raster, passes).astype(float), cells(raster, outcomes) != UNDECIDED
    share = number / max(1.0, number[decided].max() if decided.any() else 1.0)
    low, high = np.clip(share * 2, 0, 1)[..., None], np.clip(share * 2 - 1, 0, 1)[..., None]
    colour = np.where(share[..., None] <= 0.5, EARLY + low * (MIDDLE - EARLY), MIDDLE + high * (LATE - MIDDLE))
    alpha = np.where(decided, 255, 0)[..., None]
    return Image.fromarray(np.concatenate([colour, alpha], axis=-1).round().astype(np.uint8))


def data_uri(image: Image.Image, form: str = "WEBP") -> str:
    """A picture inside a page: no file is written."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 90, "method": 2} if form == "WEBP" else {}
    image.save(buffer, format=form, **options)
    return uri_of(buffer.getvalue(), f"image/{form.lower()}")


def uri_of(content: bytes, kind: str) -> str:
    """Bytes inside a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
