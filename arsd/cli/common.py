"""Options and output that several commands share."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arsd.errors import InputError

if TYPE_CHECKING:
    from arsd.pipelines.core import ARPipeline

DEFAULT_MODEL = "emoji-128"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device, --threads, --import."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="shipped name, folder, weight file or hub id (default: %(default)s)"
    )
    add_component_options(parser)
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float64")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="CPU threads")
    add_import_option(parser)


def add_component_options(parser: argparse.ArgumentParser) -> None:
    """--vq, --tokenizer, --text-encoder, --image-size: what published files leave out."""
    parser.add_argument("--vq", metavar="PATH", help="image tokenizer, where it is not beside a published model")
    parser.add_argument("--tokenizer", metavar="DIR", help="text tokenizer, likewise (Emu3.5)")
    parser.add_argument("--text-encoder", metavar="DIR", help="text encoder of a published LlamaGen text model")
    parser.add_argument("--image-size", type=int, help="pixels of a square picture, where a published folder does not tell")


def components(arguments: argparse.Namespace) -> dict[str, Any]:
    """The components that were given, as arguments of ``AutoARPipeline.from_pretrained``."""
    names = ("vq", "tokenizer", "text_encoder", "image_size")
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """--import, which :func:`arsd.cli.main` obeys before the command runs."""
    parser.add_argument(
        "--import",
        dest="plugins",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module or FILE.py that registers drafters or rules (repeatable)",
    )


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """--prompts, --class-label, --height, --width."""
    parser.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line")
    parser.add_argument("--class-label", type=int, action="append", default=[], help="for class models, instead of prompts")
    parser.add_argument("--height", type=int, help="pixels, for models of several sizes")
    parser.add_argument("--width", type=int, help="likewise")


def size(arguments: argparse.Namespace) -> dict[str, int]:
    """The size that was given, as pipeline arguments."""
    return {name: value for name in ("height", "width") if (value := getattr(arguments, name)) is not None}


def inputs_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is painted: ``{"prompt": text}`` or ``{"class_labels": number}`` each.

    Raises:
        InputError: when there is nothing, or both.
    """
    if not arguments.class_label:
        return [{"prompt": text} for text in read_prompts(arguments.prompt, arguments.prompts)]
    if arguments.prompt or arguments.prompts:
        raise InputError("give prompts or --class-label, not both")
    return [{"class_labels": label} for label in arguments.class_label]


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--seed, --guidance-scale, --temperature, --top-k, --top-p."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--guidance-interval", type=int, help="guide the first tokens only (LlamaGen's cfg_interval)")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int, help="0 keeps every token")
    parser.add_argument("--top-p", type=float)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, as pipeline arguments."""
    names = ("guidance_scale", "guidance_interval", "temperature", "top_k", "top_p")
    return {name: getattr(arguments, name) for name in names}


def load_pipeline(arguments: argparse.Namespace) -> tuple[ARPipeline, str | None]:
    """The pipeline on its device and the hash of its weights."""
    import torch

    from arsd.devices import resolve_device, resolve_dtype
    from arsd.pipelines.auto import AutoARPipeline, find_model

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"--threads must be at least 1, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    folder = find_model(arguments.model)
    with quiet():
        pipe = AutoARPipeline.from_pretrained(folder, dtype=dtype, **components(arguments))
    return pipe.to(device), pipe.model_hash


def makes_clips(model: str) -> bool:
    """Whether a model (shipped name, path or hub id) makes clips.

    Raises:
        CheckpointError: when there is no such model.
    """
    from arsd.pipelines.auto import find_model
    from arsd.pipelines.families import pipeline_for, recognise
    from arsd.pipelines.video import ARVideoPipeline

    return issubclass(pipeline_for(recognise(find_model(model))), ARVideoPipeline)


def refuse_clips(model: str, what: str) -> None:
    """Raise InputError for a model that makes clips, where a command shows or judges pictures."""
    if makes_clips(model):
        raise InputError(f"{model} makes clips, and {what} takes models of pictures: see arsd generate, arsd bench")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars of the libraries below; restored afterwards."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger("diffusers").setLevel(level)
        diffusers_logging.enable_progress_bar()
        if bars:
            transformers_logging.enable_progress_bar()


def show_warnings_in_one_line() -> None:
    """Warnings as ``arsd: warning: text``, without file and source line; each text once."""
    import sys

    shown: set[str] = set()

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            print(f"arsd: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def read_prompts(words: Sequence[str], file: str | None) -> list[str]:
    """Prompts of the command line and of a file (one per line; blank lines and lines that start with # are left out).

    Raises:
        InputError: when there is none, or the file cannot be read.
    """
    prompts = [word for word in words]
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read prompts from {file}: {error}") from None
        prompts += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError('the prompt is empty: give one, e.g. arsd generate "red apple"')
    return prompts


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
