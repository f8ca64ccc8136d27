"""Can the frontier's test of lossless strategies fail? How often it rejects plain AR itself, and hotter or colder laws.

    python benchmarks/power.py --sets 10 --temperatures 1 1.15

Draws sets of pictures of the protocol's prompts (seed-exact SJD: plain AR's own pictures), each with seeds of its own, and
puts each through the test that `arsd evaluate --frontier` makes: excess surprise, and CLIP scores against a further set of
plain AR. Intervals are corrected as for --claims lossless strategies. Prints and writes benchmarks/results/power...json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import load

from arsd.cli.common import table
from arsd.devices import device_kind, dtype_name, resolve_device, resolve_dtype
from arsd.metrics.divergence import teacher_force
from arsd.metrics.extractors import find_scorer
from arsd.metrics.frontier import STATISTICS, same_law
from arsd.metrics.protocols import Protocol
from arsd.metrics.resampling import corrected

HERE = Path(__file__).parent
FIRST_SEED = 7 * 10**15  # far from those of any evaluation


def one_set(pipe: Any, scorer: Any, prompts: list[str], number: int, temperature: float, batch: int) -> tuple[Any, Any]:
    """(excess surprise, CLIP scores) of a set, each [N]."""
    seeds = [torch.Generator().manual_seed(FIRST_SEED + 10**6 * number + i) for i in range(len(prompts))]
    options = {"decoder": "sjd:window=16", "batch_size": batch, "progress": False, "output_type": "latent"}
    tokens = pipe(prompts, generator=seeds, temperature=temperature, **options).tokens
    surprise = teacher_force(pipe, prompts, tokens, batch=8).excess_surprise.numpy()
    pictures = [np.asarray(image) for image in pipe.to_pil(tokens)]
    return surprise, scorer.score(pictures, prompts).double().numpy()


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-128")
    parser.add_argument("--protocol", default="emoji-128")
    parser.add_argument("--scorer", default="emoji-clip")
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1.15])
    parser.add_argument("--claims", type=int, default=4, help="lossless strategies that intervals are corrected for")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    pipe = load(arguments.model, device, resolve_dtype(arguments.dtype, device))
    scorer = find_scorer(arguments.scorer, device)
    prompts = [str(text) for text in Protocol.load(arguments.protocol).inputs(None, arguments.model)]
    confidence = corrected(0.95, STATISTICS * arguments.claims)
    limit = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    plain = one_set(pipe, scorer, prompts, 0, 1.0, arguments.batch)[1]
    number, rows, kept = 0, [], []
    for temperature in arguments.temperatures:
        began, found = time.perf_counter(), []
        for _ in range(arguments.sets):
            number += 1
            surprise, scores = one_set(pipe, scorer, prompts, number, temperature, arguments.batch)
            test = same_law(surprise, scores - plain, confidence)
            ratios = [x.mean() / (x.std(ddof=1) / len(x) ** 0.5) for x in (surprise, scores - plain)]
            assert test.surprise is not None and test.score is not None
            found.append([not test.surprise.has_zero, not test.score.has_zero, not test.holds, *map(float, ratios)])
            print(f"temperature {temperature:g}: z of surprise {ratios[0]:.1f}, of scores {ratios[1]:.1f}", flush=True)
        by = np.array(found, dtype=float)
        means = [float(by[:, 3 + i].mean()) for i in range(STATISTICS)]
        normal = statistics.NormalDist()
        power = [normal.cdf(m - limit) + normal.cdf(-m - limit) for m in means]
        rows.append(
            [f"{temperature:g}", *(f"{int(n)} of {len(by)}" for n in by[:, :3].sum(0)), *(f"{m:.1f}" for m in means)]
        )
        rows[-1] += [f"{p:.3f}" for p in power]
        kept.append({"temperature": temperature, "sets": found, "power": power, "seconds": time.perf_counter() - began})
    head = ["temperature", "by surprise", "by CLIP score", "rejected", "mean z, surprise", "mean z, score"]
    head += ["power, surprise", "power, score"]
    made = {
        "model": arguments.model,
        "model_hash": pipe.model_hash,
        "device": device_kind(device),
        "dtype": dtype_name(pipe),
    }
    made |= {"pictures": len(prompts), "confidence": confidence, "scorer": scorer.describe(), "torch": torch.__version__}
    print(f"\n{len(prompts)} pictures a set, intervals of {confidence:.5f}\n" + table(head, rows))
    name = f"power.{Path(arguments.model).name}.{device_kind(device).replace(' ', '-')}.{dtype_name(pipe)}.json"
    (HERE / "results" / name).write_text(json.dumps({**made, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
