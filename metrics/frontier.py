"""The speed-quality frontier: a table of every set of a sweep, with tests of what the lossless strategies promise.

Two kinds of promise are tested in two ways.

- *Plain AR's own tokens*: the hash of every picture's tokens is compared with plain AR's in the same pass shape.
- *Plain AR's law*: a set with seeds of its own is compared with plain AR by two statistics of each prompt, the difference of
  CLIP scores and the excess surprise (:mod:`arsd.metrics.divergence`), whose mean is zero under that law. Both intervals
  must hold zero; they are corrected for the number of sets and statistics that are looked at.

Two controls show what the test can do: plain AR with other seeds must pass it, plain AR at temperature 1.15 must not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from arsd.decoding import DecodingStrategy
from arsd.metrics.divergence import forced_divergence, teacher_force
from arsd.metrics.drawing import DrawnSet
from arsd.metrics.images import Pictures
from arsd.metrics.judge import Judge, Seen
from arsd.metrics.resampling import FEWEST, Interval, bootstrap_mean, corrected
from arsd.metrics.sweep import Entry

SURPRISE = "excess surprise, nats per token"
HOLDS, REJECTED = "holds", "REJECTED"
STATISTICS = 2  # of each set, in a test of its law


def promise_of(strategy: DecodingStrategy) -> str:
    """What a strategy says of its output."""
    if strategy.seed_exact:
        return "AR's own tokens"
    return "AR's law" if strategy.lossless else "relaxed"


def family_of(strategy: DecodingStrategy) -> str:
    """The line of a plot that a strategy belongs to."""
    name, config = strategy.name, strategy.config
    if name == "cool-sd":
        return "uniform" if config["nu"] == 0 else "COOL-SD, budget" if config["budget"] is not None else "COOL-SD, clamped"
    lossy = {"cool-sd-published": "COOL-SD, published", "lantern": "LANTERN", "lantern-plus-plus": "LANTERN++"}
    known = {**lossy, "grouped": "GSD", "ar": "AR", "sjd": "SJD", "eagle": "EAGLE", "hybrid": "hybrid"}
    return known.get(name, name)


@dataclass
class Measured:
    """All that is known of one set, picture by picture.

    Args:
        entry: what it is.
        drawn: its pictures' tokens and passes.
        seen: what the networks made of them.
        surprise: [N] excess surprise.
        forced: [M] total variation on plain AR's prefixes, of a relaxed chain.
    """

    entry: Entry
    drawn: DrawnSet
    seen: Seen
    surprise: np.ndarray
    forced: np.ndarray | None = None


def measure(
    pipe: Any,
    chosen: Sequence[Entry],
    sets: dict[str, DrawnSet],
    judge: Judge,
    sampling: dict[str, Any],
    forced: int = 24,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Measured]:
    """Look at every set; what is found is kept beside the pictures, so that it is found once.

    Args:
        pipe: the pipeline that drew them.
        chosen: the sets.
        sets: their pictures.
        judge: networks and reference.
        sampling: plain AR's options in this run (guidance_scale, ...), whose law all sets are held against.
        forced: pictures of plain AR on whose prefixes relaxed strategies are measured; 0 leaves that out.
        progress: called before each set.
    """
    found: dict[str, Measured] = {}
    for entry in chosen:
        if entry.role == "identity":  # only its tokens are wanted
            continue
        progress(entry.name)
        drawn, steered = sets[entry.name], None
        seen = _kept(drawn.folder / f"seen-{judge.key}.npz", Seen.load, partial(_look, judge, drawn), Seen.save)
        surprise = _array(drawn.folder / "surprise.npy", partial(_surprise, pipe, drawn, sampling))
        if forced and not entry.strategy.lossless and entry.strategy.config.get("tree") is None:
            make = partial(_forced, pipe, entry.strategy, sets["ar"], forced)
            steered = _array(drawn.folder / f"forced-{forced}.npy", make)
        found[entry.name] = Measured(entry, drawn, seen, surprise, steered)
    return found


def _look(judge: Judge, drawn: DrawnSet) -> Seen:
    prompts = [text for text in drawn.inputs if isinstance(text, str)]
    return judge.look(Pictures.open(drawn.folder), prompts if prompts else None)


def _surprise(pipe: Any, drawn: DrawnSet, sampling: dict[str, Any]) -> np.ndarray:
    return teacher_force(pipe, drawn.inputs, drawn.tokens, **sampling).excess_surprise.numpy()


def _forced(pipe: Any, strategy: DecodingStrategy, plain: DrawnSet, count: int) -> np.ndarray:
    sampling = plain.settings["sampling"]
    return forced_divergence(pipe, strategy, plain.inputs[:count], plain.tokens[:count], **sampling).numpy()


def _kept(path: Path, load: Callable[[Path], Any], make: Callable[[], Any], save: Callable[[Any, Path], None]) -> Any:
    """What is in ``path``, or made and saved there."""
    if path.is_file():
        return load(path)
    made = make()
    save(made, path)
    return made


def _array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    def save(values: np.ndarray, path: Path) -> None:
        scratch = path.with_name(f".{path.stem}.part.npy")
        np.save(scratch, values)
        scratch.replace(path)

    found: np.ndarray = _kept(path, np.load, make, save)
    return found


def rows_of(
    found: dict[str, Measured], sets: dict[str, DrawnSet], judge: Judge, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """The table: one row per set, plain AR first.

    Args:
        found: every set that is judged.
        sets: these and the ones that only lend their tokens.
        judge: for the figures.
        confidence: with which all tests of lossless sets hold together.
    """
    tested = [m for m in found.values() if m.entry.role == "strategy" and promise_of(m.entry.strategy) == "AR's law"]
    each = corrected(confidence, STATISTICS * max(1, len(tested)))
    plain = found["ar"]
    return [_row(measured, plain, sets, judge, each) for measured in found.values()]


@dataclass(frozen=True)
class SameLaw:
    """A test of whether pictures have plain AR's law; see the module.

    Args:
        surprise: interval of the mean excess surprise.
        score: interval of the mean difference of CLIP scores.
    """

    surprise: Interval | None = None
    score: Interval | None = None

    @property
    def holds(self) -> bool:
        """Whether both intervals hold zero."""
        return all(interval is None or interval.has_zero for interval in (self.surprise, self.score))


def same_law(surprise: np.ndarray, apart: np.ndarray | None, confidence: float) -> SameLaw:
    """Test a set of pictures.

    Args:
        surprise: [N] excess surprise of each picture.
        apart: [N] its CLIP score less that of an independent picture of plain AR for the same prompt.
        confidence: of each interval.
    """
    return SameLaw(bootstrap_mean(surprise, confidence), None if apart is None else bootstrap_mean(apart, confidence))


def _row(measured: Measured, plain: Measured, sets: dict[str, DrawnSet], judge: Judge, confidence: float) -> dict[str, Any]:
    entry, drawn, strategy = measured.entry, measured.drawn, measured.entry.strategy
    controlled = entry.role in ("same-law", "hotter")
    row: dict[str, Any] = {
        "decoder": entry.name,
        "role": entry.role,
        "family": family_of(strategy),
        "promise": "control" if controlled else promise_of(strategy),
        "lossless": strategy.lossless,
        "pictures": len(drawn.inputs),
        "tokens per pass": drawn.tokens_per_pass,
        "tokens per pass interval": _passes_interval(drawn),
        "seconds per picture": drawn.seconds,
        "speedup": plain.drawn.seconds / drawn.seconds,
        "expected changed tokens": float(drawn.changed.mean()),
        "TV per token": float(drawn.changed.sum() / drawn.tokens.numel()),
    }
    if measured.forced is not None:
        row["TV per token on AR's prefixes"] = float(measured.forced.mean() / drawn.tokens.shape[1])
    row |= judge.figures(measured.seen)
    return row | _tests(measured, plain, sets, judge, confidence)


def _tests(
    measured: Measured, plain: Measured, sets: dict[str, DrawnSet], judge: Judge, confidence: float
) -> dict[str, Any]:
    """The two intervals of a set against plain AR, and whether it does what it promises."""
    tests: dict[str, Any] = {SURPRISE: float(measured.surprise.mean())}
    enough, apart, name = len(measured.surprise) >= FEWEST, None, f"{judge.score_name} against AR"
    if measured.seen.scores is not None and plain.seen.scores is not None:
        apart = (measured.seen.scores - plain.seen.scores).double().numpy()
        tests[name] = float(apart.mean())
    found = same_law(measured.surprise, apart, confidence) if enough else SameLaw()
    for statistic, interval in ((SURPRISE, found.surprise), (name, found.score)):
        if interval is not None:
            tests[f"{statistic} interval"] = [interval.low, interval.high]
    strategy, role = measured.entry.strategy, measured.entry.role
    if strategy.seed_exact and role == "strategy":
        tests["verdict"] = _identity(measured, sets)
    elif role in ("same-law", "hotter") or strategy.lossless:
        tests["verdict"] = (HOLDS if found.holds else REJECTED) if enough else f"fewer than {FEWEST} pictures"
    else:
        tests["verdict"] = "" if found.holds else "moved"
    return tests


def _identity(measured: Measured, sets: dict[str, DrawnSet]) -> str:
    """How many pictures have the tokens of plain AR in the same pass shape."""
    shape = measured.drawn.pass_tokens
    twin = sets.get("ar" if shape == 1 else f"ar:pass_tokens={shape}")
    if twin is None:
        return "not compared"
    same = sum(a == b for a, b in zip(measured.drawn.hashes, twin.hashes, strict=True))
    return f"{same} of {len(twin.hashes)} equal"


def _passes_interval(drawn: DrawnSet, draws: int = 2000) -> list[float]:
    """95 % of tokens per pass by a bootstrap over pictures."""
    pick = np.random.default_rng(0).integers(len(drawn.passes), size=(draws, len(drawn.passes)))
    low, high = np.quantile(drawn.tokens.shape[1] * len(drawn.passes) / drawn.passes[pick].sum(1), [0.025, 0.975])
    return [float(low), float(high)]


def order_of_relaxed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Relaxed sets from the least to the most moved law (total variation per token)."""
    relaxed = [row for row in rows if row["promise"] == "relaxed"]
    return [row["decoder"] for row in sorted(relaxed, key=lambda row: row["TV per token"])]
