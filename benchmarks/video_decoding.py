"""What decoding the text of a Video-LLM takes: policies of Sparse-to-Dense, cheap drafters, bandits, and the cost model.

    arsd train clips --out runs/clips                 # once: fetches the clips
    python benchmarks/video_decoding.py               # tables, and benchmarks/results/video-decoding.json
    python benchmarks/video_decoding.py --part costs  # predicted against measured speed alone

Parts `text` and `bandits`: held-out clips of 64 frames or more (2,305 visual tokens of the shipped model) are described
greedily by every strategy, strategies in turns, clip by clip; bandits carry their statistics from clip to clip. What has a
bound to keep (plain AR and ucb-spec, in part `bandits`) is decoded --rounds times per clip, by as many objects with
statistics of their own, the others once. `accepted` is the share of guesses that the dense pass took; seconds are those
behind the prefill, per token, and the speed is the mean ratio to plain AR of the same clip with the 95 % interval over the
clips. Part `costs`: passes of the model over n x batch; the speed of Sparse-to-Dense by research's cost model, with
overhead and bandwidth fitted to passes of plain AR only and p from the accepted share, beside the measured one.

Options: --clips, --model, --count, --frames, --dtype, --threads, --rounds, --part, --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import paired_ratio

from arsd import VideoLLMPipeline, parse_strategy
from arsd.cli.common import table
from arsd.decoding.costs import PassCosts, chance_of, speedup
from arsd.decoding.strategies import DecodingStrategy
from arsd.devices import device_kind
from arsd.models.selection import POLICIES
from arsd.run_folders import write_atomically
from arsd.video import read_video

HERE = Path(__file__).parent
QUESTION = "Describe the clip."
LENGTH, BUDGET = 5, 256
STRATEGIES = (
    "ar",
    *(f"std:budget={BUDGET},draft_length={LENGTH}" + ("" if p == "std" else f",policy={p}") for p in POLICIES),
    f"std:budget={BUDGET},draft_length={LENGTH},refresh=0.7",
    "prompt-lookup:draft_length=6",
    "token-recycling",
    "layer-skip:draft_length=3,skip=0.25",
)
BANDITS = ("ar", "ucb-spec", "exp3-spec")
BOUND = ("ar", "ucb-spec")


def per_token(stats: Any, parts: tuple[str, ...] = ("draft", "forward", "verify", "other")) -> float:
    """Seconds per token behind the prefill."""
    return sum(stats.seconds[part] for part in parts) / max(1, sum(stats.tokens))


def accepted(stats: Any, length: int) -> float | None:
    """Share of guesses that were taken."""
    guesses = length * sum(stats.row_passes)
    return (sum(stats.tokens) - sum(stats.row_passes)) / guesses if guesses else None


def guesses_of(strategy: DecodingStrategy) -> int:
    """Guesses of a chain per pass; 0 where there is no one number."""
    return int(strategy.config.get("draft_length") or 0)


def text_part(pipe: VideoLLMPipeline, clips: list[Path], frames: int, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Every strategy on every clip, in turns."""
    turns = [(text, parse_strategy(text)) for n in range(rounds) for text in texts if not n or text in BOUND]
    found: dict[str, list[list[Any]]] = {text: [] for text in texts}  # of each clip, of each round
    visual, same = [], dict.fromkeys(texts, 0)
    for text in texts:  # compile caches and self-checks are nobody's seconds
        pipe(clips[0], QUESTION, num_frames=frames, decoder=text)
    for number, clip in enumerate(clips):
        video = read_video(clip, frames)[0]
        outs: dict[str, list[Any]] = {text: [] for text in texts}
        first = number * len(turns) // len(clips)
        for text, strategy in turns[first:] + turns[:first]:
            outs[text].append(pipe(video, QUESTION, decoder=strategy))
        plain = outs["ar"][0]
        for text, several in outs.items():
            found[text].append([out.stats for out in several])
            same[text] += int(all(torch.equal(out.tokens, plain.tokens) for out in several))
        visual.append(plain.num_visual_tokens)
        print(f"{number + 1}/{len(clips)} {clip.name}: {plain.stats.tokens[0]} tokens", flush=True)
    rows = [row_of(text, found, guesses_of(parse_strategy(text)), same[text]) for text in texts]
    what = {"clips": len(clips), "visual_tokens": [min(visual), max(visual)], "frames": frames, "rounds": rounds}
    return what | {"rows": rows}


