"""Facts of a clip as sentences, questions about them, and the way back: what a generated description asserts.

One sentence stands for one value of one kind of fact, so greedy decoding is well defined and a description can be read
back exactly. Kinds are told in the order of :data:`SENTENCES`; what is not known is not told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from arsd.training.clip_facts import COLOURS, Facts

_TO_AND_FRO = {"to and fro": "a few times", "many times": "many times"}


def _ways(steady: str, up: str, down: str, up_back: str, down_back: str, fro: str) -> dict[str, str]:
    table = {"steady": steady, "up": up, "down": down, "up and back": up_back, "down and back": down_back}
    return table | {value: f"{fro} {words}" for value, words in _TO_AND_FRO.items()}


_ACTS = {
    "across up": "it moves right",
    "across down": "it moves left",
    "upright up": "it rises",
    "upright down": "it sinks",
    "size up": "it grows",
    "size down": "it shrinks",
    "outline up": "it widens",
    "outline down": "it narrows",
    "tilt up": "it tilts clockwise",
    "tilt down": "it tilts counterclockwise",
    "light up": "it brightens",
    "light down": "it darkens",
    "still": "nothing moves",
    "in place": "it stirs in place",
}

SENTENCES: dict[str, dict[str, str]] = {
    "background": {colour: f"The background is {colour}" for colour in COLOURS},
    "colour": {colour: f"It is mostly {colour}" for colour in COLOURS},
    "second": {**{colour: f"The second colour is {colour}" for colour in COLOURS}, "none": "There is no second colour"},
    "fill": {
        "small": "It is small in the frame",
        "medium": "It fills a quarter of the frame",
        "large": "It fills much of the frame",
    },
    "side": {
        "left": "It is on the left side",
        "middle": "It is halfway between left and right",
        "right": "It is on the right side",
    },
    "height": {
        "bottom": "It is in the lower half",
        "middle": "It is halfway up",
        "top": "It is in the upper half",
    },
    "across": _ways(
        "It does not move sideways",
        "It moves to the right",
        "It moves to the left",
        "It moves to the right and comes back",
        "It moves to the left and comes back",
        "It moves from side to side",
    ),
    "upright": _ways(
        "It stays at its height",
        "It rises",
        "It sinks",
        "It rises and sinks again",
        "It sinks and rises again",
        "It moves up and down",
    ),
    "size": _ways(
        "It keeps its size",
        "It grows",
        "It shrinks",
        "It grows and shrinks again",
        "It shrinks and grows again",
        "Its size goes up and down",
    ),
    "outline": _ways(
        "Its outline keeps its proportions",
        "Its outline gets wider",
        "Its outline gets narrower",
        "Its outline gets wider and narrow again",
        "Its outline gets narrower and wide again",
        "Its outline goes between narrow and wide",
    ),
    "tilt": _ways(
        "It does not tilt",
        "It tilts clockwise",
        "It tilts counterclockwise",
        "It tilts clockwise and back",
        "It tilts counterclockwise and back",
        "It rocks to and fro",
    ),
    "light": _ways(
        "Its light stays the same",
        "It gets brighter",
        "It gets darker",
        "It gets brighter and dark again",
        "It gets darker and bright again",
        "Its light flickers",
    ),
    "first": {value: f"First, {act}" for value, act in _ACTS.items()},
    "then": {value: f"Then, {act}" for value, act in _ACTS.items()},
    "last": {value: f"At last, {act}" for value, act in _ACTS.items()},
    "when": {
        "beginning": "Most change comes at the beginning",
        "middle": "Most change comes in the middle",
        "end": "Most change comes at the end",
    },
    "rest": {
        "never": "It never rests",
        "a while": "It rests for a while",
        "always": "It rests all the time",
    },
    "end": {
        "as it began": "The clip ends as it began",
        "otherwise": "The clip does not end as it began",
    },
}
KINDS = tuple(SENTENCES)
_MEANING = {sentence: (kind, value) for kind, table in SENTENCES.items() for value, sentence in table.items()}

DESCRIBE = ("Describe the clip.", "Describe this video.", "What happens?", "What do you see in this clip?")
NAME = ("What is it?", "What does the clip show?", "Which emoji is this?")
QUESTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("background",): ("Which colour is the background?", "What is behind it?"),
    ("colour", "second"): ("Which colours does it have?", "What colour is it?"),
    ("fill", "side", "height"): ("How large is it, and where?", "Where is it?"),
    ("across", "upright"): ("How does it move?", "Where does it go?"),
    ("size", "outline"): ("Does it grow or shrink?", "How does its shape change?"),
    ("tilt",): ("Does it tilt?",),
    ("light",): ("Does its light change?",),
    ("first", "then", "last"): ("What happens first, then and at last?", "Tell what happens step by step."),
    ("when",): ("When does it change most?",),
    ("rest",): ("Does it ever rest?",),
    ("end",): ("Does it end as it began?",),
}


@dataclass
class Reading:
    """What a generated answer says.

    Args:
        facts: kind -> value, the first of each kind.
        name: the thing, ``""`` when it is not named.
        group: its group, ``""`` when it is not told.
        strange: sentences that mean nothing here.
    """

    facts: Facts
    name: str
    group: str
    strange: list[str]


def name_sentences(name: str, group: str, keywords: Sequence[str]) -> list[str]:
    """What the thing is: its name, group and keywords."""
    words = f" Think of {' and '.join(keywords)}." if keywords else ""
    return [f"The clip shows: {name.replace('.', '')}.", f"It belongs to {group}.{words}"]


def fact_sentences(facts: Facts, kinds: Sequence[str] = KINDS) -> list[str]:
    """The sentences of the known facts among ``kinds``, in order."""
    return [SENTENCES[kind][facts[kind]] + "." for kind in kinds if kind in facts]


def describe(facts: Facts, name: str, group: str, keywords: Sequence[str]) -> str:
    """All that is known, in one paragraph."""
    return " ".join([*name_sentences(name, group, keywords), *fact_sentences(facts)])


def read(text: str) -> Reading:
    """The facts that a description or an answer asserts."""
    found: Facts = {}
    name, group = "", ""
    strange: list[str] = []
    for sentence in re.split(r"\.(?:\s+|$)", text.strip()):
        if sentence.startswith("The clip shows: "):
            name = name or sentence.removeprefix("The clip shows: ")
        elif sentence.startswith("It belongs to "):
            group = group or sentence.removeprefix("It belongs to ")
        elif sentence in _MEANING:
            kind, value = _MEANING[sentence]
            found.setdefault(kind, value)
        elif sentence and not sentence.startswith("Think of "):
            strange.append(sentence)
    return Reading(found, name, group, strange)
