"""``arsd evaluate``: FID, KID, CLIP score and the figures of decoding, of folders or of strategies; the frontier of both.

Pictures in folders, zips or npz files:

    arsd evaluate FOLDER [FOLDER ...] --reference REAL [--prompts FILE]

Clips, likewise (more in docs/evaluation.md):

    arsd evaluate CLIPS [CLIPS ...] --video --reference REAL [--features i3d:PATH]

Strategies, drawn first (run again, it goes on where it stopped):

    arsd evaluate --decoders ar sjd cool-sd:delta=2 --protocol emoji-128 --out runs/mine
    arsd evaluate --frontier
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arsd.cli.common import (
    add_model_options,
    add_sampling_options,
    load_pipeline,
    quiet,
    read_prompts,
    refuse_clips,
    sampling,
    table,
)
from arsd.cli.evaluate_video import add_video_options, check_options, evaluate_clips
from arsd.errors import InputError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="judge pictures and clips: FID, KID, FVD, CLIP score, speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="pictures to judge: folder, .zip or .npz")
    parser.add_argument("--decoders", nargs="+", metavar="STRATEGY", help="strategies to draw and judge")
    parser.add_argument("--frontier", action="store_true", help="all strategies of the protocol, with controls and plots")
    parser.add_argument("--protocol", help="what a paper did: emoji-128, emoji-128-fid, lantern, sjd-coco, ... or a .json")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where COCO, PartiPrompts, ... are, for the protocol")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line, instead of the protocol's")
    parser.add_argument("--pictures", type=int, metavar="N", help="another number than the protocol's")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--reference", type=Path, metavar="REAL", help="real pictures: folder, .zip or .npz")
    parser.add_argument("--stats", type=Path, metavar="NPZ", help="published statistics (mu, sigma) instead")
    parser.add_argument("--features", help="emoji-clip, inception[:PATH], efficientnet-lite0, clip:FOLDER_OR_ID")
    parser.add_argument("--scorer", help="emoji-clip, clip:FOLDER_OR_ID, clip:vit-b/32, ..., none")
    parser.add_argument("--prefix", help="put before each prompt for the CLIP score")
    parser.add_argument("--resizer", help="of judged pictures: lanczos-256, bicubic-299-center, none")
    parser.add_argument("--batch", type=int, default=8, help="rows of a pass")
    parser.add_argument("--chunk", type=int, default=40, help="pictures of a strategy before the next one has its turn")
    parser.add_argument("--forced", type=int, default=24, help="pictures for the divergence on AR's prefixes; 0: none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="pictures, card, table, plot (default: runs/<protocol>)")
    add_sampling_options(parser)
    add_model_options(parser)
    add_video_options(parser)
    parser.add_argument("--json", action="store_true", help="print the evaluation card")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Judge folders, or draw and judge."""
    if arguments.folders and (arguments.decoders or arguments.frontier):
        raise InputError("give folders to judge, or --decoders to draw: not both")
    for name in ("n", "batch", "chunk"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if arguments.pictures is not None and arguments.pictures < 1:
        raise InputError(f"--pictures must be at least 1, not {arguments.pictures}")
    if arguments.forced < 0:
        raise InputError(f"--forced must not be negative, but is {arguments.forced}")
    check_options(arguments)
    if arguments.video:
        card = evaluate_clips(arguments, _bar)
    else:
        card = _folders(arguments) if arguments.folders else _sweep(arguments)
    if arguments.json:
        print(json.dumps(card, ensure_ascii=False))
    return 0


def _protocol(arguments: argparse.Namespace) -> Any:
    from arsd.metrics.protocols import Protocol

    if arguments.protocol is not None:
        return Protocol.load(arguments.protocol)
    return Protocol.load("emoji-128") if not arguments.folders else None


def _judge(arguments: argparse.Namespace, protocol: Any) -> Any:
    """Networks and reference: what was asked for, else the protocol's, else the shipped ones."""
    from arsd.devices import resolve_device
    from arsd.metrics.extractors import find_extractor, find_scorer
    from arsd.metrics.images import Resizer
    from arsd.metrics.judge import Judge

    device = resolve_device(arguments.device)
    features = arguments.features or (protocol.features if protocol else "emoji-clip")
    scorer = arguments.scorer or ((protocol.scorer or "none") if protocol else "emoji-clip")
    prefix = arguments.prefix if arguments.prefix is not None else (protocol.prefix if protocol else "")
    resizer = Resizer.parse(arguments.resizer or (protocol.resizer if protocol else "none"))
    with quiet():
        extractor = find_extractor(features, device)
        judge = Judge(extractor, None if scorer == "none" else find_scorer(scorer, device), resizer, prefix=prefix)
    source = arguments.stats or arguments.reference
    if arguments.stats is not None and arguments.reference is not None:
        raise InputError("give --reference or --stats, not both")
    real = Resizer.parse(protocol.reference_resizer) if protocol else resizer
    if source is None and protocol is not None and protocol.reference:
        source = protocol.reference_path(arguments.data, arguments.model)
    if source is not None:
        with _bar("reference", None, "pictures", arguments.json) as bar:
            judge.set_reference(source, real, bar.update)
    return judge


def _bar(name: str, total: int | None, unit: str, hidden: bool = False) -> Any:
    """A progress bar on stderr that says how long it will take; on a pipe it speaks twice a minute."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=name, unit=f" {unit}", disable=hidden, mininterval=0.5 if sys.stderr.isatty() else 30, leave=False
    )


def _folders(arguments: argparse.Namespace) -> dict[str, Any]:
    from arsd.metrics.card import make_card, write_card
    from arsd.metrics.folders import judge_folders

    protocol = _protocol(arguments)
    prompts = None if arguments.prompts is None else read_prompts([], arguments.prompts)
    judge = _judge(arguments, protocol)
    rows = judge_folders(arguments.folders, judge, prompts, arguments.pictures)
    card = make_card(judge, rows, protocol=None if protocol is None else vars(protocol))
    if arguments.out is not None:
        _write(arguments.out, card)
        write_card(arguments.out / "card.json", card)
    _show(arguments, card)
    return card


def _sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    from arsd.metrics.card import drawing_card, make_card, write_card
    from arsd.metrics.drawing import DrawPlan
    from arsd.metrics.frontier import measure, rows_of
    from arsd.metrics.sweep import entries, sweep

    refuse_clips(arguments.model, "this evaluation")
    protocol = _protocol(arguments)
    decoders = arguments.decoders or list(protocol.decoders)
    if not decoders:
        raise InputError(f"protocol {protocol.name} names no strategies: give --decoders ar sjd ...")
    out = arguments.out or Path("runs") / Path(protocol.name).stem
    chosen = entries(decoders, controls=arguments.frontier)
    if arguments.prompts is not None:
        inputs: list[Any] = list(read_prompts([], arguments.prompts))[: arguments.pictures]
    else:
        inputs = protocol.inputs(arguments.data, arguments.model, arguments.pictures)
    given = {name: value for name, value in sampling(arguments).items() if value is not None}
    plan = DrawPlan(
        tuple(one for one in inputs for _ in range(arguments.n)),
        arguments.seed,
        arguments.batch,
        {**protocol.sampling, **given},
    )
    judge = _judge(arguments, protocol)
    pipe, _ = load_pipeline(arguments)
    with _bar("drawing", len(chosen) * len(plan.inputs), "pictures", arguments.json) as bar:

        def drawn(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(1)

        sets = sweep(pipe, chosen, plan, out, arguments.chunk, drawn)
    with _bar("judging", sum(entry.role != "identity" for entry in chosen), "sets", arguments.json) as bar:
        found = measure(pipe, chosen, sets, judge, plan.sampling, arguments.forced, lambda name: bar.update(1))
    rows = rows_of(found, sets, judge)
    about = {name: value for name, value in vars(protocol).items() if name != "decoders"}
    card = make_card(judge, rows, protocol=about, drawing=drawing_card(pipe, plan), memory=_copies(found, arguments, judge))
    _write(out, card)
    write_card(out / "card.json", card)
    if arguments.frontier:
        _plot(out, card, judge)
    _show(arguments, card)
    if not arguments.json:
        print(f"\ncard.json, table.csv, table.md{', frontier.png' if arguments.frontier else ''} and pictures in {out}/")
    return card


def _copies(found: dict[str, Any], arguments: argparse.Namespace, judge: Any) -> dict[str, Any] | None:
    """Whether plain AR's pictures are copies of training pictures, where the model ships both kinds of reference."""
    from arsd.errors import DataError
    from arsd.metrics.images import Pictures, Resizer
    from arsd.metrics.judge import features_of, neighbours
    from arsd.metrics.reference import find_reference

    try:
        training, unseen = (find_reference(arguments.model, held_out=held).path for held in (False, True))
    except DataError:
        return None
    near = [features_of(Pictures.open(path), judge.features, Resizer()) for path in (training, unseen)]
    return {"decoder": "ar", "features": judge.features.name, **neighbours(found["ar"].seen.features, near[0], near[1])}


def _write(out: Path, card: dict[str, Any]) -> None:
    from arsd.metrics.report import to_csv, to_markdown
    from arsd.run_folders import write_atomically

    write_atomically(out / "table.csv", to_csv(card["rows"]))
    write_atomically(out / "table.md", to_markdown(card["rows"]))


def _plot(out: Path, card: dict[str, Any], judge: Any) -> None:
    from arsd.metrics.plots import plot_frontier

    drawing = card["drawing"]
    title = f"{drawing['model']}, {drawing['pictures']} pictures, {drawing['device_kind']}, {drawing['dtype']}"
    try:
        quality = f"{judge.score_name} against AR"
        plot_frontier(card["rows"], out / "frontier.png", quality, f"{title}, batch {drawing['batch']}")
    except InputError as error:  # the table is there all the same
        print(f"arsd: warning: {error}", file=sys.stderr)


def _show(arguments: argparse.Namespace, card: dict[str, Any]) -> None:
    from arsd.metrics.report import cells, columns

    if arguments.json:
        return
    names = columns(card["rows"], brief=True)
    print(table(names, cells(card["rows"], names, intervals=False)))
    for flag in card["flags"]:
        print(f"* {flag}")
    if card.get("memory"):
        print("; ".join(f"{k}: {v:.3f}" if isinstance(v, float) else str(v) for k, v in card["memory"].items()))
