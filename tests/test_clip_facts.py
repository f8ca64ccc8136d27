"""Facts of synthetic clips are what was drawn, borderline cases assert nothing, and sentences read back as facts."""

from __future__ import annotations

import numpy as np
import pytest

from arsd.training.clip_facts import COLOURS, COURSES, colour_names, course_of, facts_of, legs, measure
from arsd.training.clip_texts import DESCRIBE, NAME, QUESTIONS, SENTENCES, describe, fact_sentences, read
from arsd.training.clips import BACKGROUNDS, FRAMES, plain_view, random_view, show

SIDE, COUNT = 96, 13
TIME = np.linspace(0, 1, COUNT)
BACK = 1 - np.abs(2 * TIME - 1)  # there and back
SWING = (1 - np.cos(6 * np.pi * TIME)) / 2  # three times there and back
RED, BLUE, WHITE = (220, 30, 30), (40, 90, 220), (255, 255, 255)


def clip(x=0.5, y=0.5, width=0.4, height=0.4, angle=0.0, colour=RED, ground=WHITE, light=0.0, spot=None) -> np.ndarray:
    """A rectangle in ``COUNT`` frames; every length (frame widths, y downwards), angle and light may change over time."""
    across, down = np.meshgrid(*[(np.arange(SIDE) + 0.5) / SIDE] * 2)
    frames = []
    x, y, width, height, angle, light = (np.broadcast_to(some, COUNT) for some in (x, y, width, height, angle, light))
    for cx, cy, w, h, turn, extra in zip(x, y, width, height, angle, light, strict=True):
        u = (across - cx) * np.cos(turn) + (down - cy) * np.sin(turn)
        v = (down - cy) * np.cos(turn) - (across - cx) * np.sin(turn)
        inside = (np.abs(u) < w / 2) & (np.abs(v) < h / 2)
        frame = np.where(inside[..., None], np.clip(np.array(colour) + 255 * extra, 0, 255), np.array(ground))
        if spot is not None:
            frame[inside & (u < w * (spot[1] - 0.5))] = spot[0]
        frames.append(frame.astype(np.uint8))
    return np.stack(frames)


def facts(**drawn) -> dict[str, str]:
    return facts_of(measure(clip(**drawn)))


WAYS = {"steady": 0 * TIME, "up": TIME, "down": -TIME, "up and back": BACK, "down and back": -BACK, "many times": SWING}
DRAWN = {  # each kind of course: what to draw for a change, and what follows the sign of it
    "across": lambda way: {"x": 0.5 + 0.2 * way},
    "upright": lambda way: {"y": 0.5 - 0.2 * way},
    "size": lambda way: {"width": 0.4 * np.exp(0.4 * way), "height": 0.4 * np.exp(0.4 * way)},
    "outline": lambda way: {"width": 0.4 * np.exp(0.4 * way), "height": 0.4 * np.exp(-0.4 * way)},
    "tilt": lambda way: {"angle": 0.5 * way, "width": 0.6, "height": 0.3},
    "light": lambda way: {"light": 0.2 * way, "colour": (120, 90, 90)},
}


@pytest.mark.parametrize("kind", COURSES)
@pytest.mark.parametrize("way", WAYS)
def test_a_course_is_told_as_it_was_drawn(kind, way):
    found = facts(**DRAWN[kind](WAYS[way]))
    assert found[kind] == way
    assert way == "steady" or found.get("end") == ("otherwise" if way in ("up", "down") else "as it began")


@pytest.mark.parametrize("kind", COURSES)
def test_a_course_in_the_margin_is_not_told(kind):
    limits = COURSES[kind]
    values = TIME * (limits.quiet + limits.clear) / 2
    assert course_of(values, limits) is None
    assert course_of(0.8 * limits.quiet * TIME, limits) == "steady" and course_of(1.1 * limits.clear * TIME, limits) == "up"


def test_a_round_or_square_thing_has_no_tilt():
    assert "tilt" not in facts(angle=0.5 * TIME)


def test_turning_points_need_a_clear_way_back():
    assert legs(np.array([0, 5, 10, 8.0]), 3) == [1] and legs(np.array([0, 5, 10, 6.0]), 3) == [1, -1]
    assert legs(np.array([0.0, 0, 0]), 3) == [] and legs(np.array([0, -9, 0, -9.0]), 3) == [-1, 1, -1]
    assert course_of(np.array([0, 0.5, 1, 0.68]), COURSES["across"]) is None  # one turn or none, by how one looks at it