def row_of(name: str, found: dict[str, list[list[Any]]], length: int, same: int) -> dict[str, Any]:
    """Figures of one strategy over all clips."""
    mine, plain = ([statistics.fmean(map(per_token, clip)) for clip in found[text]] for text in (name, "ar"))
    stats = [one for clip in found[name] for one in clip]
    tokens, passes = sum(sum(s.tokens) for s in stats), sum(s.forward_passes for s in stats)
    shares = [accepted(s, length) for s in stats] if length else []
    arms: dict[str, int] = {}
    for s in stats:
        for arm, pulls in s.arms.items():
            arms[arm] = arms.get(arm, 0) + pulls
    mean, low, high = paired_ratio(plain, mine) if name != "ar" else (1.0, 1.0, 1.0)
    split = {part: sum(s.seconds[part] for s in stats) / tokens for part in ("draft", "forward", "verify", "other")}
    return {
        "strategy": name,
        "tokens": tokens,
        "forward_passes": passes,
        "tokens_per_pass": tokens / passes,
        "accepted": statistics.fmean(shares) if shares else None,
        "seconds_per_token": statistics.fmean(mine),
        "split": split,
        "prefill_seconds": statistics.fmean(s.seconds["prefill"] for s in stats),
        "speed": [mean, low, high],
        "same_text": same,
        "near_ties": sum(sum(s.near_ties) for s in stats),
        "arms": arms,
    }


def stretched(clip: Path, frames: int) -> np.ndarray:
    """[T, H, W, 3] so many frames of a clip; some of them twice where it has fewer."""
    video = read_video(clip)[0]
    return video[np.linspace(0, len(video) - 1, frames).round().astype(int)]


