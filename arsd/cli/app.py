"""``arsd app``: the demo in a browser, on this machine only unless told otherwise."""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

from arsd.cli.common import (
    DEFAULT_MODEL,
    add_component_options,
    add_import_option,
    components,
    load_pipeline,
    quiet,
    refuse_clips,
)
from arsd.cli.describe import DEFAULT_VIDEO_LLM
from arsd.errors import InputError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("app", help="the demo in a browser", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, help="default: 7860, or the next free one")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="image model: shipped name, folder, file, hub id, or none")
    parser.add_argument("--video-model", default=DEFAULT_VIDEO_LLM, help="Video-LLM, or none (default: %(default)s)")
    parser.add_argument("--card", metavar="FILE", help="evaluation card of arsd evaluate --frontier, for the tab Frontier")
    parser.add_argument("--mcp", action="store_true", help="also be an MCP server")
    parser.add_argument("--queue", type=int, default=16, help="runs that may wait (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=120, help="seconds of one run (default: %(default)s)")
    parser.add_argument("--upload-limit", type=float, default=64, help="MiB of an uploaded file (default: %(default)s)")
    add_component_options(parser)
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float64")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="CPU threads")
    add_import_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load, serve, wait."""
    try:
        from arsd.app.server import serve
    except ImportError as error:
        if "gradio" not in str(error):
            raise
        raise InputError("the app needs gradio: pip install 'arsd[app]'") from None
    from arsd.app.frontier import find_card

    service = load_service(arguments)
    card = find_card(arguments.model, arguments.card)
    # ended by whom it may, it leaves no file of a user behind
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serve(service, card, arguments.host, arguments.port, arguments.mcp) as served:
            print(f"arsd app: {served.url} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(3600)
    finally:
        signal.signal(signal.SIGTERM, before)


def load_service(arguments: argparse.Namespace) -> Any:
    """The models of a command line, and the limits of users.

    Raises:
        InputError: for a limit out of range.
    """
    import torch

    from arsd.app.service import Limits, Service
    from arsd.cli import describe
    from arsd.pipelines.auto import AutoARPipeline, find_model

    for name, least in (("queue", 1), ("time_limit", 1), ("upload_limit", 0.1)):
        if not getattr(arguments, name) >= least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(arguments, name)}")
    limits = Limits(seconds=arguments.time_limit, waiting=arguments.queue, upload=int(arguments.upload_limit * 2**20))
    if arguments.model == arguments.video_model == "none":
        raise InputError("there is nothing to show without a model: give --model or --video-model")
    pipe = video_llm = None
    if arguments.model != "none":
        refuse_clips(arguments.model, "the app")
        pipe, _ = load_pipeline(arguments)
        pipe.set_progress_bar_config(disable=True)
    if arguments.video_model != "none":
        named = argparse.Namespace(**{**vars(arguments), "model": arguments.video_model})
        video_llm = describe.load(named)

    def reload(dtype: torch.dtype) -> Any:
        with quiet():
            again = AutoARPipeline.from_pretrained(find_model(arguments.model), dtype=dtype, **components(arguments))
        return again if pipe is None else again.to(pipe.device)

    models = arguments.model, arguments.video_model
    return Service(pipe, video_llm, *models, limits, reload, components(arguments), arguments.plugins)
