"""Trees of guesses in enumerable worlds, and the same laws predicted by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import Draft, Laws, Parts, Setting, SiblingSampling, TreeDrafter, TreeShape
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.types import FixedWindow
from arsd.exactness.tables import Build, TableTarget, World


def small_world(world: World, batch: int) -> TableTarget:
    """The draft model's table: another one over the same ids."""
    streams = 2 if world.config.guidance_scale != 1 else 1
    return TableTarget(world.vocab, world.num_tokens, batch, streams, world.seed + 50, world.sharpness)


def tree_build(world: World, tree: str, rule: Callable[[], Any] = SiblingSampling, chain: bool = False) -> Build:
    """A small model's tree under a rule; ``chain`` hides the tree from the loop, which must be a chain then."""
    shape = TreeShape.parse(tree)

    def build(setting: Setting) -> Parts:
        made = rule()
        small = world.small(setting.batch) if isinstance(world, OneToken) else small_world(world, setting.batch)
        call = replace(setting, rule=made, draft_model=lambda window: SmallARDrafter(small, window))
        drafter = (ChainDrafter if chain else TreeDrafter)(call, shape)
        return Parts(drafter, made, FixedWindow(shape.depth + 1), shape.columns)

    return build


class ChainDrafter(TreeDrafter):
    """A chain-shaped tree, handed on as a chain."""

    def propose(self, step) -> Draft:
        draft = super().propose(step)
        return Draft(draft.tokens, draft.law)


class FixedChildren:
    """The same children of the last token in every round, without a law: fixed tokens."""

    needs_law = False

    def __init__(self, *tokens: int) -> None:
        self.tokens = torch.tensor(tokens)

    def propose(self, step) -> Draft:
        return Draft(self.tokens.expand(len(step.positions), -1), None, TreeShape.parse(str(len(self.tokens))))

    def observe(self, step, law, verdict, lengths) -> None:
        pass


@dataclass(frozen=True)
class OneToken(World):
    """One token with the law P, guesses with the law Q: the vectors of research notes, section 6."""

    p: tuple[Fraction, ...] = field(default=())
    q: tuple[Fraction, ...] = field(default=())

    def _table(self, batch: int, law: tuple[Fraction, ...]) -> TableTarget:
        target = TableTarget(len(law), 1, batch)
        target.flat[0, 0] = torch.tensor([float(x) for x in law], dtype=torch.float64).log()
        target.tables[0][0, 0] = target.flat[0, 0]
        return target

    def target(self, batch: int) -> TableTarget:
        return self._table(batch, self.p)

    def small(self, batch: int) -> TableTarget:
        return self._table(batch, self.q)


def node_law(p: list, q: list, children: tuple[int, ...], omega: Any) -> tuple[dict[tuple[int, int], Any], Any]:
    """{(token, child taken or 0): probability} of one node, and the bound on its total variation. Works in fractions."""
    out: dict[tuple[int, int], Any] = defaultdict(lambda: p[0] * 0)
    bound = p[0] * 0

    def judge(rest: list, left: list, number: int, weight: Any) -> None:
        nonlocal bound
        if number == len(children) or not sum(left):
            for token, chance in enumerate(rest):
                out[token, 0] += weight * chance
            return
        delivered = [min(b, omega * a) for a, b in zip(rest, left, strict=True)]
        bound += weight * sum(max(d - a, 0) for d, a in zip(delivered, rest, strict=True))
        residual = [a - d if a > d else a * 0 for a, d in zip(rest, delivered, strict=True)]
        for token, chance in enumerate(left):
            if chance:
                accepted = min(1, omega * rest[token] / chance)
                out[token, children[number]] += weight * chance * accepted
                if accepted < 1:
                    others = [b if other != token else b * 0 for other, b in enumerate(left)]
                    others = [b / sum(others) for b in others] if sum(others) else others
                    after = [r / sum(residual) for r in residual] if sum(residual) else rest
                    judge(after, others, number + 1, weight * chance * (1 - accepted))

    judge(p, q, 0, 1)
    return dict(out), bound


def predicted_law(world: World, tree: str, omegas: list[float]) -> tuple[Tensor, float]:
    """Law [V ** N] of a small model's tree under sibling sampling, and the expected sum of the bounds; by recursion."""
    shape = TreeShape.parse(tree)
    target, small, laws = world.target(1), small_world(world, 1), Laws(world.config, world.grammar())
    children = [
        tuple(c + 1 for c, parent in enumerate(shape.parents) if parent == column) for column in range(shape.columns)
    ]
    omegas, bound = [*omegas, 1.0], 0.0
    mass: dict[tuple[int, int], float] = {(0, 0): 1.0}  # (number of the prefix, column reached; 0 is a new round)
    for n in range(world.num_tokens):
        p, q = (
            laws(t.tables[n][:, :, None], torch.full((world.vocab**n, 1), n)).probs[:, 0].tolist() for t in (target, small)
        )
        after: dict[tuple[int, int], float] = defaultdict(float)
        for (prefix, column), weight in mass.items():
            out, local = node_law(p[prefix], q[prefix], children[column], omegas[shape.depths[column]])
            bound += weight * local
            for (token, child), chance in out.items():
                after[prefix * world.vocab + token, child] += weight * chance
        mass = after
    law = torch.zeros(world.vocab**world.num_tokens, dtype=torch.float64)
    for (number, _), weight in mass.items():
        law[number] += weight
    return law, bound
