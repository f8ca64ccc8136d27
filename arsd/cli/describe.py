"""``arsd describe``: what happens in a clip, in words, as they are decoded."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from arsd.cli.common import add_import_option, quiet
from arsd.errors import InputError

DEFAULT_VIDEO_LLM = "emoji-video-chat"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("describe", help="say what happens in a clip", description=__doc__)
    parser.add_argument(
        "clip", nargs="+", help="videos, animated pictures or folders of pictures; the last word may be a question"
    )
    parser.add_argument("--question", help="what is asked about every clip (default: Describe the clip.)")
    parser.add_argument("--system", help="a system message before the question")
    parser.add_argument("--decoder", help="ar, sjd:window=8, ... (default: the model's own)")
    parser.add_argument("--compare", action="store_true", help="also decode without guesses (ar), and compare")
    parser.add_argument("--num-frames", type=int, help="frames that are shown at most (default: as the model is used to)")
    parser.add_argument("--fps", type=float, help="frames that are shown of each second")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--sample", action="store_true", help="draw tokens; implied by the next three")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int, help="0 keeps every token")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=DEFAULT_VIDEO_LLM, help="shipped name, folder or hub id (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float64")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="CPU threads")
    add_import_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=run)


def clips_and_question(words: list[str], question: str | None) -> tuple[list[str], str]:
    """The clips among ``words``, and what is asked: the last word, where it is no file and does not look like one.

    Raises:
        InputError: for clips that are not there, or two questions.
    """
    clips, last = list(words), words[-1]
    if len(words) > 1 and not _is_there(last) and (re.search(r"\s", last) or not re.search(r"\.\w{2,5}$", last)):
        if question is not None:
            raise InputError(f"there is no file {last!r}, and --question is given, too: give one of them")
        question = clips.pop()
    missing = [clip for clip in clips if not _is_there(clip)]
    if missing:
        raise InputError(f"there is no file {missing[0]!r}: give a video, an animated picture or a folder of pictures")
    return clips, "Describe the clip." if question is None else question


def _is_there(word: str) -> bool:
    return bool(word.strip()) and Path(word).exists()


def run(arguments: argparse.Namespace) -> int:
    """Describe every clip, then the figures of each."""
    import transformers.utils.logging as transformers_logging

    from arsd.decoding import parse_strategy
    from arsd.video import check_sampling

    clips, question = clips_and_question(arguments.clip, arguments.question)
    check_sampling(arguments.num_frames, arguments.fps)
    decoder = None if arguments.decoder is None else parse_strategy(arguments.decoder)
    drawn = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    options = {"num_frames": arguments.num_frames, "fps": arguments.fps, "max_new_tokens": arguments.max_new_tokens, **drawn}
    options |= {"system": arguments.system, "seed": arguments.seed}
    options["do_sample"] = arguments.sample or any(value is not None for value in drawn.values())
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # options of the model's own generation config that greedy decoding leaves
    try:
        pipe = load(arguments)
        entries = []
        for clip in clips:
            if len(clips) > 1 and not arguments.json:
                print(f"{clip}:")
            entries.append(describe(pipe, clip, question, decoder or pipe.decoder, options, arguments))
    finally:
        transformers_logging.set_verbosity(before)
    if arguments.json:
        chosen = decoder or pipe.decoder
        report = {"model": arguments.model, "decoder": str(chosen), "lossless": chosen.lossless, "question": question}
        print(json.dumps({**report, "seed": arguments.seed, "clips": entries}, ensure_ascii=False))
    return 0


def load(arguments: argparse.Namespace) -> Any:
    """The pipeline on its device."""
    import torch

    from arsd.devices import resolve_device, resolve_dtype
    from arsd.pipelines.video_llm import VideoLLMPipeline

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"--threads must be at least 1, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    with quiet():
        pipe = VideoLLMPipeline.from_pretrained(arguments.model, dtype=resolve_dtype(arguments.dtype, device))
    return pipe.to(device)


def describe(
    pipe: Any, clip: str, question: str, decoder: Any, options: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One clip: its text as it comes and a line of figures on the terminal, and the entry of the report."""
    shown = not arguments.json
    if arguments.compare:  # what a first call prepares is no part of the seconds
        for one in (decoder, "ar"):
            pipe(clip, question, decoder=one, **{**options, "max_new_tokens": 2})
    out = pipe(clip, question, decoder=decoder, stream=_print if shown else None, **options)
    entry = {"path": clip, "text": out.text, **figures(out)}
    entry |= {"num_frames": out.num_frames, "num_visual_tokens": out.num_visual_tokens}
    if shown:
        print(f"\n\n{_line(str(decoder), entry)}, {out.num_frames} frames, {out.num_visual_tokens} visual tokens")
    if arguments.compare:
        plain = pipe(clip, question, decoder="ar", **options)
        same = bool(plain.text == out.text)
        entry["ar"] = {**figures(plain), "same_text": same}
        if shown:
            times = plain.stats.total_seconds / max(out.stats.total_seconds, 1e-9)
            print(f"{_line('ar', entry['ar'])}: {'the same text' if same else 'another text'}, {times:.2f}x")
    return entry


def figures(out: Any) -> dict[str, Any]:
    """Those of one answer; the seconds are those of decoding, the reading of the prompt included."""
    stats = out.stats
    names = {"tokens": stats.tokens[0], "forward_passes": stats.forward_passes, "tokens_per_pass": stats.tokens_per_pass}
    return {**names, "seconds": stats.total_seconds, "seconds_prefill": stats.seconds["prefill"]}


def _line(decoder: str, entry: dict[str, Any]) -> str:
    counts = f"{entry['tokens']} tokens in {entry['forward_passes']} passes ({entry['tokens_per_pass']:.2f} tokens/pass)"
    return f"{decoder}: {counts}, {entry['seconds']:.2f} s (prompt {entry['seconds_prefill']:.2f} s)"


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
