"""A sheet of continued pictures: the upper half of a picture is kept, the lower half is drawn for another prompt.

python benchmarks/continuation_sheet.py --out docs/images/continuation.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import arsd
from arsd.cli.common import quiet
from arsd.sheets import contact_sheet

ROWS = (
    ("red apple", ("red apple", "green apple", "pear", "tomato")),
    ("cat face", ("cat face", "dog face", "tiger face", "fox")),
    ("rocket", ("rocket", "airplane", "ship", "guitar")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("continuation.png"))
    arguments = parser.parse_args()
    with quiet():
        pipe: Any = arsd.AutoARPipeline.from_pretrained("emoji-128")
    pipe.set_progress_bar_config(disable=True)
    images, captions = [], []
    for first, others in ROWS:
        given = pipe(first, generator=torch.Generator().manual_seed(7)).images[0]
        images.append(given)
        captions.append(f"given: {first}")
        for prompt in others:
            out = pipe(prompt, image=given, strength=0.5, generator=torch.Generator().manual_seed(3))
            images.append(out.images[0])
            captions.append(prompt)
    contact_sheet(images, captions, columns=5, lines=1).save(arguments.out)


if __name__ == "__main__":
    main()
