"""Static trees of guesses: several for a position, each with guesses of its own behind it (EAGLE-1, arXiv 2401.15077).

The columns of a pass: column 0 holds the last committed token, column j + 1 node j. Column c stands ``depth`` positions
behind the last committed token and sees its ancestors only, so its logits are those of a chain along its path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.errors import StrategyError

if TYPE_CHECKING:
    from arsd.decoding.types import Draft, Step

MOST_NODES = 512
_CHAIN = re.compile(r"chain[:-]?(\d{1,3})")
_LEVELS = re.compile(r"\d+(\.\d+)*(x\d+(\.\d+)*)*")

NAMED = {
    # default of EAGLE-1 and LANTERN (SafeAILab/EAGLE, eagle/model/choices.py): 25 nodes, by depth 4 / 8 / 8 / 3 / 2
    "mc_sim_7b_63": "4x3.2.2.1x3.2.2.1.0x3.0x2.0",
}


@dataclass(frozen=True)
class TreeShape:
    """A tree of guesses, the same in every row and round.

    Nodes come breadth first, and siblings in the order in which they are drawn and tested; so the first nodes of a tree are
    a tree as well.

    Args:
        parents: column of each node's parent [K].

    Raises:
        StrategyError: when the nodes are not in that order, or there are too many.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the order."""
        if len(self.parents) > MOST_NODES:
            raise StrategyError(f"a tree has at most {MOST_NODES} nodes, not {len(self.parents)}")
        if any(not 0 <= parent <= node for node, parent in enumerate(self.parents)) or sorted(self.parents) != list(
            self.parents
        ):
            raise StrategyError(f"the nodes of a tree must be given breadth first, not with the parents {self.parents}")

    @staticmethod
    def chain(length: int) -> TreeShape:
        """One guess for each of ``length`` positions."""
        return TreeShape(tuple(range(length)))

    @staticmethod
    def of_levels(levels: Sequence[int | Sequence[int]]) -> TreeShape:
        """How many children the nodes of each depth have: one number for all of them, or one for each.

        Numbers that are left out at the end of a level are 0. ``[3, 2, 1]``: three children of the last committed token, two
        of each of those, one of each of these six.

        Raises:
            StrategyError: for a level that does not fit, or a tree that is too large.
        """
        parents: list[int] = []
        level = [0]
        for counts in levels:
            each = [counts] * len(level) if isinstance(counts, int) else [*counts]
            if not each or len(each) > len(level) or min(each) < 0 or sum(each) == 0 or sum(each) > MOST_NODES:
                raise StrategyError(f"{len(level)} nodes of a tree cannot have {counts} children")
            new = [parent for parent, count in zip(level, each, strict=False) for _ in range(count)]
            level = list(range(len(parents) + 1, len(parents) + 1 + len(new)))
            parents += new
        return TreeShape(tuple(parents))

    @staticmethod
    def of_paths(paths: Iterable[Sequence[int]]) -> TreeShape:
        """From child ranks along the path to each node, as EAGLE's choices: ``[[0], [1], [0, 0]]``.

        Raises:
            StrategyError: when a node's parent or elder sibling is missing.
        """
        ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        column: dict[tuple[int, ...], int] = {(): 0}
        for path in ordered:
            elder = (*path[:-1], path[-1] - 1) if path and path[-1] else ()
            if not path or path[:-1] not in column or elder not in column:
                raise StrategyError(f"node {list(path)} of a tree has no parent or no elder sibling")
            column[path] = len(column)
        return TreeShape(tuple(column[path[:-1]] for path in ordered))

    @staticmethod
    def parse(text: str | int) -> TreeShape:
        """``3x2x1`` (children per node, by depth), ``4x3.2.2.1`` (of each node), ``chain5``, or a published name.

        Raises:
            StrategyError: for anything else.
        """
        text = NAMED.get(str(text), str(text))
        chain = _CHAIN.fullmatch(text)
        if chain and int(chain[1]):
            return TreeShape.chain(int(chain[1]))
        if not _LEVELS.fullmatch(text):
            known = ", ".join(NAMED)
            raise StrategyError(f"{text!r} is no tree: write 3x2x1 (children per node, by depth), chain5, or {known}")
        levels = [[int(n) for n in level.split(".")] for level in text.split("x")]
        return TreeShape.of_levels([level[0] if len(level) == 1 else level for level in levels])

    def __str__(self) -> str:
        """As :meth:`parse` takes it."""
        if self.depth == len(self.parents):
            return f"chain{self.depth}"
        levels = []
        for depth in range(self.depth):
            counts = [self.counts[column] for column in self.level(depth)]
            if len(set(counts)) == 1:
                levels.append(str(counts[0]))
                continue
            while len(counts) > 2 and counts[-1] == counts[-2] == 0:
                counts.pop()
            levels.append(".".join(map(str, counts)))
        return "x".join(levels)

    @property
    def columns(self) -> int:
        """1 + K: columns of a pass."""
        return 1 + len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every column; that of column 0 is 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """D: the longest path."""
        return self.depths[-1]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many children every column has."""
        counts = [0] * self.columns
        for parent in self.parents:
            counts[parent] += 1
        return tuple(counts)

    @cached_property
    def families(self) -> tuple[int, ...]:
        """The columns that have children, F of them."""
        return tuple(column for column, count in enumerate(self.counts) if count)

    def level(self, depth: int) -> range:
        """The columns of one depth."""
        found = [column for column, d in enumerate(self.depths) if d == depth]
        return range(found[0], found[-1] + 1)

    def widest(self, depth: int) -> int:
        """The most children that a column of this depth has."""
        return max(self.counts[column] for column in self.level(depth))

    def head(self, columns: int) -> TreeShape:
        """The tree of the first columns."""
        return self if columns == self.columns else TreeShape(self.parents[: columns - 1])


