"""What parallel decoding is worth on clips of emoji-video, one command per part.

    python benchmarks/video_generation.py prompts --clips runs/clips   # names of the clips that move most
    python benchmarks/video_generation.py passes    # tokens per pass: couplings x window x initial guesses, and frame-copy
    python benchmarks/video_generation.py speed     # seconds against plain AR, in turns, with the cost of a pass
    python benchmarks/video_generation.py sheets    # contact sheets in docs/images
    python benchmarks/video_generation.py sets --clips runs/clips --out runs/sets   # what `arsd evaluate --video` compares

`passes` counts and times nothing: rows share their passes, and a clip's passes are those it took part in. Under the coupling
`gumbel` and for frame-copy every clip is held against plain AR's at a pass of one token. `speed` is `arsd bench`: strategies
take turns call by call, one clip at a time. Options: --model, --prompts, --count, --batch, --dtype, --repeats, --decoders,
--out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import arsd
from arsd.bench import run_bench
from arsd.cli.bench import bench_table
from arsd.cli.common import quiet, table
from arsd.devices import device_kind, resolve_dtype
from arsd.run_folders import write_atomically

HERE = Path(__file__).parent
MOTION = HERE / "prompts" / "motion24.txt"
EVERYDAY = ("winking face", "red heart", "dog face", "rocket", "face with tears of joy", "lion")
LONGEST_COPY = 64  # drafts of 15 and of 63 copies make the same passes: longer ones only take long
WINDOWS = (16, 32, 64, 128, 256)
COUPLINGS = ("gumbel", "maximal", "gumbel-rejection", "independent")
INITS = ("uniform", "left", "above", "previous-frame")


def read_motion(path: Path) -> list[str]:
    """The prompts of a file."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def choose(arguments: argparse.Namespace) -> None:
    """Write the names of the training clips with the most motion, one per concept."""
    from arsd.metrics.video_frames import Changes
    from arsd.training.clips import ClipData
    from arsd.training.video_tokens import clip_pixels

    data = ClipData.load(arguments.clips)
    found: dict[str, tuple[float, str]] = {}
    for index in data.indices(False):
        pixels = ((clip_pixels(data.frames[index]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        info = data.info[index]
        found[info.concept] = max(found.get(info.concept, (0.0, "")), (Changes.of(pixels).motion, info.name))
    every = sorted(found.values(), reverse=True)
    low, middle, high = np.percentile([m for m, _ in every], [10, 50, 90])
    lines = [
        f"# of {len(every)} concepts, those that move most: share of pixels that change between 8 frames,",
        f"# {every[0][0]:.3f} to {every[arguments.count - 1][0]:.3f} (all: {low:.3f}, {middle:.3f}, {high:.3f}"
        " at 10, 50, 90 %)",
    ]
    MOTION.write_text("\n".join([*lines, *(name for _, name in every[: arguments.count])]) + "\n", encoding="utf-8")
    print(MOTION.read_text(encoding="utf-8"))


def decoded(pipe: Any, prompts: list[str], decoder: str, batch: int) -> Any:
    """All prompts, each with the seed of its number."""
    generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    return pipe(prompts, generator=generators, decoder=decoder, batch_size=batch, output_type="latent", progress=False)


def passes(pipe: Any, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Tokens per pass of everything; what the file ``out`` already has of this model and these clips is kept."""
    prompts = read_motion(arguments.prompts)[: arguments.count]
    about = {"model_hash": pipe.model_hash, "dtype": arguments.dtype, "clips": prompts}
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    rows = known["rows"] if all(known.get(name) == value for name, value in about.items()) else []
    asked = [
        f"sjd:window={w},coupling={c},init={i}"
        for c in arguments.couplings
        for w in arguments.windows
        for i in arguments.inits
    ]
    short = [w for w in arguments.windows if w <= LONGEST_COPY]
    asked += [f"frame-copy:draft_length={w - 1},guess={g}" for g in ("token", "law") for w in short]
    done = {row["decoder"] for row in rows}
    plain = decoded(pipe, prompts, "ar", arguments.batch).tokens
    for text in (text for text in asked if text not in done):
        made = decoded(pipe, prompts, text, arguments.batch)
        exact = arsd.parse_strategy(text).seed_exact
        same = int((made.tokens == plain).all(1).sum()) if exact else None
        each = [n / p for n, p in zip(made.stats.tokens, made.stats.row_passes, strict=True)]
        rows.append({"decoder": text, "tokens_per_pass": made.stats.tokens_per_pass, "clips": each, "same_clips": same})
        print(
            f"{text:60s} {made.stats.tokens_per_pass:6.2f}  {'' if same is None else f'{same}/{len(prompts)} same'}",
            flush=True,
        )
        write_atomically(out, json.dumps({**about, "tokens": plain.shape[1], "rows": rows}, indent=1) + "\n")
    return {"clips": prompts, "tokens": plain.shape[1], "rows": rows}


def passes_table(found: dict[str, Any], windows: tuple[int, ...]) -> str:
    """Lines of coupling and init, columns of windows."""
    known = {row["decoder"]: row["tokens_per_pass"] for row in found["rows"]}
    lines = []

    def line(name: str, init: str, pattern: str) -> None:
        cells = [known.get(pattern.format(w, w - 1)) for w in windows]
        if any(cell is not None for cell in cells):
            lines.append([name, init, *("" if cell is None else f"{cell:.2f}" for cell in cells)])

    for name, text in (("frame-copy, tokens", "token"), ("frame-copy, laws", "law")):
        line(name, "", f"frame-copy:draft_length={{1}},guess={text}")
    for coupling in COUPLINGS:
        for init in INITS:
            line(f"sjd, {coupling}", init, f"sjd:window={{0}},coupling={coupling},init={init}")
    return table(["decoder", "init", *map(str, windows)], lines)


def speed(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds against plain AR."""
    prompts = read_motion(arguments.prompts)[: arguments.count]
    chosen = [arsd.parse_strategy(text) for text in ("ar", *arguments.decoders)]

    def show(text: str) -> None:
        print(text, flush=True)

    found = run_bench(
        pipe, chosen, prompts, repeats=arguments.repeats, check=False, progress=show
    )  # `passes` compares tokens
    for row in found["rows"]:
        row["share_of_possible"] = row["speedup"] / (row["tokens_per_pass"] / row["pass_cost_ratio"])
    return found


def sheets(pipe: Any, arguments: argparse.Namespace) -> None:
    """Contact sheets: clips of everyday prompts, those that move most, and these going on from pictures of emoji-128."""
    from arsd.sheets import contact_sheet

    folder = HERE.parent / "docs" / "images"
    prompts = read_motion(arguments.prompts)[: arguments.count]
    for names, name in ((list(EVERYDAY), "emoji-video-everyday"), (prompts, "emoji-video")):
        made = pipe(names, generator=torch.Generator().manual_seed(0), batch_size=8, progress=False)
        columns = len(made.frames[0])
        labels = [text if t == 0 else "" for text in names for t in range(columns)]
        contact_sheet([f for clip in made.frames for f in clip], labels, columns=columns).save(folder / f"{name}.png")
    with quiet():
        painter: Any = arsd.AutoARPipeline.from_pretrained("emoji-128")
    begin = painter(prompts, generator=torch.Generator().manual_seed(0), progress=False).images
    made = pipe(
        prompts, frames=[[one] for one in begin], generator=torch.Generator().manual_seed(0), batch_size=8, progress=False
    )
    frames = [f for first, clip in zip(begin, made.frames, strict=True) for f in (first.resize(clip[0].size), *clip)]
    labels = [name if t == 0 else "" for name in prompts for t in range(columns + 1)]
    contact_sheet(frames, labels, columns=columns + 1).save(folder / "emoji-video-from-pictures.png")


@torch.no_grad()
def sets(pipe: Any, arguments: argparse.Namespace) -> None:
    """Clips in ``.npz`` files [N, T, H, W, 3] uint8, and prompts, as ``arsd evaluate --video`` reads them.

    ``real`` are training clips, ``other`` others of them, ``coded`` those through the frame tokenizer; ``made`` are made
    from their names, and ``continued`` from names and first frames.
    """
    from arsd.training.clips import ClipData
    from arsd.training.video_tokens import clip_pixels

    data, folder = ClipData.load(arguments.clips), arguments.out or Path("runs/sets")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(0).permutation(data.indices(False))[: 2 * arguments.count]
    pixels = torch.stack([(clip_pixels(data.frames[index]) + 1) / 2 for index in chosen])
    pixels, names = pixels.clamp(0, 1), [data.info[index].name for index in chosen[arguments.count :]]
    real, other = pixels.split(arguments.count)

    def write(name: str, clips: Any) -> None:
        np.savez(folder / f"{name}.npz", (clips * 255).round().byte().permute(0, 1, 3, 4, 2).numpy())
        print(name, flush=True)

    (folder / "prompts.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    write("real", real)
    write("other", other)
    coded = pipe.decode_frames(pipe.encode_frames(other.to(pipe.vq.dtype) * 2 - 1))
    write("coded", (coded.float() / 2 + 0.5).clamp(0, 1))
    for name, begun in (("made", None), ("continued", other[:, :1])):
        parts = []
        for start in range(0, len(names), arguments.batch):
            few = slice(start, start + arguments.batch)
            given = {} if begun is None else {"frames": begun[few]}
            generators = [torch.Generator().manual_seed(n) for n in range(len(names))[few]]
            parts.append(pipe(names[few], generator=generators, output_type="pt", progress=False, **given).frames.float())
        write(name, torch.cat(parts))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prompts", "passes", "speed", "sheets", "sets"))
    parser.add_argument("--clips", type=Path, default=Path("runs/clips"))
    parser.add_argument("--model", default="emoji-video")
    parser.add_argument("--prompts", type=Path, default=MOTION)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--couplings", nargs="+", default=list(COUPLINGS))
    parser.add_argument("--inits", nargs="+", default=list(INITS))
    parser.add_argument("--decoders", nargs="+", default=["sjd:window=32,init=previous-frame", "frame-copy:draft_length=31"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "prompts":
        choose(arguments)
        return
    with quiet():
        pipe = arsd.AutoARPipeline.from_pretrained(
            arguments.model, dtype=resolve_dtype(arguments.dtype, torch.device("cpu"))
        )
    if arguments.part in ("sheets", "sets"):
        (sheets if arguments.part == "sheets" else sets)(pipe, arguments)
        return
    out = arguments.out or HERE / "results" / f"video-{arguments.part}.json"
    found = passes(pipe, arguments, out) if arguments.part == "passes" else speed(pipe, arguments)
    where = {"model": arguments.model, "model_hash": pipe.model_hash, "device": device_kind(pipe.device)}
    report = {**where, "dtype": arguments.dtype, "threads": torch.get_num_threads(), "torch": torch.__version__, **found}
    write_atomically(out, json.dumps(report, indent=1) + "\n")
    print(passes_table(found, WINDOWS) if arguments.part == "passes" else bench_table(found["rows"]))


if __name__ == "__main__":
    main()
