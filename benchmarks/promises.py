"""The promises, counted on many pictures.

    python benchmarks/promises.py exact      # seed-exact decoding against plain AR at the same pass shape: 200 prompts
    python benchmarks/promises.py forgeries  # forged seeds, swapped pictures, flipped tokens: how many are refuted

Each prints a table and writes benchmarks/results/. Options: --model, --device, --dtypes, --pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from models import load

from arsd.cli.common import table
from arsd.devices import DTYPES, device_kind, resolve_device
from arsd.pipelines.outputs import to_output
from arsd.provenance import pack_tokens, save_png, tokens_sha256

HERE = Path(__file__).parent
RAGGED = (
    "sjd:window={w},pass_tokens={w}",
    "sjd:window={third},pass_tokens={w}",
    "sjd:window={half},init=left,pass_tokens={w}",
)


def inputs_of(pipe: Any, count: int) -> dict[str, Any]:
    if pipe.transformer.config["condition"] == "class":
        return {"class_labels": [n % int(pipe.transformer.config["num_classes"]) for n in range(count)]}
    prompts = (HERE / "prompts" / "exact200.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return {"prompt": [prompts[n % len(prompts)] for n in range(count)]}


def exact(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every picture has its own seed; batch 8 mixes windows and initial guesses, and refills freed rows."""
    kept, count = [], arguments.pictures
    for dtype in arguments.dtypes:
        pipe = load(arguments.model, device, DTYPES[dtype])
        for batch in arguments.batches:
            for width in arguments.widths:

                def run(decoder: Any, rows: int = batch, pipe: Any = pipe) -> Any:
                    sources = [torch.Generator().manual_seed(1000 + n) for n in range(count)]
                    options = {"batch_size": rows, "output_type": "latent", "progress": False}
                    return pipe(**inputs_of(pipe, count), generator=sources, decoder=decoder, **options)

                sizes = {"w": width, "half": max(1, width // 2), "third": max(1, width // 3)}
                names = [RAGGED[n % (3 if batch > 1 else 1)].format(**sizes) for n in range(count)]
                fast, plain = run(names), run(f"ar:pass_tokens={width}")
                same = int((fast.tokens == plain.tokens).all(1).sum())
                ties = sum(fast.stats.near_ties)
                kept.append({"dtype": dtype, "batch": batch, "pass_tokens": width, "pictures": count, "equal": same})
                kept[-1] |= {"near-ties": ties, "tokens per pass": round(fast.stats.tokens_per_pass, 2)}
                print(kept[-1], flush=True)
    print("\n" + table(list(kept[0]), [list(row.values()) for row in kept]))
    return kept


def forgeries(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Every picture and its forgeries, verified with the probe of this machine and with another one (margins)."""
    kept, count = [], arguments.pictures
    for dtype in arguments.dtypes:
        pipe = load(arguments.model, device, DTYPES[dtype])
        out = pipe(**inputs_of(pipe, count), generator=torch.Generator().manual_seed(5), batch_size=8, progress=False)
        made = [cases_of(pipe, out, n, random.Random(n)) for n in range(count)]
        for name in made[0]:
            for arithmetic in ("same", "other"):
                with tempfile.TemporaryDirectory() as folder:
                    paths = [Path(folder) / f"{n}.png" for n in range(count)]
                    for path, cases in zip(paths, made, strict=True):
                        image, record = cases[name]
                        save_png(image, path, record if arithmetic == "same" else {**record, "probe": "0" * 16})
                    found = Counter(result.result for result in pipe.verify(paths))
                kept.append({"dtype": dtype, "case": name, "arithmetic": arithmetic, "pictures": count})
                kept[-1] |= {result: found[result] for result in ("verified", "refuted", "unknown")}
                print(kept[-1], flush=True)
    print("\n" + table(list(kept[0]), [list(row.values()) for row in kept]))
    return kept


def cases_of(pipe: Any, out: Any, n: int, rng: random.Random) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A picture as it is, and forgeries consistent in themselves: hash and pixels are made to fit the tokens claimed."""
    count, vocab, record = len(out.tokens), pipe.make_grammar().vocab, pipe.record(out, n)
    tokens = out.tokens[n].clone()
    place = rng.randrange(len(tokens))
    tokens[place] = (int(tokens[place]) + 1 + rng.randrange(vocab - 1)) % vocab
    pixels = to_output(pipe.decode_pixels(tokens[None]), "pil")[0]
    return {
        "honest": (out.images[n], record),
        "forged seed": (out.images[n], {**record, "noise_seed": rng.getrandbits(63)}),
        "swapped picture": (out.images[(n + 1 + rng.randrange(count - 1)) % count], record),
        "one flipped token": (pixels, {**record, "tokens": pack_tokens(tokens), "tokens_sha256": tokens_sha256(tokens)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    promises = {"exact": exact, "forgeries": forgeries}
    parser.add_argument("promise", choices=list(promises))
    parser.add_argument("--model", default="emoji-128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--widths", type=int, nargs="+", default=[16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="for exact")
    parser.add_argument("--pictures", type=int, help="default: 200 for exact, 100 for forgeries")
    arguments = parser.parse_args()
    arguments.pictures = arguments.pictures or {"exact": 200, "forgeries": 100}[arguments.promise]
    device = resolve_device(arguments.device)
    print(f"{arguments.model}, {device_kind(device)}, torch {torch.__version__}\n")
    rows = promises[arguments.promise](arguments, device)
    made = {"model": arguments.model, "device": device_kind(device), "torch": torch.__version__, "rows": rows}
    kind = device_kind(device).replace(" ", "-")
    words = [arguments.promise, Path(arguments.model).name, kind, "+".join(arguments.dtypes)]
    if arguments.promise == "exact":
        words.append("batch-" + "+".join(map(str, arguments.batches)))
    (HERE / "results" / f"{'.'.join(words)}.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
