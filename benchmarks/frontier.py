"""How far relaxed acceptance gets, and what it costs in fidelity; drafters against one another.

    python benchmarks/frontier.py chain      # lossless chains of the drafter by length: tokens per pass, acceptance
    python benchmarks/frontier.py curve      # alpha(omega) of the slots that a lossless chain reaches
    python benchmarks/frontier.py predict    # COOL-SD against what is predicted from the lossless chain
    python benchmarks/frontier.py relaxed    # every relaxed rule: tokens per pass against summed local total variation
    python benchmarks/frontier.py hybrid     # drafter, Jacobi iterates, and both in one window: tokens per pass, seconds
    python benchmarks/frontier.py jacobi     # relaxed rules on Jacobi iterates
    python benchmarks/frontier.py trees      # trees of guesses against chains

Tokens per pass are those of `--pictures` pictures (benchmarks/prompts/bench64.txt), intervals are 95 % of a bootstrap over
pictures. Seconds (hybrid) are of one picture at a time, strategies in turns, against plain AR. Options: --model, --device,
--dtype, --pictures, --batch, --repeats. Each prints its table and writes benchmarks/results/frontier-<table>...json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acceptance import CurveRule, Figures, at_equal_cost, expected_tokens, fitted, gaussian_acceptance, refusals_say
from models import load

import arsd
from arsd.bench import as_inputs, run_bench
from arsd.cli.bench import bench_table
from arsd.cli.common import table
from arsd.decoding.model_strategies import chain_parts
from arsd.decoding.relaxed import CoolSDRule
from arsd.devices import device_kind, resolve_device, resolve_dtype

HERE = Path(__file__).parent
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12)


def prompts(count: int) -> list[str]:
    """The first ``count`` benchmark prompts."""
    lines = (HERE / "prompts" / "bench64.txt").read_text(encoding="utf-8").split("\n")[:-1]
    return [lines[i % len(lines)] for i in range(count)]


def measure(pipe: Any, decoder: Any, arguments: argparse.Namespace) -> Figures:
    """Decode every picture with its own seed, ``--batch`` at a time."""
    count = arguments.pictures
    inputs = as_inputs(prompts(count)) if pipe.transformer.config["condition"] == "text" else as_inputs([0] * count)
    seeds = [torch.Generator().manual_seed(1000 + i) for i in range(count)]
    options = {"output_type": "latent", "progress": False, "batch_size": arguments.batch}
    stats = pipe(**inputs, decoder=decoder, generator=seeds, **options).stats
    accepted = {int(k): int(v) for k, v in sorted(stats.accepted_lengths.items())}
    return Figures(*(np.array(x) for x in (stats.tokens, stats.row_passes, stats.expected_changed_tokens)), accepted)


def measured(pipe: Any, names: list[str], arguments: argparse.Namespace) -> dict[str, Figures]:
    """Figures of each strategy, with a line for each as it comes."""
    found = {}
    for name in names:
        found[name] = measure(pipe, name, arguments)
        print(f"{name}: {found[name].tokens_per_pass:.3f}", flush=True)
    return found


def rows_of(found: dict[str, Figures]) -> list[list[Any]]:
    rows = []
    for name, f in found.items():
        low, high = f.interval()
        share = f.changed.sum() / f.tokens.sum()
        one = [name, f"{f.tokens_per_pass:.3f}", f"{low:.3f}-{high:.3f}", f"{f.first_acceptance():.3f}"]
        rows.append([*one, f"{f.changed.mean():.2f}", f"{share:.4f}"])
    return rows


HEAD = ["decoder", "tokens/pass", "95 %", "first guess taken", "expected changed tokens", "per token"]


def chain(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Lossless chains by length."""
    names = [f"eagle:draft_length={n},coupling=rejection" for n in LENGTHS]
    names += [f"eagle:draft_length={n}" for n in (4, 8)]
    found = measured(pipe, names, arguments)
    print("\n" + table(HEAD, rows_of(found)))
    return {name: f.as_dict() for name, f in found.items()}


class Measuring(arsd.Eagle):
    """A lossless chain under a :class:`CurveRule`."""

    curve: CurveRule

    def build(self, setting: Any) -> Any:
        """See :class:`arsd.decoding.DecodingStrategy`."""
        return chain_parts(setting, self.curve, self.config["draft_length"], None)


def measured_curve(pipe: Any, length: int, factors: np.ndarray, arguments: argparse.Namespace) -> CurveRule:
    """alpha of the slots that a lossless chain reaches."""
    strategy = Measuring(draft_length=length, coupling="rejection")
    strategy.curve = CurveRule(factors)
    measure(pipe, strategy, arguments)
    return strategy.curve


