"""The tasks that the exactness suite runs: small worlds to enumerate and to sample, long ones to compare token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import Autoregressive, Grammar, LawConfig
from arsd.exactness.tables import Build, HashTarget, World, run

INITS = ("uniform", "random", "left", "above", "previous-frame")
GUIDED = LawConfig(guidance_scale=2.0, top_k=2)
COOL = LawConfig(guidance_scale=3.0, temperature=0.7, top_p=0.9)
WORLDS: dict[str, Callable[[int], World]] = {
    "two ids, four tokens": lambda seed: World(2, 4, seed),
    "three ids, three tokens": lambda seed: World(3, 3, seed),
    "guided top-k 2 of 3 with a forced token": lambda seed: World(3, 4, seed, GUIDED, forced={2: 1}),
    "guided with forbidden ids": lambda seed: World(3, 3, seed, LawConfig(guidance_scale=2.0), forbidden={1: 0, 2: 2}),
    "guided top-p, forced start, far above": lambda seed: World(3, 4, seed, COOL, forced={0: 2}, row_length=3),
}

# the second has wide residuals: a residual over one or two ids hardly shows whose noise drew it
SAMPLED = {
    "warm": (World(3, 4, 1, LawConfig(guidance_scale=1.5, temperature=1.2)), 3),
    "sharp": (World(4, 5, 1, sharpness=2.5), 4),
}

VOCAB, LENGTH, ROW, FRAME = 12, 45, 9, 18
SEEDS, IMAGES = [5, 5, -1, 2**63 + 11, 0], [0, 1, 0, 7, 3]
LAWS = {
    "plain": LawConfig(),
    "guidance": LawConfig(guidance_scale=3.0),
    "guidance at first": LawConfig(guidance_scale=3.0, guidance_interval=20),
    "top-k": LawConfig(guidance_scale=2.0, top_k=4),
    "top-p": LawConfig(top_p=0.8, temperature=0.9),
    "cold": LawConfig(guidance_scale=1.5, temperature=0.3),
    "temperature 0": LawConfig(temperature=0.0),
}


def picture_grammar() -> Grammar:
    """Rows that end in a forced id, which stands nowhere else; the first row has half of the codes only."""
    allowed = torch.ones(2, VOCAB, dtype=torch.bool)
    allowed[:, -1] = False
    allowed[0, ::2] = False
    ends = {position: VOCAB - 1 for position in range(ROW - 1, LENGTH, ROW)}
    return Grammar(LENGTH, VOCAB, ends, allowed, [0] * ROW + [1] * (LENGTH - ROW))


def picture(
    build: Build,
    law: str = "plain",
    rows: Sequence[int] = range(5),
    grammar: Grammar | None = None,
    batch: int | None = None,
) -> Tensor:
    """Tokens [M, 45] of long pictures.

    Args:
        build: makes the parts of the loop.
        law: one of :data:`LAWS`.
        rows: which of five pairs of seed and image index.
        grammar: forced and allowed ids.
        batch: how many are decoded at a time, the others wait; ``None``: all.
    """
    config = LAWS[law]
    target = HashTarget(VOCAB, LENGTH, batch or len(rows), streams=2 if config.guidance_scale != 1 else 1)
    keys: dict[str, Any] = {"seeds": [SEEDS[row] for row in rows], "images": [IMAGES[row] for row in rows]}
    keys["pictures"] = len(rows)
    return run(target, parts=build, config=config, grammar=grammar, row_length=ROW, frame_length=FRAME, **keys).tokens


def plain_picture(law: str = "plain", rows: Sequence[int] = range(5), grammar: Grammar | None = None) -> Tensor:
    """What plain AR gives for :func:`picture`."""
    return picture(Autoregressive().build, law, rows, grammar)
