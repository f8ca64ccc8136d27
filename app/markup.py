"""Pieces of the page as HTML and SVG; :func:`text` escapes what a user wrote."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arsd.app.progress import NAMES
from arsd.decoding import Outcome

CLASSES = {kind: f"arsd-o{int(kind)}" for kind in Outcome}
SHORT = {
    Outcome.ACCEPTED: "accepted guess",
    Outcome.RELAXED: "relaxed",
    Outcome.RESAMPLED: "resampled",
    Outcome.BONUS: "model's own",
    Outcome.FORCED: "forced",
}


def text(words: object) -> str:
    """Words for a page."""
    return html.escape(str(words))


@dataclass(frozen=True)
class Canvas:
    """A picture as the page shows it.

    Args:
        frame: data URI of what is decided, or ``""``.
        how: data URI of the grid of outcomes, or ``""``.
        passes: data URI of the grid of passes, or ``""``.
        columns: codes per row.
        rows: rows.
        kinds: outcome of every code in reading order, for the pointer.
        when: the pass of every code.
    """

    frame: str = ""
    how: str = ""
    passes: str = ""
    columns: int = 1
    rows: int = 1
    kinds: Sequence[int] = ()
    when: Sequence[int] = ()

    def html(self, alt: str) -> str:
        """The picture, two overlays of which the page shows none or one, and what the pointer says of a token."""
        layers = [f'<img class="arsd-frame" src="{self.frame}" alt="{text(alt)}">'] if self.frame else []
        for name, uri in (("arsd-how", self.how), ("arsd-when", self.passes)):
            layers += [f'<img class="arsd-grid {name}" src="{uri}" alt="">'] if uri else []
        told = ""
        if self.kinds:
            numbers = {"columns": self.columns, "kinds": list(self.kinds), "when": list(self.when)}
            told = f' data-tokens="{text(json.dumps(numbers, separators=(",", ":")))}"'
        shape = f"aspect-ratio:{self.columns}/{self.rows}"
        return f'<div class="arsd-canvas" style="{shape}"{told}>{"".join(layers)}<output class="arsd-tip"></output></div>'


def figure(canvas: Canvas, alt: str, caption: str, save: tuple[str, str] | None = None) -> str:
    """A picture with a caption (HTML) and a link to save it: (file name, data URI)."""
    link = ""
    if save is not None:
        name, uri = save
        link = f'<a class="arsd-save" download="{text(name)}" href="{uri}">Save PNG</a>'
    return f'<figure class="arsd-figure">{canvas.html(alt)}<figcaption>{caption}{link}</figcaption></figure>'


def pane(title: str, promise: str, body: str, numbers: Mapping[str, str], state: str = "") -> str:
    """One side of a race: a title, a picture, figures that count."""
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in numbers.items())
    head = f'<header><strong>{text(title)}</strong><span class="arsd-promise">{text(promise)}</span></header>'
    note = f'<p class="arsd-state" role="status">{text(state) or "&nbsp;"}</p>'
    return f'<section class="arsd-pane">{head}{body}<dl class="arsd-numbers">{cells}</dl>{note}</section>'


def gallery(figures: Sequence[str]) -> str:
    """Figures in a grid."""
    return f'<div class="arsd-gallery">{"".join(figures)}</div>'


def notice(words: str, kind: str = "") -> str:
    """A line that stands out: ``good``, ``bad`` or nothing."""
    return f'<p class="arsd-notice {kind}" role="status">{text(words) or "&nbsp;"}</p>'


def legend(kinds: Sequence[Outcome] = tuple(SHORT)) -> str:
    """What the colours of tokens mean."""
    items = (f'<li title="{text(NAMES[kind])}"><i class="{CLASSES[kind]}"></i>{text(SHORT[kind])}</li>' for kind in kinds)
    return f'<ul class="arsd-legend" aria-label="colours of tokens">{"".join(items)}</ul>'


def counts_line(counts: Mapping[str, int]) -> str:
    """How many tokens came about in each way, in words."""
    short = {NAMES[kind]: name for kind, name in SHORT.items()}
    return ", ".join(f"{n} {short[name]}" for name, n in counts.items())


WIDTH, HEIGHT = 640, 150
PLAIN = "Plain AR"  # a series of this name is grey


def lengths_plot(series: Mapping[str, Sequence[float]], passes: int = 0) -> str:
    """Tokens committed in each pass, one colour for each series; ``passes`` is the least that the axis shows."""
    across = max([passes, 16, *(len(values) for values in series.values())])
    up = max([4.0, *(max(values, default=0.0) for values in series.values())])
    step = WIDTH / across
    bars = []
    for name, values in series.items():
        lines = "".join(
            f"M{step * (i + 0.5):.1f} {HEIGHT}V{HEIGHT * (1 - value / up):.1f}" for i, value in enumerate(values) if value
        )
        stroke = max(1.0, min(14.0, step * 0.7))
        bars.append(f'<path class="{_colour(name)}" d="{lines or "M0 0"}" stroke-width="{stroke:.1f}"/>')
    rows = "".join(f'<line x1="0" x2="{WIDTH}" y1="{y}" y2="{y}" class="arsd-axis"/>' for y in (0, HEIGHT / 2, HEIGHT))
    names = "".join(f'<li><i class="{_colour(name)}"></i>{text(name)}</li>' for name in series)
    label = "; ".join(f"{name}: {len(values)} passes" for name, values in series.items()) or "no pass yet"
    svg = (
        f'<svg viewBox="0 -4 {WIDTH} {HEIGHT + 8}" preserveAspectRatio="none" role="img" aria-label="{text(label)}">'
        f"{rows}{''.join(bars)}</svg>"
    )
    head = f"<figcaption>tokens committed per pass<ul>{names}</ul></figcaption>"
    ends = f'<div class="arsd-ends"><span>pass 1</span><span>pass {across}</span></div>'
    return f'<figure class="arsd-plot">{head}<b class="arsd-top">{up:g}</b>{svg}{ends}</figure>'


def _colour(name: str) -> str:
    return "arsd-s0" if name == PLAIN else "arsd-s1"


@dataclass(frozen=True)
class Point:
    """A measured strategy in a plot: what it is called, where it lies, the interval of y, and whether it is relaxed."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    relaxed: bool
    note: str = ""