def curve(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What relaxation could win: alpha(omega) of the slots that a lossless chain reaches."""
    factors = np.array([0.25, 0.5, 1, 1.1, 2, 5, 10])
    found = measured_curve(pipe, arguments.length, factors, arguments)
    alphas = found.sums / found.reached[:, None]
    rows = [
        [i + 1, int(n), *(f"{float(a):.3f}" for a in row)]
        for i, (n, row) in enumerate(zip(found.reached, alphas, strict=True))
    ]
    print(table(["guess", "reached", *(f"omega {factor:g}" for factor in factors)], rows))
    shares = torch.quantile(torch.cat(found.first), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    print("\nalpha(1) of first guesses, quantiles 5, 25, 50, 75, 95 %:", [round(float(x), 3) for x in shares])
    return {"factors": factors.tolist(), "alphas": alphas.tolist(), "first_quantiles": shares.tolist()}


def predict(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """COOL-SD's schedules against models that know the lossless chain only.

    ``gaussian``: one acceptance for all slots, alpha(omega) of Gaussian logits with the noise that gives the lossless
    chain's tokens per pass. ``curve``: alpha_i(omega_i) of slot i as the lossless chain measured it. Both take slots for
    independent. ``refusals``: see :func:`refusals_say`; it also knows the changed tokens and full passes of the relaxed one.
    """
    kept, sharpness, knobs = [], 3.0, [(delta, floor) for delta in (1.1, 2) for floor in (0.0, 1.0)]
    for length in (4, 5):
        lossless = measure(pipe, f"eagle:draft_length={length},coupling=rejection", arguments)
        noise, alpha = fitted(sharpness, length, lossless.tokens_per_pass)
        schedules = [CoolSDRule(delta=delta, floor=floor).schedule(length).numpy() for delta, floor in knobs]
        curve = measured_curve(pipe, length, np.concatenate(schedules), arguments)
        alphas = (curve.sums / curve.reached[:, None]).numpy().reshape(length, len(knobs), length)
        for n, ((delta, floor), schedule) in enumerate(zip(knobs, schedules, strict=True)):
            seen = measure(pipe, f"cool-sd:delta={delta},floor={floor},draft_length={length}", arguments)
            one = {"length": length, "lossless": lossless.tokens_per_pass, "alpha0": alpha, "delta": delta, "floor": floor}
            one |= {"gaussian": expected_tokens(gaussian_acceptance(noise, sharpness, schedule))}
            one |= {"curve": expected_tokens(alphas[:, n].diagonal()), "refusals": refusals_say(lossless, seen, length)}
            kept.append({**one, "measured": seen.tokens_per_pass, "low": seen.interval()[0], "high": seen.interval()[1]})
            print({k: round(v, 3) for k, v in kept[-1].items()}, flush=True)
    for row in kept:
        row |= {f"against {name}": row["measured"] / row[name] - 1 for name in ("gaussian", "curve", "refusals")}
    print("\n" + table([*kept[0]], [[round(value, 3) for value in row.values()] for row in kept]))
    return {"rows": kept}


def relaxed(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Frontiers of all relaxed rules, and clamped COOL-SD against each rival at the rival's own cost."""
    n = arguments.length
    end = f"residual=optimal,draft_length={n}"
    families = {
        "clamped": [f"cool-sd:delta={d},draft_length={n}" for d in (1.1, 2, 5, 10, 30, 300)],
        "published": [f"cool-sd-published:delta={d},draft_length={n}" for d in (1.1, 2, 5)],
        "uniform": [f"cool-sd:delta={d},nu=0,draft_length={n}" for d in (1.2, 1.8, 3, 6)],
        "budget": [f"cool-sd:budget={b},draft_length={n}" for b in (4, 8, 16)],
        "lantern++": [f"lantern-plus-plus:k={k},lam={m},{end}" for k, m in ((10, 5), (100, 20), (1000, 1000))],
        "lantern": [f"lantern:k={k},delta={d},{end}" for k, d in ((100, 0.02), (100, 0.1), (1000, 0.2))],
        "grouped": [
            f"grouped:group={g},radius={r},spread={s},{end}" for g, r, s in ((10, 2, 0.15), (50, 4, 0.15), (50, 4, 2))
        ],
    }
    base = f"eagle:draft_length={n},coupling=rejection"
    found = measured(pipe, [base, *(name for names in families.values() for name in names)], arguments)
    rows = rows_of(found)
    for row, f in zip(rows, found.values(), strict=True):
        saved, cost = found[base].passes.sum() - f.passes.sum(), f.changed.sum()
        row += [f"{saved / cost:.2f}" if cost else "", f"{refusals_say(found[base], f, n):.3f}"]
    print("\n" + table([*HEAD, "passes saved per changed", "refusals say"], rows))
    curve = [found[name] for name in (base, *families["clamped"])]
    rivals = [name for family in ("uniform", "lantern++", "lantern", "grouped", "published") for name in families[family]]
    against = {name: at_equal_cost(curve, found[name]) for name in rivals}
    shown = [
        [name, f"{found[name].changed.mean():.2f}", f"{x:.3f}", f"{a:.3f}-{b:.3f}"] for name, (x, a, b) in against.items()
    ]
    print("\n" + table(["rival", "changed", "clamped COOL-SD, tokens/pass, ratio", "95 %"], shown))
    return {"families": families, "figures": {name: f.as_dict() for name, f in found.items()}, "clamped_against": against}


def hybrid(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Front and rest alone and together, all seed-exact."""
    alone = [f"eagle:draft_length={n}" for n in (2, 4, 8)]
    pairs = {
        f"hybrid:draft_length={n},window={window}{extra}": f"sjd:window={window}"
        for window in (8, 16, 32)
        for n, extra in ((1, ""), (2, ""), (4, ""), (2, ",weight=none"))
    }
    names = [*alone, *dict.fromkeys(pairs.values()), *pairs, "eagle:draft_length=4,coupling=rejection"]
    found = measured(pipe, names, arguments)
    print("\n" + table(HEAD, rows_of(found)))
    kept: dict[str, Any] = {"figures": {name: f.as_dict() for name, f in found.items()}}
    kept["against"] = {name: found[name].against(found[other]) for name, other in pairs.items()}
    rows = [[name, pairs[name], f"{x:.3f}", f"{low:.3f}-{high:.3f}"] for name, (x, low, high) in kept["against"].items()]
    print("\n" + table(["hybrid", "against", "tokens/pass, ratio", "95 %"], rows))
    if arguments.repeats:
        strategies = [arsd.parse_strategy(name) for name in ["ar", *names]]
        report = run_bench(pipe, strategies, prompts(arguments.timed), 1, arguments.repeats, check=False)
        print("\n" + bench_table(report["rows"]))
        rows = []
        for row in report["rows"]:
            parts = row["round_seconds_by_part"]
            share = parts["draft"] / sum(parts.values())
            rows.append([row["decoder"], *(f"{1e3 * s:.2f}" for s in parts.values()), f"{share:.1%}"])
        print("\n" + table(["decoder", *(f"{part}, ms" for part in parts), "draft's share"], rows))
        kept["report"] = report
    return kept


def jacobi(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Relaxed rules without a trained drafter."""
    w = f"window={arguments.window}"
    names = [f"sjd:{w}", f"sjd:{w},coupling=independent", f"sjd:{w},coupling=gumbel-rejection"]
    for coupling in ("independent", "gumbel-rejection"):
        names += [f"sjd:{w},coupling={coupling},acceptance=cool-sd:delta={d}:nu=0" for d in (1.1, 1.5, 2, 4)]
        names += [f"sjd:{w},coupling={coupling},acceptance=cool-sd:budget={b}" for b in (1, 4, 16)]
    names += [f"sjd:{w},acceptance=margin:omega={o}" for o in (1.1, 1.5, 2, 4, 8)]
    found = measured(pipe, names, arguments)
    print("\n" + table(HEAD, rows_of(found)))
    return {name: f.as_dict() for name, f in found.items()}


def trees(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trees of siblings without replacement against chains."""
    names = [f"eagle:draft_length={n},coupling=rejection" for n in (4, 6)] + [
        f"eagle:tree={t},coupling={c}" for c in ("rejection", "gumbel") for t in ("2x1x1x1", "3x2x1x1", "4x2x2x1")
    ]
    found = measured(pipe, names, arguments)
    print("\n" + table(HEAD, rows_of(found)))
    return {name: f.as_dict() for name, f in found.items()}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {
        "chain": chain,
        "curve": curve,
        "predict": predict,
        "relaxed": relaxed,
        "hybrid": hybrid,
        "jacobi": jacobi,
        "trees": trees,
    }
    parser.add_argument("table", choices=list(tables))
    parser.add_argument("--model", default="emoji-128")
    parser.add_argument("--drafter", metavar="DIR", help="a trained drafter in the place of the model's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4, help="guesses of a chain, for relaxed")
    parser.add_argument("--window", type=int, default=16, help="for jacobi")
    parser.add_argument("--repeats", type=int, default=1, help="timed rounds, for hybrid; 0 times nothing")
    parser.add_argument("--timed", type=int, default=32, help="timed pictures, for hybrid")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    pipe = load(arguments.model, device, resolve_dtype(arguments.dtype, device))
    if arguments.drafter:
        pipe.drafter = arsd.EagleDrafter.from_pretrained(arguments.drafter).to(device, pipe.dtype)
    dtype = str(pipe.dtype).removeprefix("torch.")
    print(f"{arguments.model}, {device_kind(device)}, {dtype}, torch {torch.__version__}, {arguments.pictures} pictures\n")
    report = tables[arguments.table](pipe, arguments)
    made = {"model": arguments.model, "model_hash": pipe.model_hash, "device": device_kind(device), "dtype": dtype}
    label = arguments.table + (f"-{arguments.length}" if arguments.table in ("relaxed", "curve") else "")
    name = f"frontier-{label}.{Path(arguments.model).name}.{device_kind(device).replace(' ', '-')}.{dtype}.json"
    made |= {"pictures": arguments.pictures, "torch": torch.__version__}
    (HERE / "results" / name).write_text(json.dumps({**made, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
