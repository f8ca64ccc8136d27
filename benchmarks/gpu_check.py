"""Does an accelerator keep the promises, and what does a pass cost there? Unattended, about 8 minutes on a CUDA machine.

Run: python benchmarks/gpu_check.py [--device cuda] [--minutes 8] [--models 775m 7b]

Random weights, nothing to download. First the exactness (TF32 off): seed-exact decoding against plain AR at one pass shape
in every dtype, and the bits of every place and row. Then, for the published sizes: pass costs against the memory's limit, a
round by part, transformers' generate, and the released SJD. A step that no longer fits into the time is named and left
out. The exit status is 1 when float64 is not exact, and 2 without a device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pass_shapes
import promises
import rivals
import tables
import torch
from models import load

from arsd.cli.common import quiet
from arsd.devices import device_kind

DTYPES = ["float64", "float32", "bfloat16"]


def options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**values)


def check_exactness(device: torch.device, pictures: int) -> bool:
    """Batch 1 and ragged batch 8, several pass shapes: whether all float64 pictures equal plain AR's."""
    wanted = options(model="small", dtypes=DTYPES, widths=[8, 32], batches=[1, 8], pictures=pictures)
    rows = promises.exact(wanted, device)
    return all(row["equal"] == row["pictures"] for row in rows if row["dtype"] == "float64")


def check_families(device: torch.device) -> bool:
    """Tiny published checkpoints of every family, in float64: whether SJD gives plain AR's tokens, beginnings included."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from families import KINDS, PROMPTS, write

    same = True
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # sizes that no model was trained on
            sample = write(kind, Path(folder) / kind)
            pipe = sample.load().to(device)
            call = {"prompt": PROMPTS, "height": sample.size[0], "width": sample.size[1], "output_type": "latent"}
            equal = []
            for more in ({}, {"image": torch.rand(1, 3, *sample.size, dtype=torch.float64)}):
                plain, *others = (
                    pipe(**call | more, decoder=decoder, generator=torch.Generator().manual_seed(1)).tokens
                    for decoder in ("ar", "sjd:window=8", "sjd:window=32")
                )
                equal += [torch.equal(plain, other) for other in others]
        print(f"{kind:14} {sum(equal)} of {len(equal)} runs equal")
        same &= all(equal)
    return same


def check_bits(device: torch.device) -> None:
    shapes = {"batches": [1, 2, 8], "widths": [1, 8, 16, 32, 64]}
    pass_shapes.bits(options(model="small", dtypes=DTYPES, attention=["sdpa", "eager"], **shapes), device)


def speed_steps(model: str, device: torch.device, tokens: int) -> list[tuple[str, Callable[[], Any]]]:
    """The tables of one size, the most wanted first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    common = {"repeats": 3, "rounds": 12, "decoders": None}
    rival = {"model": model, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "tokens": str(tokens)}
    words = [word for key, value in rival.items() for word in (f"--{key}", value)] + ["--quiet", "9"]

    def costs() -> None:
        tables.costs(load(model, device, dtype), options(batches=[1, 4, 8], **common))

    def rounds() -> None:
        names = ["ar", "sjd:window=32", "eagle:draft_length=4", "cool-sd:budget=4", "hybrid:window=32"]
        wanted = options(batches=[1, 4], **{**common, "decoders": names})
        tables.rounds(load(model, device, dtype), wanted)

    return [
        (f"{model}: pass costs", costs),
        (f"{model}: one round by part", rounds),
        (
            f"{model}: transformers generate",
            lambda: rivals.main(["generate", "--batch", "1", "8", "--repeats", "4", *words]),
        ),
        (f"{model}: SJD as released", lambda: rivals.main(["released", "--repeats", "4", *words])),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--models", nargs="+", default=["7b", "775m"], help="sizes to time (small, 775m, 7b)")
    parser.add_argument("--pictures", type=int, default=32, help="for the exactness")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per picture against rivals")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --models small runs the same checks on the CPU", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, start = torch.device(arguments.device), time.monotonic()
    print(f"{device_kind(device)}, torch {torch.__version__}, TF32 off", flush=True)
    exact = True

    def exactness() -> None:
        nonlocal exact
        exact &= check_exactness(device, arguments.pictures)

    def families() -> None:
        nonlocal exact
        exact &= check_families(device)

    steps: list[tuple[str, Callable[[], Any]]] = [("exactness", exactness), ("families", families)]
    steps.append(("bits of a pass", lambda: check_bits(device)))
    for model in arguments.models:
        steps += speed_steps(model, device, arguments.tokens)
    for name, step in steps:
        if time.monotonic() - start > 60 * arguments.minutes:
            print(f"\n== {name}: left out, {arguments.minutes:g} minutes are over")
            continue
        print(f"\n== {name}", flush=True)
        begin = time.monotonic()
        try:
            step()
        except torch.OutOfMemoryError as error:
            print(f"does not fit into the memory: {str(error).splitlines()[0]}")
        print(f"({time.monotonic() - begin:.0f} s)", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\nexact in float64" if exact else "\nNOT exact in float64")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
