"""Drawing pictures where somebody watches: the pipeline's call, and what can be seen of it a few times a second."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from arsd.app.knobs import Asked
from arsd.app.markup import Canvas
from arsd.app.painting import cells, data_uri, how_grid, pass_grid, picture
from arsd.app.progress import Pace, Progress
from arsd.app.service import STOPPED, Run, Service
from arsd.decoding import DecodingStrategy
from arsd.decoding.types import Round
from arsd.models.raster import Raster
from arsd.pipelines.outputs import ARPipelineOutput
from arsd.provenance import png_bytes

WARM_UP = 2  # passes before a race: what a first call prepares is no part of the seconds


@dataclass(frozen=True)
class Drawn:
    """What can be seen of a call at one moment.

    Args:
        decoder: the strategy.
        canvases: one for each picture.
        committed: of each picture, the tokens of each of its passes.
        counts: of each picture, how many tokens came about in each way.
        forward_passes: of the call so far.
        tokens_per_pass: per picture.
        done: tokens decided, of ``total``.
        total: tokens of all pictures.
        seconds: of decoding; drawing and showing are not in it.
        output: what the pipeline returned, once it has.
        stopped: why it ended early, or ``""``.
        pngs: the finished pictures as files with their records.
        notes: what the pipeline warned of, such as words that the model does not know.
    """

    decoder: DecodingStrategy
    canvases: list[Canvas]
    committed: list[list[int]]
    counts: list[dict[str, int]]
    forward_passes: int
    tokens_per_pass: float
    done: int
    total: int
    seconds: float
    output: ARPipelineOutput | None = field(default=None, repr=False)
    stopped: str = ""
    pngs: list[bytes] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all pictures are whole."""
        return self.output is not None and not self.stopped


class Drawer:
    """Draws what was asked for, in the model's thread.

    Args:
        service: whose model draws.
        run: says when to stop.
        asked: what to draw.
        pictures: how many, of the seeds ``asked.seed``, ``asked.seed + 1``, ...
        live: show pixels, while tokens come in and at the end; without it only figures can be watched.
    """

    def __init__(self, service: Service, run: Run, asked: Asked, pictures: int = 1, live: bool = True) -> None:
        self.pipe, self.model = service.pipe, service.model
        self.run, self.asked, self.pictures, self.live = run, asked, pictures, live
        self.raster: Raster = service.pipe.make_raster()

    def warm_up(self) -> None:
        """The same call for a few passes."""
        passes = itertools.count(1)
        self._call(lambda round: next(passes) >= WARM_UP or self.run.over())

    def __call__(self, hear: Callable[[Drawn], None]) -> Drawn:
        """Draw; ``hear`` is told how far it is a few times a second, and at the end."""
        progress, pace = Progress(self.pictures, self.raster.num_tokens), Pace()

        def on_round(round: Round) -> bool:
            progress.hear(round)
            seconds = progress.seconds
            progress.aside += pace(lambda: hear(self._seen(progress, seconds)))
            return self.run.over()

        output, notes = self._call(on_round)
        seen = self._seen(progress, output.stats.total_seconds, output)
        if seen.finished:
            pngs = [png_of(self.pipe, self.model, self.asked.seed, output, i) for i in range(self.pictures)]
            seen = replace(seen, pngs=pngs)
        seen = replace(seen, notes=notes)
        hear(seen)
        return seen

    def _call(self, on_round: Callable[[Round], bool]) -> tuple[ARPipelineOutput, list[str]]:
        """What the pipeline returns, and what it warns of."""
        seeds = range(self.asked.seed, self.asked.seed + self.pictures)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            output = self.pipe(
                **self.asked.inputs,
                **self.asked.sampling,
                decoder=self.asked.decoder,
                num_images_per_prompt=self.pictures,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                on_round=on_round,
                progress=False,
            )
        return output, list(dict.fromkeys(str(one.message) for one in heard if one.category is UserWarning))

    def _seen(self, progress: Progress, seconds: float, output: ARPipelineOutput | None = None) -> Drawn:
        whole = output is not None and progress.done == progress.total
        return Drawn(
            self.asked.decoder,
            [self._canvas(progress, i, output if whole else None) if self.live else Canvas() for i in range(self.pictures)],
            [list(lengths) for lengths in progress.committed],
            [progress.counts(i) for i in range(self.pictures)],
            progress.forward_passes,
            progress.tokens_per_pass,
            progress.done,
            progress.total,
            seconds,
            output,
            "" if output is None or whole else (self.run.reason or STOPPED),
        )

    def _canvas(self, progress: Progress, index: int, output: ARPipelineOutput | None) -> Canvas:
        raster, outcomes, passes = self.raster, progress.outcomes[index], progress.passes[index]
        frame = output.images[index] if output else picture(self.pipe, raster, progress.tokens[index], outcomes)
        grids = how_grid(raster, outcomes), pass_grid(raster, outcomes, passes)
        kinds, when = (cells(raster, values).flatten().tolist() for values in (outcomes, passes))
        how, when_grid = (data_uri(grid, "PNG") for grid in grids)
        told = ((), ()) if output is None else (kinds, when)  # the pointer waits for whole pictures
        return Canvas(data_uri(frame), how, when_grid, raster.columns, raster.rows, *told)


def png_of(pipe: Any, model: str, seed: int, output: ARPipelineOutput, index: int = 0) -> bytes:
    """A finished picture as the PNG file that ``arsd generate`` would have written, with its record."""
    record = {**pipe.record(output, index), "model": model, "seed": seed + index}
    return png_bytes(output.images[index], record)