def test_colours_and_ground_are_told_when_they_are_clear():
    found = facts(ground=BACKGROUNDS["yellow"], spot=(BLUE, 0.3))
    assert (found["background"], found["colour"], found["second"]) == ("yellow", "red", "blue")
    assert facts()["second"] == "none"
    even = facts(spot=(BLUE, 0.5))
    assert "colour" not in even and "second" not in even


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_background_is_called_by_its_name(name):
    assert COLOURS[int(colour_names(np.array(BACKGROUNDS[name], np.uint8)))] == name


def test_size_and_place():
    found = facts(x=0.2, y=0.8, width=0.3, height=0.3)
    assert (found["fill"], found["side"], found["height"]) == ("small", "left", "bottom")
    found = facts(x=0.5, y=0.5, width=0.8, height=0.8)
    assert (found["fill"], found["side"], found["height"]) == ("large", "middle", "middle")
    assert "side" not in facts(x=0.43) and "fill" not in facts(width=0.424, height=0.424)


def test_phases_rest_and_time_of_change():
    early = np.minimum(3 * TIME, 1)
    found = facts(x=0.3 + 0.3 * early)
    assert (found["first"], found["then"], found["last"]) == ("across up", "still", "still")
    assert (found["when"], found["rest"], found["end"]) == ("beginning", "a while", "otherwise")
    found = facts(x=0.3 + 0.3 * TIME)
    assert found["rest"] == "never" and "when" not in found
    found = facts()
    assert found["rest"] == "always" and found["end"] == "as it began" and "when" not in found


def test_a_reversed_clip_turns_the_facts_round():
    frames = clip(x=0.3 + 0.3 * np.maximum(0, 3 * TIME - 2))
    there, back = facts_of(measure(frames)), facts_of(measure(frames[::-1]))
    assert (there["across"], back["across"]) == ("up", "down")
    assert (there["when"], back["when"]) == ("end", "beginning")


def coloured_clip() -> np.ndarray:
    """[64, 96, 96, 4]: a red block that moves right in front of nothing."""
    frames = np.zeros((FRAMES, SIDE, SIDE, 4), np.uint8)
    for place, frame in enumerate(frames):
        frame[30:70, 10 + place // 2 : 50 + place // 2] = (*RED, 255)
    return frames


def test_views_change_the_facts_as_they_should():
    found = facts_of(measure(show(coloured_clip(), plain_view(8, "blue"))))
    assert (found["background"], found["colour"], found["across"]) == ("blue", "red", "up")
    mirrored = plain_view(8)
    mirrored.mirrored = True
    assert facts_of(measure(show(coloured_clip(), mirrored)))["across"] == "down"
    lifted = plain_view(8)
    lifted.index = np.zeros(8, int)
    lifted.warp = np.zeros((8, 6))
    lifted.warp[:, 1] = np.linspace(0.2, -0.2, 8)  # shifts count downwards
    found = facts_of(measure(show(coloured_clip(), lifted)))
    assert (found["upright"], found["across"]) == ("up", "steady")


def test_a_drawn_view_is_that_of_its_generator():
    first, again, other = (show(coloured_clip(), random_view(6, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert first.shape == (6, SIDE, SIDE, 3) and np.array_equal(first, again) and not np.array_equal(first, other)


def test_descriptions_read_back_as_their_facts():
    source = np.random.default_rng(0)
    for _ in range(200):
        chosen = {kind: str(source.choice(list(table))) for kind, table in SENTENCES.items() if source.random() < 0.7}
        reading = read(describe(chosen, "Mrs. Claus", "people & body", ["woman", "xmas"]))
        assert reading.facts == chosen and not reading.strange
        assert (reading.name, reading.group) == ("Mrs Claus", "people & body")


def test_sentences_are_unique_and_every_kind_can_be_asked_for():
    told = [sentence for table in SENTENCES.values() for sentence in table.values()]
    assert len(set(told)) == len(told)
    assert sorted(kind for kinds in QUESTIONS for kind in kinds) == sorted(SENTENCES)
    asked = [question for group in (DESCRIBE, NAME, *QUESTIONS.values()) for question in group]
    assert len(set(asked)) == len(asked)
    assert read("It dances. " + fact_sentences({"rest": "never"})[0]).strange == ["It dances"]
