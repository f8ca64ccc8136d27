"""``arsd bench``: any strategies against plain AR, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from arsd.cli.common import (
    add_input_options,
    add_model_options,
    add_sampling_options,
    inputs_of,
    load_pipeline,
    sampling,
    size,
    table,
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("bench", help="compare decoding strategies", description=__doc__)
    parser.add_argument("--decoders", nargs="+", default=["ar", "sjd"], help="strategies, separated by spaces")
    parser.add_argument("--prompt", nargs="+", default=[], help="prompts")
    add_input_options(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--queue", action="store_true", help="one call of all prompts, whose freed rows are refilled")
    parser.add_argument(
        "--no-check", action="store_true", help="leave out the comparison with plain AR at the same pass shape"
    )
    add_sampling_options(parser)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run and print."""
    from arsd.bench import run_bench
    from arsd.decoding import parse_strategy

    strategies = [parse_strategy(text) for text in arguments.decoders]
    inputs = [next(iter(one.values())) for one in inputs_of(arguments)]
    pipe, weights = load_pipeline(arguments)

    def progress(text: str) -> None:
        print(f"\r{text}", end="", file=sys.stderr, flush=True)

    options: dict[str, Any] = {
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "seed": arguments.seed,
        "check": not arguments.no_check,
        "queue": arguments.queue,
        **size(arguments),
        **sampling(arguments),
    }
    report = run_bench(pipe, strategies, inputs, progress=progress, **options)
    print(file=sys.stderr)
    report = {"model": arguments.model, "model_hash": weights, **report}
    if arguments.json:
        print(json.dumps(report))
        return 0
    rows = f"batch {report['batch']}" + (", rows refilled" if report["queue"] else "")
    machine = f"{report['dtype']}, {report['device']}, {report['threads']} threads"
    sampled = f"guidance {report['guidance_scale']}, top-k {report['top_k']}"
    print(f"{report['model']} ({str(weights)[:12]}), {machine}, {rows}, {report['prompts']} prompts, {sampled}")
    print(bench_table(report["rows"]))
    return 0


def bench_table(rows: list[dict[str, Any]]) -> str:
    """The rows of a report for people."""
    same = {True: "yes", False: "NO", None: "-"}
    header = ["decoder", "lossless", "passes", "tokens/pass", "seconds (quartiles)", "speedup (95 %)", "pass cost"]
    header += ["outside", "= ar@W", "near-ties"]
    relaxed = any(not row["lossless"] for row in rows)
    header += ["changed tokens"] if relaxed else []
    lines = []
    for row in rows:
        interval = row["speedup_interval"]
        low, high = row["seconds_spread"]
        lines.append(
            [
                row["decoder"],
                "yes" if row["lossless"] else "no",
                row["forward_passes"],
                f"{row['tokens_per_pass']:.2f}",
                f"{row['seconds_median']:.2f} ({low:.2f}-{high:.2f})",
                f"{row['speedup']:.2f}x" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""),
                f"{row['pass_cost_ratio']:.2f}",
                f"{row['outside_forward_share']:.1%}",
                same[row["identical_to_ar_at_w"]],
                row["near_ties"],
                *([f"{row['expected_changed_tokens']:.2f}"] if relaxed else []),
            ]
        )
    return table(header, lines)
