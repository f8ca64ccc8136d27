"""Pictures of an evaluation side by side, a row for each decoder: draws docs/images/frontier-pictures.png.

python benchmarks/frontier_sheet.py runs/emoji-128
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from arsd.metrics.drawing import picture_path
from arsd.provenance import read_png
from arsd.sheets import contact_sheet

ROWS = {
    "ar": "ar",
    "sjd": "sjd_window=16",
    "eagle, rejection": "eagle_coupling=rejection",
    "cool-sd:delta=5": "cool-sd_delta=5",
    "cool-sd:delta=30": "cool-sd_delta=30",
    "lantern++ (1000, 1000)": "lantern-plus-plus_k=1000_lam=1000_residual=optimal",
    "grouped (50, 2, 4)": "grouped_group=50_spread=2_radius=4",
    "temperature 1.15": "sjd_window=16_temperature_1.15",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--count", type=int, default=10)
    default = Path(__file__).parents[1] / "docs" / "images" / "frontier-pictures.png"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    images, captions = [], []
    for name, folder in ROWS.items():
        for i in range(arguments.first, arguments.first + arguments.count):
            path = picture_path(arguments.run / folder, i)
            images.append(Image.open(path).convert("RGB"))
            captions.append(name if i == arguments.first else read_png(path)["prompt"])
    sheet = contact_sheet(images, captions, arguments.count, lines=1)
    sheet.quantize(255, dither=Image.Dither.NONE).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