def scatter(points: Sequence[Point], x: str, y: str, band: tuple[float, float] | None = None, chosen: str = "") -> str:
    """Points that can be clicked (``data-decoder`` names them); ``band`` is the interval of plain AR with other seeds."""
    if not points:
        return notice("nothing was measured for these axes")
    width, height, left, foot = 640, 360, 64, 36
    lows = [p.y if p.low is None else p.low for p in points] + ([band[0]] if band else [])
    highs = [p.y if p.high is None else p.high for p in points] + ([band[1]] if band else [])
    xs, ys = _ticks(min(p.x for p in points), max(p.x for p in points)), _ticks(min(lows), max(highs))

    def across(value: float) -> float:
        return left + (value - xs[0]) / (xs[-1] - xs[0]) * (width - left - 16)

    def up(value: float) -> float:
        return (height - foot) - (value - ys[0]) / (ys[-1] - ys[0]) * (height - foot - 12)

    parts = []
    if band:
        top, tall = up(band[1]), up(band[0]) - up(band[1])
        parts.append(f'<rect class="arsd-band" x="{left}" width="{width - left - 16}" y="{top:.1f}" height="{tall:.1f}"/>')
    for value in xs:
        at = across(value)
        parts.append(f'<line class="arsd-axis" x1="{at:.1f}" x2="{at:.1f}" y1="12" y2="{height - foot}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - foot + 16}" text-anchor="middle">{value:g}</text>')
    for value in ys:
        at = up(value)
        parts.append(f'<line class="arsd-axis" x1="{left}" x2="{width - 16}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for p in points:
        at, over = across(p.x), up(p.y)
        if p.low is not None and p.high is not None:
            parts.append(f'<line class="arsd-bar" x1="{at:.1f}" x2="{at:.1f}" y1="{up(p.low):.1f}" y2="{up(p.high):.1f}"/>')
        kinds = "arsd-point" + (" relaxed" if p.relaxed else "") + (" chosen" if p.name == chosen else "")
        label = f"{p.name}: {x} {p.x:.3g}, {y} {p.y:.3g}{', ' + p.note if p.note else ''}"
        parts.append(
            f'<circle class="{kinds}" r="7" cx="{at:.1f}" cy="{over:.1f}" tabindex="0" role="button"'
            f' data-decoder="{text(p.name)}" aria-label="{text(label)}"><title>{text(label)}</title></circle>'
        )
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 2}" text-anchor="middle">{text(x)}</text>')
    parts.append(f'<text class="arsd-y" transform="translate(12 {height / 2 - 8}) rotate(-90)">{text(y)}</text>')
    key = '<ul class="arsd-legend"><li><i class="arsd-lossless"></i>lossless</li><li><i class="arsd-lossy"></i>relaxed</li>'
    key += '<li><i class="arsd-range"></i>plain AR, other seeds</li></ul>' if band else "</ul>"
    return f'<div class="arsd-scatter"><svg viewBox="0 0 {width} {height}">{"".join(parts)}</svg>{key}</div>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the values."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    size = 10.0 ** math.floor(math.log10(high - low)) / 10
    step = next(size * k for k in (1, 2, 5, 10, 20, 50) if (high - low) / (size * k) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Piece:
    """Text of one token, how it came about, in which pass, and who proposed it."""

    text: str
    kind: Outcome
    when: int
    who: str


def coloured(pieces: Sequence[Piece]) -> str:
    """Text whose tokens say who proposed them."""
    if not pieces:
        return '<p class="arsd-said"><span class="arsd-faint">&hellip;</span></p>'
    marks = "".join(
        f'<span class="{CLASSES[one.kind]}" title="{text(one.who)}, pass {one.when + 1}">{text(one.text)}</span>'
        for one in pieces
    )
    return f'<p class="arsd-said">{marks}</p>'
