"""Where the time goes, and what many tokens per pass are worth, one command per table.

    python benchmarks/tables.py costs        # (a) what a pass costs, by its tokens and the batch; against the memory's limit
    python benchmarks/tables.py rounds       # (b) one round by part
    python benchmarks/tables.py windows      # (c) strategies against plain AR, by window and batch
    python benchmarks/tables.py throughput   # (d) pictures per minute by batch, freed rows refilled or not

(e) and (f), rivals outside of this engine: benchmarks/rivals.py. Options: --model emoji-128, a pipeline folder, or small,
775m and 7b (random weights, which say nothing about tokens per pass); --device, --dtype, --batches, --repeats. Each prints
its table and writes benchmarks/results/<table>.<model>.<device>.<dtype>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from models import load

import arsd
from arsd.bench import as_inputs, run_bench
from arsd.cli.bench import bench_table
from arsd.cli.common import table
from arsd.devices import device_kind, resolve_device, resolve_dtype

HERE = Path(__file__).parent
TOKENS = (1, 4, 8, 16, 32, 64)


def inputs_of(pipe: Any, count: int) -> list[Any]:
    """Prompts of the shipped model's benchmark; class labels for class models."""
    if pipe.transformer.config["condition"] == "class":
        return [label % int(pipe.transformer.config["num_classes"]) for label in range(count)]
    prompts = (HERE / "prompts" / "bench64.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return [prompts[i % len(prompts)] for i in range(count)]


def some_rounds(pipe: Any, decoder: Any, batch: int, rounds: int) -> Any:
    """Figures of the first rounds of a call."""

    def stop(pipe: Any, step: int, done: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= rounds
        return {}

    options = {"output_type": "latent", "progress": False, "guidance_scale": 2.0}
    options |= {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ()}
    generator = torch.Generator().manual_seed(0)
    return pipe(**as_inputs(inputs_of(pipe, batch)), decoder=decoder, generator=generator, **options).stats


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads from memory: the best of ten sums over 1 GiB (or an eighth on a CPU)."""
    count = 2**28 if device.type == "cuda" else 2**25
    block, best = torch.ones(count, device=device), 0.0
    for _ in range(10):
        sync(device)
        start = time.perf_counter()
        block.sum()
        sync(device)
        best = max(best, 4 * count / (time.perf_counter() - start))
    return best


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def costs(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """(a) Milliseconds of a forward pass; one reading is the mean of a few rounds, the median of the readings counts."""
    layers = [*pipe.transformer.lm.model.layers.parameters(), *pipe.transformer.lm.lm_head.parameters()]
    weights, limit = sum(p.numel() * p.element_size() for p in layers), bandwidth(pipe.device)
    shapes = [(batch, tokens) for batch in arguments.batches for tokens in TOKENS]
    readings: dict[tuple[int, int], list[tuple[float, float]]] = {shape: [] for shape in shapes}
    for repeat in range(arguments.repeats + 1):
        for batch, tokens in shapes:
            stats = some_rounds(pipe, arsd.Autoregressive(pass_tokens=tokens), batch, arguments.rounds)
            outside = 1 - stats.seconds["forward"] / (stats.total_seconds - stats.seconds["prefill"])
            if repeat:
                readings[batch, tokens].append((stats.seconds["forward"] / stats.forward_passes, outside))
    rows, kept = [], []
    for (batch, tokens), values in readings.items():
        seconds, outside = (statistics.median(v[i] for v in values) for i in range(2))
        one = statistics.median(v[0] for v in readings[batch, 1])
        kept.append({"batch": batch, "tokens": tokens, "seconds": seconds, "outside": outside})
        share = weights / limit / seconds
        rows.append([batch, tokens, f"{1e3 * seconds:.2f}", f"{seconds / one:.2f}", f"{outside:.1%}", f"{share:.0%}"])
    print(f"weights of a pass {weights / 1e9:.3f} GB, memory reads {limit / 1e9:.0f} GB/s: at least")
    print(f"{1e3 * weights / limit:.2f} ms per pass\n")
    print(table(["batch", "tokens", "ms per pass", "against 1", "outside passes", "of the memory's limit"], rows))
    return {"weights_bytes": weights, "bandwidth": limit, "rows": kept}


def rounds(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """(b) Milliseconds of one round by part, rounds of all strategies in turns."""
    names = arguments.decoders or ["ar", "sjd:window=16", "sjd:window=32", "sjd:window=32,coupling=independent"]
    kept = []
    for batch in arguments.batches:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for repeat in range(arguments.repeats + 1):
            for name in names:
                stats = some_rounds(pipe, name, batch, arguments.rounds)
                parts = {part: s / stats.forward_passes for part, s in stats.seconds.items() if part != "prefill"}
                if repeat:
                    found[name].append(parts)
        for name, values in found.items():
            parts = {part: statistics.median(v[part] for v in values) for part in values[0]}
            kept.append({"batch": batch, "decoder": name, "seconds": parts})
    rows = []
    for row in kept:
        parts = row["seconds"]
        share = 1 - parts["forward"] / sum(parts.values())
        rows.append([row["batch"], row["decoder"], *(f"{1e3 * parts[p]:.2f}" for p in parts), f"{share:.1%}"])
    print(table(["batch", "decoder", *(f"{part}, ms" for part in kept[0]["seconds"]), "outside passes"], rows))
    return {"rows": kept}


def windows(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """(c) Whole calls, strategies in turns."""
    names = arguments.decoders or ["ar", *(f"sjd:window={w}" for w in (8, 16, 32)), "sjd", "sjd:coupling=independent"]
    strategies, reports = [arsd.parse_strategy(name) for name in names], []
    for batch in arguments.batches:
        count = max(batch, arguments.pictures // batch * batch)
        options = {"batch": batch, "repeats": arguments.repeats, "check": arguments.check}
        reports.append(run_bench(pipe, strategies, inputs_of(pipe, count), **options))
        print(f"batch {batch}\n{bench_table(reports[-1]['rows'])}\n", flush=True)
    return {"reports": reports}


def throughput(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """(d) Pictures per minute of plain AR and SJD with its measured window, with and without a queue."""
    names = arguments.decoders or ["ar", "sjd"]
    strategies, rows, reports = [arsd.parse_strategy(name) for name in names], [], []
    for batch in arguments.batches:
        for queue in (False, True):
            count = batch if not queue else max(3 * batch, arguments.pictures)
            repeats = max(4, arguments.repeats)
            report = run_bench(pipe, strategies, inputs_of(pipe, count), batch, repeats, queue=queue, check=False)
            reports.append(report)
            for row in report["rows"]:
                interval = row["speedup_interval"] or [0.0, 0.0]
                speed = [f"{row['pictures_per_minute']:.0f}", f"{row['speedup']:.2f}x"]
                speed.append(f"{interval[0]:.2f}-{interval[1]:.2f}")
                how = f"{count} through a queue" if queue else f"{count} at once"
                rows.append([batch, how, row["decoder"], row["pass_tokens"], *speed])
            print(f"batch {batch}, {'a queue' if queue else 'one filling'}: done", flush=True)
    head = ["batch", "pictures", "decoder", "pass_tokens", "pictures per minute", "against plain AR", "95 %"]
    print("\n" + table(head, rows))
    return {"reports": reports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"costs": costs, "rounds": rounds, "windows": windows, "throughput": throughput}
    parser.add_argument("table", choices=list(tables))
    parser.add_argument("--model", default="emoji-128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--decoders", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=16, help="of one reading, for costs and rounds")
    parser.add_argument("--pictures", type=int, default=32, help="for windows and throughput")
    parser.add_argument("--check", action="store_true", help="for windows: compare tokens with plain AR's")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    pipe = load(arguments.model, device, resolve_dtype(arguments.dtype, device))
    dtype = str(pipe.dtype).removeprefix("torch.")
    print(f"{arguments.model}, {device_kind(device)}, {dtype}, torch {torch.__version__}\n")
    report = tables[arguments.table](pipe, arguments)
    made = {"model": arguments.model, "model_hash": pipe.model_hash, "device": device_kind(device), "dtype": dtype}
    name = f"{arguments.table}.{Path(arguments.model).name}.{device_kind(device).replace(' ', '-')}.{dtype}.json"
    (HERE / "results" / name).write_text(json.dumps({**made, "torch": torch.__version__, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
