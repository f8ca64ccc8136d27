"""Contact sheets: pictures in a grid with their captions below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, lines: int = 2) -> Image.Image:
    """All pictures (of one size) in rows of ``columns``, each with its caption below."""
    width, height = images[0].size
    font = ImageFont.load_default(11)
    line = 13
    cell = (width + 8, height + lines * line + 10)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * cell[0] + 4, (i // columns) * cell[1] + 4
        sheet.paste(image, (x, y))
        for j, text in enumerate(textwrap.wrap(caption, max(8, width // 6))[:lines]):
            pen.text((x + width // 2, y + height + 3 + j * line), text, fill="black", font=font, anchor="ma")
    return sheet
