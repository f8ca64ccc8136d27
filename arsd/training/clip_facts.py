"""Facts that hold for a clip, measured on its pixels: colours, size, place, motion, turns, light, and when they change.

Every kind of fact has a value where the measured figures are clear and none where they are in the margin between two
values, so what is asserted is true by construction. Lengths are in frame widths, shares in parts of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Facts = dict[str, str]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
DIFFERENT = 24  # of 255, in the channel that differs most: a pixel that is not background
HYSTERESIS = (0.25, 0.4)  # shares of a course's range; it has a value when both find the same turning points
_BITS = 4  # of a channel, in the table of colour names


@dataclass
class Course:
    """What counts as change in a figure: below ``quiet`` none, above ``clear`` some, in between neither is asserted."""

    quiet: float
    clear: float


COURSES = {
    "across": Course(0.018, 0.03),  # of the centroid, frame widths
    "upright": Course(0.018, 0.03),
    "size": Course(0.035, 0.06),  # of log sqrt(area)
    "outline": Course(0.07, 0.12),  # of log(spread in x / spread in y)
    "tilt": Course(0.07, 0.12),  # of the long axis, radians
    "light": Course(0.025, 0.045),  # of the mean luminance
}
ROUND = 0.25  # log of the ratio of the axes below which a silhouette has no long axis to speak of


@dataclass
class Measures:
    """Figures of each frame [T], of clip frames with a plain background.

    Args:
        background: its colour, [3].
        courses: ``across`` and ``upright`` centroid, ``size``, ``outline``, ``tilt``, ``light``, as in :data:`COURSES`.
        area: share of the frame that is not background.
        elongation: log of the ratio of the axes.
        shares: of the object's pixels by colour name, [T, 11]; pixels between two names are left out of all.
        steps: mean absolute difference from the frame before, [T - 1], in parts of 1.
        departure: the same from the first frame, [T].
    """

    background: np.ndarray
    courses: dict[str, np.ndarray]
    area: np.ndarray
    elongation: np.ndarray
    shares: np.ndarray
    steps: np.ndarray
    departure: np.ndarray


def _name_of(red: float, green: float, blue: float) -> int:
    """Index of the colour name of an RGB value in 0..1, -1 near a border between two."""
    high, low = max(red, green, blue), min(red, green, blue)
    chroma = high - low
    if high < 0.2:
        return COLOURS.index("black")
    if chroma < 0.09:
        if high > 0.9:
            return COLOURS.index("white")
        return COLOURS.index("grey") if 0.27 < high < 0.87 else -1
    if chroma < 0.12 or high < 0.24:
        return -1
    if high == red:
        hue = 60 * (((green - blue) / chroma) % 6)
    else:
        hue = 60 * ((blue - red) / chroma + 2 if high == green else (red - green) / chroma + 4)
    if hue < 48 or hue > 345:  # brown is dark or dull orange
        dark = high < 0.7 if hue > 16 and hue < 48 else high < 0.65 and chroma < 0.45
        if dark or (16 < hue < 48 and high < 0.8 and chroma < 0.45):
            return COLOURS.index("brown") if high < 0.66 or chroma < 0.42 else -1
    if (hue > 320 or hue < 18) and high > 0.75 and low > 0.35:
        return COLOURS.index("pink")
    for name, start, end in (
        ("red", -16, 14),
        ("orange", 17, 37),
        ("yellow", 40, 66),
        ("green", 72, 164),
        ("blue", 172, 248),
        ("purple", 253, 295),
        ("pink", 301, 342),
    ):
        if start <= hue < end or start <= hue - 360 < end:
            return COLOURS.index(name)
    return -1


def _colour_table() -> np.ndarray:
    levels = [(i + 0.5) / 2**_BITS for i in range(2**_BITS)]
    return np.array([[[_name_of(r, g, b) for b in levels] for g in levels] for r in levels], dtype=np.int8)


_TABLE = _colour_table()


def colour_names(pixels: np.ndarray) -> np.ndarray:
    """Index into :data:`COLOURS` of each of the ``pixels`` [..., 3] uint8, -1 where two names would do."""
    red, green, blue = np.moveaxis(pixels >> (8 - _BITS), -1, 0)
    return _TABLE[red, green, blue]


def background_of(frames: np.ndarray) -> np.ndarray:
    """The median colour [3] of the border pixels of ``frames`` [T, H, W, 3]."""
    border = [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in border]), axis=0)


def measure(frames: np.ndarray) -> Measures:
    """Figures of a clip ``frames`` [T, H, W, 3] uint8 with a plain background; T at least 2."""
    count, height, width = frames.shape[:3]
    background = background_of(frames)
    away = np.abs(frames.astype(np.int16) - background.astype(np.int16)).max(-1)
    mask = away > DIFFERENT
    area = mask.mean((1, 2))
    weight = mask / np.maximum(mask.sum((1, 2), keepdims=True), 1)
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / width
    rows, columns = weight.sum(2), weight.sum(1)
    centre_x, centre_y = columns @ x, rows @ y
    var_x, var_y = (columns @ x**2 - centre_x**2).clip(1e-6), (rows @ y**2 - centre_y**2).clip(1e-6)
    both = np.einsum("thw,h,w->t", weight, y, x) - centre_x * centre_y
    mean, spread = (var_x + var_y) / 2, np.hypot((var_x - var_y) / 2, both)
    luminance = frames @ np.array([0.299, 0.587, 0.114]) / 255
    names = np.where(mask, colour_names(frames), -1).reshape(count, -1)
    hits = np.stack([(names == index).sum(1) for index in range(len(COLOURS))], 1)
    even = frames[:, : height // 2 * 2, : width // 2 * 2]
    small = even.reshape(count, height // 2, 2, width // 2, 2, 3).mean((2, 4)) / 255
    courses = {
        "across": centre_x,
        "upright": 1 - centre_y,
        "size": np.log(np.sqrt(area).clip(0.01)),
        "outline": np.log(var_x / var_y) / 2,
        "tilt": np.unwrap(np.arctan2(2 * both, var_x - var_y)) / 2,
        "light": (luminance * weight).sum((1, 2)),
    }
    return Measures(
        background,
        courses,
        area,
        np.log((mean + spread) / (mean - spread).clip(1e-6)) / 2,
        hits / np.maximum(mask.sum((1, 2))[:, None], 1),
        np.abs(np.diff(small, axis=0)).mean((1, 2, 3)),
        np.abs(small - small[0]).mean((1, 2, 3)),
    )


def legs(values: np.ndarray, least: float) -> list[int]:
    """Signs of the ways between the turning points of ``values`` [T]; a way back of less than ``least`` is no turn."""
    found: list[int] = []
    low = high = values[0]
    for value in values[1:]:
        low, high = min(low, value), max(high, value)
        if (not found or found[-1] < 0) and value - low > least:
            found.append(1)
            high = value
        elif (not found or found[-1] > 0) and high - value > least:
            found.append(-1)
            low = value
        if found and found[-1] > 0:
            low = high = max(high, value)
        elif found:
            low = high = min(low, value)
    return found


def course_of(values: np.ndarray, limits: Course) -> str | None:
    """``steady``, ``up``, ``down``, ``up and back``, ``down and back``, ``to and fro`` (2-3 turns) or ``many times``."""
    extent = float(values.max() - values.min())
    if extent < limits.quiet:
        return "steady"
    if extent < limits.clear:
        return None
    ways = legs(values, HYSTERESIS[0] * extent)
    if ways != legs(values, HYSTERESIS[1] * extent):
        return None
    way = {1: "up", -1: "down"}[ways[0]]
    if len(ways) == 1:
        return way
    if len(ways) == 2:
        return f"{way} and back" if abs(values[-1] - values[0]) < 0.35 * extent else None
    return "to and fro" if len(ways) < 5 else "many times"


def between(value: float, limits: Sequence[tuple[str, float, float]]) -> str | None:
    """The name whose interval, of ``(name, from, to)``, holds ``value``."""
    return next((name for name, low, high in limits if low <= value < high), None)


def phase_of(measures: Measures, first: int, last: int) -> str | None:
    """What mainly happens from frame ``first`` to frame ``last``."""
    changes = {}
    for kind, limits in COURSES.items():
        if kind != "tilt" or measures.elongation[first : last + 1].min() > ROUND:
            values = measures.courses[kind]
            changes[kind] = float(values[last] - values[first]) / limits.clear
    ranked = sorted(changes, key=lambda kind: -abs(changes[kind]))
    most, next_most = (abs(changes[kind]) for kind in ranked[:2])
    if most > 1.1 and most > 1.35 * next_most:
        return f"{ranked[0]} {'up' if changes[ranked[0]] > 0 else 'down'}"
    if most < 0.5:
        return between(float(measures.steps[first:last].max()), (("still", 0, 0.004), ("in place", 0.008, 1)))
    return None


def _colour_facts(measures: Measures) -> Facts:
    facts = {}
    ground = int(colour_names(measures.background.astype(np.uint8)))
    if ground >= 0:
        facts["background"] = COLOURS[ground]
    shares = measures.shares.mean(0)
    order = np.argsort(-shares)
    first, second, third = shares[order[:3]]
    if first > 0.25 and first > 1.2 * second + 0.02:
        facts["colour"] = COLOURS[order[0]]
        if second > 0.12 and second > 1.2 * third + 0.02:
            facts["second"] = COLOURS[order[1]]
        elif second < 0.05:
            facts["second"] = "none"
    return facts


def _time_facts(measures: Measures) -> Facts:
    facts: dict[str, str | None] = {}
    steps, count = measures.steps, len(measures.steps)
    most = float(measures.departure.max())
    facts["end"] = "as it began" if most < 0.004 else None
    if most > 0.008:
        ratio = float(measures.departure[-1]) / most
        facts["end"] = between(ratio, (("as it began", 0, 0.3), ("otherwise", 0.5, 2)))
        share = np.minimum(np.arange(count) * 3 // count, 2) if count >= 3 else np.zeros(count, int)
        sums = np.bincount(share, weights=steps, minlength=3) / np.maximum(np.bincount(share, minlength=3), 1)
        order = np.argsort(-sums)
        if count >= 3 and sums[order[0]] > 1.25 * sums[order[1]]:
            facts["when"] = ("beginning", "middle", "end")[order[0]]
    longest = [0.0, 0.0]
    for place, limit in enumerate((0.003, 0.006)):  # a rest that both limits find
        run = 0
        for step in steps:
            run = run + 1 if step < limit else 0
            longest[place] = max(longest[place], run / count)
    if longest[0] > 0.95:
        facts["rest"] = "always"
    elif longest[0] > 0.25 and longest[1] < 0.9:
        facts["rest"] = "a while"
    elif longest[1] < 0.15:
        facts["rest"] = "never"
    first, second = (round((len(steps)) * part / 3) for part in (1, 2))
    if count >= 3:
        for name, start, end in (("first", 0, first), ("then", first, second), ("last", second, count)):
            facts[name] = phase_of(measures, start, end)
    return {kind: value for kind, value in facts.items() if value is not None}


def facts_of(measures: Measures) -> Facts:
    """All facts that can be asserted, kind -> value; a kind whose figures are in a margin is missing."""
    facts: dict[str, str | None] = dict(_colour_facts(measures))
    area = float(measures.area.mean())
    facts["fill"] = between(area, (("small", 0, 0.16), ("medium", 0.2, 0.33), ("large", 0.39, 1)))
    across, upright = (float(measures.courses[kind].mean()) for kind in ("across", "upright"))
    facts["side"] = between(across, (("left", 0, 0.42), ("middle", 0.45, 0.55), ("right", 0.58, 1)))
    facts["height"] = between(upright, (("bottom", 0, 0.42), ("middle", 0.45, 0.55), ("top", 0.58, 1)))
    for kind, limits in COURSES.items():
        if kind != "tilt" or measures.elongation.min() > ROUND:
            facts[kind] = course_of(measures.courses[kind], limits)
    facts |= _time_facts(measures)
    return {kind: value for kind, value in facts.items() if value is not None}
