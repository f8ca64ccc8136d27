"""An app with tiny models, whose passes can be slowed down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from drafting import drafting
from tiny_pipeline import class_pipeline, hushed, saved, text_pipeline
from video_llms import tiny

import arsd
from arsd.app.service import Limits, Service

PROMPT = "red apple"
LIMITS = Limits(seconds=20, waiting=3, upload=200_000, pictures=6, new_tokens=64, frames=8)


class Pause:
    """Seconds that every pass of a pipeline takes longer."""

    def __init__(self, pipe: Any) -> None:
        self.seconds, plain = 0.0, pipe.run_decoder

        def run(*args: Any, on_round: Any = None, **options: Any) -> Any:
            def paused(round: Any) -> Any:
                time.sleep(self.seconds)
                return on_round(round) if on_round is not None else None

            return plain(*args, on_round=paused, **options)

        pipe.run_decoder = run


def model_folder(folder: Path, classes: bool = False) -> Path:
    """A model on disk: without a folder it has no hash, and nothing to verify against."""
    return saved(class_pipeline() if classes else text_pipeline(), folder)


def made_service(folder: Path, drafter: bool = False, video: bool = False, limits: Limits | None = None) -> Service:
    """The app's models."""

    def load(dtype: Any = None) -> Any:
        return hushed(arsd.AutoARPipeline.from_pretrained(folder, dtype=dtype))

    pipe = drafting(load()) if drafter else load()
    chat = arsd.VideoLLMPipeline(*tiny("llava-onevision")) if video else None
    return Service(pipe, chat, str(folder), "tiny-chat", limits or Limits(), reload=load)


@contextmanager
def running_app(folder: Path) -> Iterator[SimpleNamespace]:
    """A running app, its models, and the pause that every pass takes."""
    from arsd.app.frontier import find_card
    from arsd.app.server import serve

    service = made_service(model_folder(folder), drafter=True, video=True, limits=LIMITS)
    pause = Pause(service.pipe)
    with serve(service, find_card("emoji-128"), mcp=True) as served:
        yield SimpleNamespace(service=service, pause=pause, url=served.url, page=served.page)