class TreeTables(NamedTuple):
    """A tree as tensors.

    Args:
        depths: [T] depth of every column; 1 in the padding of the pass.
        sees: [T, T] which columns a column attends to: itself and its ancestors.
        children: [1 + K, C] columns of the children, 0 where there is none.
        family: [1 + K] place of a column among those that have children (0 where it has none).
    """

    depths: Tensor
    sees: Tensor
    children: Tensor
    family: Tensor


def tables(tree: TreeShape, width: int, device: torch.device) -> TreeTables:
    """The tree in a pass of ``width`` >= 1 + K columns; made once."""
    return _tables(tree, width, str(device))


@lru_cache(maxsize=64)
def _tables(tree: TreeShape, width: int, device: str) -> TreeTables:
    sees = [[column == other for other in range(width)] for column in range(width)]
    children: list[list[int]] = [[] for _ in range(tree.columns)]
    for column in range(1, width):
        parent = tree.parents[column - 1] if column < tree.columns else 0
        sees[column] = [own or above for own, above in zip(sees[column], sees[parent], strict=True)]
        if column < tree.columns:
            children[parent].append(column)
    most = max(tree.counts)
    family = [tree.families.index(column) if tree.counts[column] else 0 for column in range(tree.columns)]
    with torch.inference_mode(False):
        return TreeTables(
            torch.tensor([*tree.depths, *[1] * (width - tree.columns)], device=device),
            torch.tensor(sees, device=device),
            torch.tensor([[*group, *[0] * (most - len(group))] for group in children], device=device),
            torch.tensor(family, device=device),
        )


def laid_out(step: Step, tree: TreeShape | None) -> tuple[Tensor, Tensor]:
    """Positions of the laws of a pass and which of them count: [B, W] of a chain's slots, [B, 1 + K] of a tree's columns."""
    if tree is None:
        return step.positions, step.active
    depths = tables(tree, tree.columns, step.positions.device).depths
    return step.positions[:, depths], step.active[:, depths]


def followed(law: Law, draft: Draft, path: Tensor | None) -> tuple[Law, Draft]:
    """What a chain along ``path`` [B, W - 1] would have been: laws [B, W, V] and guesses [B, W - 1].

    Raises:
        StrategyError: when the rule did not say which path it took.
    """
    if draft.tree is None:
        return law, draft
    if path is None:
        raise StrategyError("this rule judges chains of guesses, not trees")
    rows = torch.arange(len(path), device=path.device)[:, None]
    columns = torch.nn.functional.pad(path + 1, (1, 0))
    unfiltered = None if law.unfiltered is law.scores else law.unfiltered[rows, columns]
    ungreedy = None if law.ungreedy is None else law.ungreedy[rows, columns]
    chain = replace(draft, tokens=draft.tokens.gather(1, path), law=None, tree=None)
    return Law(law.scores[rows, columns], unfiltered, ungreedy), chain


def refuse_trees(drafters: Iterable[Any]) -> None:
    """Strategies that share a pass must all guess chains.

    Raises:
        StrategyError: when one of them guesses a tree.
    """
    if any(getattr(drafter, "tree", None) is not None for drafter in drafters):
        raise StrategyError("a tree of guesses has a pass of its own: it cannot share a batch with other strategies")


@lru_cache(maxsize=256)
def parents_of(tree: TreeShape, depth: int, device: torch.device) -> Tensor:
    """[f] the columns of this depth that have children."""
    with torch.inference_mode(False):
        return torch.tensor([column for column in tree.level(depth) if tree.counts[column]], device=device)


@lru_cache(maxsize=256)
def heads_of(tree: TreeShape, nodes: int, device: torch.device) -> Tensor:
    """[nodes] the parents' columns of the first nodes."""
    with torch.inference_mode(False):
        return torch.tensor(tree.parents[:nodes], device=device)
