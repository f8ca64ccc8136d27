"""Trees of guesses from a draft model."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from arsd.decoding.chain import ModelDrafter
from arsd.decoding.laws import Law
from arsd.decoding.noise import Purpose
from arsd.decoding.registry import register_drafter
from arsd.decoding.strategies import Setting
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import Draft, Step, TreeDraftModel
from arsd.errors import StrategyError


@register_drafter("tree")
class TreeDrafter(ModelDrafter):
    """A static tree of guesses from the call's draft model, level by level (EAGLE-1, arXiv 2401.15077, section 4.1).

    The children of a node are drawn one after another without replacement from q, the draft model's law behind that node.
    For a rule that needs no q they are the most likely ids of log q + G, with the Gumbel noise G that decides the token of
    that position.

    Args:
        setting: of the call; needs ``laws`` and ``draft_model``.
        shape: see :meth:`arsd.decoding.trees.TreeShape.parse`.

    Raises:
        StrategyError: for a bad shape, or where there is no draft model that drafts trees.
    """

    trees = True

    def __init__(self, setting: Setting, shape: str | TreeShape = "3x2x1") -> None:
        self.tree = shape if isinstance(shape, TreeShape) else TreeShape.parse(shape)
        super().__init__(setting, self.tree.depth + 1, self.tree.columns)
        if not hasattr(self.model, "extend_tree"):
            raise StrategyError(f"drafter 'tree': {type(self.model).__name__} can draft chains only (it has no extend_tree)")
        self.levels = [_Level(self.tree, depth, torch.device(setting.device)) for depth in range(self.tree.depth)]

    def propose(self, step: Step) -> Draft:
        """The tree: one pass of the draft model for each of its levels."""
        model = cast(TreeDraftModel, self.model)
        logits = self.catch_up(step)[:, :, None]
        tokens: list[Tensor] = []
        laws: list[Tensor] = []
        broken = torch.zeros_like(step.active[:, 0])
        for depth, level in enumerate(self.levels):
            if depth:
                logits = model.extend_tree(tokens[-1], self.tree, depth)
            law = self.laws(logits, step.positions[:, depth : depth + 1].expand(-1, logits.shape[2]))
            tokens.append(self._drawn(step, law, level) if self.needs_law else self._most_likely(step, law, level))
            laws.append(law.probs)
            broken |= (~law.finite().all(1)) & step.active[:, depth]
        return Draft(torch.cat(tokens, 1), torch.cat(laws, 1) if self.needs_law else None, self.tree, broken)

    def _drawn(self, step: Step, law: Law, level: _Level) -> Tensor:
        """[B, n] tokens of the next level's nodes; where q has fewer ids than a node has children, any id for the rest."""
        weights, drawn = law.probs.double(), []
        at = step.positions[:, level.depth : level.depth + 1].expand(-1, weights.shape[1])
        alive = step.active[:, level.depth : level.depth + 1]
        for number in range(level.widest):
            active = alive & (level.counts > number) & (weights.sum(-1) > 0)
            key = level.first + number
            ids = step.noise.categorical(weights, Purpose.REDRAFT, at, step.iteration, active, key)
            weights = weights.scatter(-1, ids[..., None], 0.0)
            drawn.append(ids)
        return torch.stack(drawn, -1)[:, level.family, level.rank]

    def _most_likely(self, step: Step, law: Law, level: _Level) -> Tensor:
        gumbel = step.token_gumbel(law.scores.shape[-1], law.scores.dtype, slice(level.depth, level.depth + 1))
        best = (law.scores + gumbel).topk(min(level.widest, law.scores.shape[-1]), dim=-1).indices
        return best[:, level.family, level.rank.clamp_max(best.shape[-1] - 1)]


class _Level:
    """The children of the nodes of one depth, as tensors.

    ``counts`` [f] how many children each family has and ``first`` [f] which node of the next level is its first one;
    ``family`` [n] and ``rank`` [n] of the nodes of the next level.
    """

    def __init__(self, tree: TreeShape, depth: int, device: torch.device) -> None:
        families = [column for column in tree.level(depth) if tree.counts[column]]
        below = [tree.parents[column - 1] for column in tree.level(depth + 1)]
        self.depth, self.widest = depth, tree.widest(depth)
        self.counts = torch.tensor([tree.counts[column] for column in families], device=device)
        self.first = torch.tensor([below.index(column) for column in families], device=device)
        self.family = torch.tensor([families.index(parent) for parent in below], device=device)
        self.rank = torch.tensor([place - below.index(parent) for place, parent in enumerate(below)], device=device)