def costs_part(pipe: VideoLLMPipeline, clips: list[Path], sizes: list[tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Speed of Sparse-to-Dense over frames x batch, predicted and measured."""
    strategy = f"std:budget={BUDGET // 2},draft_length=3"
    measured: dict[tuple[int, int], dict[str, Any]] = {}
    for repeat in range(repeats + 1):  # the first round warms up
        for frames, batch in sizes:
            videos = [stretched(clips[(repeat + i) % len(clips)], frames) for i in range(batch)]
            outs = {name: pipe(videos, QUESTION, max_new_tokens=48, decoder=name) for name in ("ar", strategy)}
            if not repeat:
                continue
            entry = measured.setdefault((frames, batch), {"ar": [], "std": [], "share": [], "visual": 0})
            ar, std = outs["ar"].stats, outs[strategy].stats
            entry["visual"] = outs["ar"].num_visual_tokens[0]
            entry["ar"].append(ar.seconds["forward"] / ar.forward_passes)
            entry["std"].append(sum(std.seconds[p] for p in ("draft", "forward")) / std.forward_passes)
            entry["wide"] = entry.get("wide", []) + [std.seconds["forward"] / std.forward_passes]
            entry["share"].append(accepted(std, 3))
            entry["text"] = outs["ar"].stats.tokens[0]
    base = PassCosts.of_model(pipe.model, 1, 0)
    sized = {k: PassCosts.of_model(pipe.model, k[1], e["visual"] + 40) for k, e in measured.items()}
    pairs = [(c.dense() - c.overhead, statistics.median(measured[k]["ar"])) for k, c in sized.items()]
    fitted = base.fitted(pairs)
    rows = []
    for key, entry in measured.items():
        costs = PassCosts(base.weights, base.entry, key[1], entry["visual"] + 40, fitted.overhead, fitted.bandwidth)
        p = chance_of(statistics.fmean(entry["share"]), 3)
        predicted = speedup(p, 3, costs.draft_cost(BUDGET // 2 + 40), 1.0)
        round_seconds, plain = statistics.median(entry["std"]), statistics.median(entry["ar"])
        wide = statistics.median(entry["wide"]) / plain
        rows.append(
            {
                "frames": key[0],
                "batch": key[1],
                "visual_tokens": entry["visual"],
                "pressure": costs.pressure,
                "p": p,
                "ar_seconds": plain,
                "ar_seconds_predicted": costs.seconds(),
                "verify_cost": wide,
                "speed_predicted": predicted,
                "speed_predicted_wide": speedup(p, 3, costs.draft_cost(BUDGET // 2 + 40), wide),
                "speed_measured": (3 * statistics.fmean(entry["share"]) + 1) / (round_seconds / plain),
            }
        )
    return {"strategy": strategy, "overhead_bytes": fitted.overhead, "bandwidth": fitted.bandwidth, "rows": rows}


def show_text(part: dict[str, Any]) -> None:
    """The table of strategies."""
    header = ["strategy", "tokens/pass", "accepted", "ms/token", "draft", "dense", "rest", "speed", "95 %", "same text"]
    rows = []
    for r in part["rows"]:
        ms = {k: f"{1e3 * v:.2f}" for k, v in r["split"].items()}
        rest = f"{1e3 * (r['split']['verify'] + r['split']['other']):.2f}"
        mean, low, high = r["speed"]
        share = "" if r["accepted"] is None else f"{r['accepted']:.3f}"
        line = [r["strategy"], f"{r['tokens_per_pass']:.2f}", share, f"{1e3 * r['seconds_per_token']:.2f}", ms["draft"]]
        rows.append(
            [*line, ms["forward"], rest, f"{mean:.2f}", f"{low:.2f}-{high:.2f}", f"{r['same_text']}/{part['clips']}"]
        )
    print(table(header, rows))
    for r in part["rows"]:
        if r["arms"]:
            print(r["strategy"], r["arms"])


def show_costs(part: dict[str, Any]) -> None:
    """The table of sizes."""
    header = ["visual tokens", "batch", "B kappa n / W", "p", "AR ms", "predicted", "c_v", "speed", "predicted", "with c_v"]
    rows = [
        [
            r["visual_tokens"],
            r["batch"],
            f"{r['pressure']:.2f}",
            f"{r['p']:.2f}",
            f"{1e3 * r['ar_seconds']:.2f}",
            f"{1e3 * r['ar_seconds_predicted']:.2f}",
            f"{r['verify_cost']:.2f}",
            f"{r['speed_measured']:.2f}",
            f"{r['speed_predicted']:.2f}",
            f"{r['speed_predicted_wide']:.2f}",
        ]
        for r in part["rows"]
    ]
    print(table(header, rows))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("runs/clips/held-out"))
    parser.add_argument("--model", default="emoji-video-chat")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of plain AR and ucb-spec, in the part bandits")
    parser.add_argument("--repeats", type=int, default=5, help="of the part costs")
    parser.add_argument("--part", choices=("text", "bandits", "costs", "all"), default="all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "video-decoding.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = VideoLLMPipeline.from_pretrained(options.model, dtype=options.dtype)
    clips = [clip for clip in sorted(options.clips.glob("*.webp")) if len(read_video(clip)[0]) >= options.frames]
    clips = clips[-options.count :]
    report = json.loads(options.out.read_text()) if options.out.is_file() else {}
    report |= {
        "model": options.model,
        "dtype": options.dtype,
        "threads": options.threads,
        "device": device_kind(pipe.device),
    }
    if not clips or options.rounds < 1:
        parser.error(f"no clips of {options.frames} frames in {options.clips}, or no rounds")
    for part, texts, rounds in (("text", STRATEGIES, 1), ("bandits", BANDITS, options.rounds)):
        if options.part in (part, "all"):
            report[part] = text_part(pipe, clips, options.frames, texts, rounds)
            show_text(report[part])
            write_atomically(options.out, json.dumps(report, indent=1) + "\n")
    if options.part in ("costs", "all"):
        sizes = [(frames, batch) for frames in (16, 64, 128) for batch in (1, 4)]
        report["costs"] = costs_part(pipe, clips, sizes, options.repeats)
        show_costs(report["costs"])
        write_atomically(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
