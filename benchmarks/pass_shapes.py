"""Do bits depend on where in a pass a token is computed? And how far apart are different pass shapes?

    python benchmarks/pass_shapes.py bits       # same input at every place and row: the same bits or not, by shape
    python benchmarks/pass_shapes.py length     # attention over the full cache, or the part in use: cost and bits
    python benchmarks/pass_shapes.py replay     # teacher forcing in other shapes: how many arg-maxes change places

Options as in benchmarks/tables.py; --dtypes, --attention. `replay` sets the limits of `arsd verify` for another arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models import load
from tables import inputs_of, sync

import arsd
from arsd.cli.common import table
from arsd.decoding import CounterNoise, DecodeRequest, Laws, decode
from arsd.decoding.replay import Replay
from arsd.devices import DTYPES, device_kind, resolve_device
from arsd.shapes import study_shape
from arsd.verification import ALLOWED, MARGINS

HERE = Path(__file__).parent


def same_rows(pipe: Any, batch: int, pass_tokens: int) -> Any:
    """A target whose rows all have one condition."""
    conditions = pipe.encode_inputs(**one_input(pipe))
    conditions.condition = conditions.condition.expand(-1, batch, -1, -1)
    if conditions.padding is not None:
        conditions.padding = conditions.padding.expand(-1, batch, -1)
    return pipe.target_maker(conditions)(pass_tokens, batch)


def one_input(pipe: Any) -> dict[str, Any]:
    first = inputs_of(pipe, 1)
    return {"class_labels": first} if isinstance(first[0], int) else {"prompt": first}


@torch.no_grad()
def bits(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Largest difference of logits over places, rows and both, and from the first shape."""
    kept = []
    for dtype in arguments.dtypes:
        pipe = load(arguments.model, device, DTYPES[dtype])
        total, vocab = pipe.make_grammar().num_tokens, pipe.make_grammar().vocab
        tokens = torch.randint(0, vocab, (total,), generator=torch.Generator().manual_seed(0))
        for attention in arguments.attention:
            pipe.transformer.lm.model.config._attn_implementation = attention
            first = None
            for batch in arguments.batches:
                for width in arguments.widths:
                    contexts = [total // 4, total // 2 + 3, total - 2]
                    report = study_shape(same_rows(pipe, batch, width), tokens, width, contexts)
                    first = report.reference if first is None else first
                    shape = {"dtype": dtype, "attention": attention, "batch": batch, "pass_tokens": width}
                    spread = {"places": report.places, "rows": report.rows, "everywhere": report.everywhere}
                    away = float((report.reference - first).abs().amax())
                    kept.append({**shape, **spread, "from the first shape": away})
    print(table(list(kept[0]), [[f"{v:.1e}" if isinstance(v, float) and v else v for v in row.values()] for row in kept]))
    return kept


STEPS = {"full": None, "64": 64, "exact": 1}  # attended slots: all, in steps of 64, or no more than are needed


@torch.no_grad()
def length(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of a pass at three fill levels, and how far the logits are from those over the full cache."""
    kept = []
    for dtype in arguments.dtypes:
        pipe = load(arguments.model, device, DTYPES[dtype])
        total, vocab = pipe.make_grammar().num_tokens, pipe.make_grammar().vocab
        tokens = torch.randint(0, vocab, (total,), generator=torch.Generator().manual_seed(0))
        for batch in arguments.batches:
            for width in arguments.widths:
                target = same_rows(pipe, batch, width)
                chosen = {None: "full", 64: "64"}[target._step]
                seconds, laws, spread = pass_times(target, batch, width, total, arguments.repeats), {}, {}
                for name, step in STEPS.items():
                    target._step = step
                    report = study_shape(target, tokens, width, [total // 4, total // 2 + 3, total - 2])
                    laws[name], spread[name] = report.reference, report.everywhere
                row = {"dtype": dtype, "batch": batch, "pass_tokens": width, "full, ms": 1e3 * seconds["full"]}
                for name in ("64", "exact"):
                    row[f"{name}, of full"] = seconds[name] / seconds["full"]
                    row[f"{name}, from full"] = float((laws[name] - laws["full"]).abs().amax())
                    row[f"{name}, by place"] = spread[name]
                kept.append({**row, "used": chosen})
    show = [[f"{v:.3g}" if isinstance(v, float) and v else v for v in row.values()] for row in kept]
    print(table(list(kept[0]), show))
    return kept


def pass_times(target: Any, batch: int, width: int, total: int, repeats: int) -> dict[str, float]:
    """Median seconds of a pass for every way of :data:`STEPS`, in turns."""
    readings: dict[str, list[float]] = {name: [] for name in STEPS}
    tokens = torch.zeros(batch, width, dtype=torch.int64, device=target.device)
    for repeat in range(repeats + 1):
        for start in (total // 8, total // 2, total - width):
            starts = [start] * batch
            lengths = torch.tensor(starts, device=target.device)
            target.rollback(lengths)
            for name, step in STEPS.items():
                target._step = step
                sync(target.device)
                begin = time.perf_counter()
                target.forward(tokens, lengths, starts)
                sync(target.device)
                if repeat:
                    readings[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in readings.items()}


@torch.no_grad()
def replay(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Pictures made in the first shape, teacher-forced in the others: arg-maxes that change places, and by what margin."""
    kept = []
    for dtype in arguments.dtypes:
        pipe = load(arguments.model, device, DTYPES[dtype])
        inputs, count = inputs_of(pipe, arguments.pictures), arguments.pictures
        given = {"prompt": inputs} if not isinstance(inputs[0], int) else {"class_labels": inputs}
        made = {"batch_size": arguments.batches[0], "output_type": "latent", "progress": False}
        decoder = arsd.SJD(window=arguments.widths[0])
        out = pipe(**given, decoder=decoder, generator=torch.Generator().manual_seed(11), **made)
        conditions = pipe.encode_inputs(**given)
        for batch in arguments.batches:
            for width in arguments.widths:
                flips, gaps = [], []
                for start in range(0, count - batch + 1, batch):
                    part = slice(start, start + batch)
                    grammar, padding = pipe.make_grammar(), conditions.padding
                    some = replace(conditions, condition=conditions.condition[:, part])
                    some.padding = None if padding is None else padding[:, part]
                    noise = CounterNoise(out.seeds[part], out.image_indices[part], device)
                    forced = Replay(out.tokens[part], MARGINS[dtype])
                    target = pipe.target_maker(some)(width, batch)
                    request = DecodeRequest(grammar.num_tokens)
                    decode(target, forced.parts(width), Laws(out.law_config, grammar), noise, request, batch)
                    flips += forced.flips.sum(1).tolist()
                    gaps.append(forced.gaps)
                ordered = sorted(flips)
                counts = {"mean": statistics.fmean(flips), "99.9 %": ordered[-1 - len(flips) // 1000], "most": ordered[-1]}
                largest = float(torch.cat(gaps).amax())
                row = {"dtype": dtype, "batch": batch, "pass_tokens": width, "pictures": len(flips), **counts}
                kept.append({**row, "largest gap": largest, "margin": MARGINS[dtype], "allowed": ALLOWED[dtype]})
                print(kept[-1], flush=True)
    show = [[f"{v:.3g}" if isinstance(v, float) and v else v for v in row.values()] for row in kept]
    print(table(list(kept[0]), show))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"bits": bits, "length": length, "replay": replay}
    parser.add_argument("study", choices=list(studies))
    parser.add_argument("--model", default="emoji-128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=200)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    print(f"{arguments.model}, {device_kind(device)}, torch {torch.__version__}\n")
    rows = studies[arguments.study](arguments, device)
    made = {"model": arguments.model, "device": device_kind(device), "torch": torch.__version__, "rows": rows}
    kind, dtypes = device_kind(device).replace(" ", "-"), "+".join(arguments.dtypes)
    name = f"shapes-{arguments.study}.{Path(arguments.model).name}.{kind}.{dtypes}.json"
    (HERE / "results" / name).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
