"""A sweep: pictures of many strategies on one list of prompts, drawn in turns, with the controls that tests are held to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arsd.decoding import Autoregressive, DecodingStrategy, parse_strategy
from arsd.errors import InputError
from arsd.metrics.drawing import DrawnSet, DrawPlan, draw, picture_path, stream_of
from arsd.provenance import read_record

HOTTER = 1.15  # temperature of the control that a test of the law must reject
CONTROL_STREAMS = (10**6 + 1, 10**6 + 2)


@dataclass(frozen=True)
class Entry:
    """One set of pictures.

    Args:
        strategy: how it is drawn.
        role: ``strategy``; ``identity`` (plain AR in the pass shape of a seed-exact strategy, whose tokens must be equal);
            ``same-law`` (plain AR's law with other seeds) and ``hotter`` (temperature 1.15): what a test must pass and fail.
        temperature: in the place of the plan's.
        stream: of seeds; ``None`` is the strategy's own.
    """

    strategy: DecodingStrategy
    role: str = "strategy"
    temperature: float | None = None
    stream: int | None = None

    @property
    def name(self) -> str:
        """What the tables call it."""
        extra = {"same-law": ", other seeds", "hotter": f", temperature {self.temperature}"}.get(self.role, "")
        return f"{self.strategy}{extra}"

    @property
    def folder(self) -> str:
        """Its folder below the run's."""
        return re.sub(r"[^\w.+=-]+", "_", self.name).strip("_")

    def plan(self, plan: DrawPlan) -> DrawPlan:
        """The plan with this entry's temperature."""
        if self.temperature is None:
            return plan
        return replace(plan, sampling={**plan.sampling, "temperature": self.temperature})


def entries(strategies: Sequence[DecodingStrategy | str], controls: bool = True) -> list[Entry]:
    """Plain AR first, then the strategies, then the controls.

    The controls are drawn with seed-exact SJD, whose pictures are plain AR's.

    Raises:
        InputError: when two strategies are the same.
    """
    chosen = [parse_strategy(s) if isinstance(s, str) else s for s in strategies]
    if not any(str(s) == "ar" for s in chosen):
        chosen.insert(0, Autoregressive())
    chosen.sort(key=lambda s: str(s) != "ar")
    names = [str(s) for s in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{', '.join(twice)} is named twice")
    found = [Entry(s) for s in chosen]
    if controls:
        fast = parse_strategy("sjd:window=16")
        found += [
            Entry(fast, "same-law", stream=CONTROL_STREAMS[0]),
            Entry(fast, "hotter", temperature=HOTTER, stream=CONTROL_STREAMS[1]),
        ]
    return found


@dataclass
class Progress:
    """Told of every picture: (pictures done, all pictures, name of the set)."""

    report: Callable[[int, int, str], None]
    total: int
    done: int = 0

    def __call__(self, name: str) -> None:
        """One picture more of the set ``name``."""
        self.done += 1
        self.report(self.done, self.total, name)


def sweep(
    pipe: Any,
    chosen: list[Entry],
    plan: DrawPlan,
    out: Path,
    chunk: int = 40,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, DrawnSet]:
    """Draw every entry's pictures, ``chunk`` of them at a time in turns, so that a drift of the machine hits all alike.

    What is there already is kept; run again, it goes on where it stopped.

    Args:
        pipe: the pipeline.
        chosen: what to draw; plain AR in the pass shapes of seed-exact strategies is added.
        plan: prompts, seeds, batch, sampling.
        out: a folder for each entry is made here.
        chunk: pictures of a turn.
        progress: called after each picture with (done, total, name).

    Returns:
        The sets by name.

    Raises:
        DataError: when a folder belongs to other settings, or cannot be written.
    """
    count = len(plan.inputs)
    missing = sum(not picture_path(out / e.folder, i).exists() for e in chosen for i in range(count))
    told = Progress(progress, missing)
    turns = [range(first, min(first + chunk, count)) for first in range(0, count, chunk)]
    for number, turn in enumerate(turns):
        first = number % len(chosen)
        for entry in chosen[first:] + chosen[:first]:
            _draw(pipe, entry, plan, out, turn, told)
    shapes = {_pass_tokens(out / e.folder) for e in chosen if e.role == "strategy" and e.strategy.seed_exact}
    known = {e.name for e in chosen}
    for shape in sorted(shapes - {1}):
        entry = Entry(Autoregressive(pass_tokens=shape), "identity")
        if entry.name not in known:
            told.total += sum(not picture_path(out / entry.folder, i).exists() for i in range(count))
            _draw(pipe, entry, plan, out, range(count), told)
            chosen.append(entry)
    return {entry.name: DrawnSet.read(out / entry.folder) for entry in chosen}


def _draw(pipe: Any, entry: Entry, plan: DrawPlan, out: Path, turn: range, told: Progress) -> None:
    stream = stream_of(entry.strategy) if entry.stream is None else entry.stream
    folder = out / entry.folder
    draw(pipe, entry.strategy, entry.plan(plan), folder, turn, lambda: told(entry.name), stream)


def _pass_tokens(folder: Path) -> int:
    return int(read_record(picture_path(folder, 0))[1]["pass_tokens"])
