"""Trees of guesses from a small model: the drafter, and any small AR model behind it."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from arsd.decoding.laws import Law, Laws
from arsd.decoding.noise import Purpose
from arsd.decoding.registry import register_drafter
from arsd.decoding.strategies import Setting
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import Draft, Step, Target, TreeDraftModel, Verdict
from arsd.errors import StrategyError


class TreeDrafter:
    """A static tree of guesses from a small model, level by level (EAGLE-1, arXiv 2401.15077, section 4.1).

    The children of a node are drawn one after another without replacement from q, the small model's law behind that node.

    Args:
        model: the small model, for ``batch`` rows.
        tree: the guesses of a round.
        laws: logits to laws, those of the target: q is cut and guided as p is.
        batch: rows.
        num_tokens: tokens per row.
        device: of all tensors.
        coupled: the children are instead the most likely ids of log q + G, with the Gumbel noise G that decides the token of
            that position: more of them are right under the seed-exact rule, and there is no law for any other.
    """

    def __init__(
        self,
        model: TreeDraftModel,
        tree: TreeShape,
        laws: Laws,
        batch: int,
        num_tokens: int,
        device: torch.device | str = "cpu",
        coupled: bool = False,
    ) -> None:
        self.model, self.tree, self.laws, self.coupled = model, tree, laws, coupled
        self.needs_law = not coupled
        self.read = [0] * batch  # committed tokens of each row that the model has seen
        self.rows = torch.arange(batch, device=device)[:, None]
        self.catch = torch.arange(catch_up_tokens(tree), device=device)
        self.tokens = torch.zeros(batch, num_tokens + len(self.catch), dtype=torch.int64, device=device)
        self.levels = [_Level(tree, depth, torch.device(device)) for depth in range(tree.depth)]

    def begin(self, target: Target) -> None:
        """The call begins."""
        self.model.begin(target)

    def propose(self, step: Step) -> Draft:
        """The tree: one pass of the small model for each of its levels."""
        logits = self._catch_up(step)
        tokens: list[Tensor] = []
        laws: list[Tensor] = []
        for depth, level in enumerate(self.levels):
            if depth:
                logits = self.model.extend_tree(tokens[-1], self.tree, depth, step.starts)
            law = self.laws(logits, step.positions[:, depth : depth + 1].expand(-1, logits.shape[2]))
            tokens.append(self._most_likely(step, law, level) if self.coupled else self._drawn(step, law, level))
            laws.append(law.probs)
        return Draft(torch.cat(tokens, 1), None if self.coupled else torch.cat(laws, 1), self.tree)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Keep the tokens for the small model to read; what was not committed is overwritten before it is read."""
        self.tokens[self.rows, step.positions] = verdict.tokens

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """``rows`` begin other pictures."""
        self.model.join(rows, pictures)
        for row in rows:
            self.read[row] = 0

    def _catch_up(self, step: Step) -> Tensor:
        """Logits [S, B, 1, V] behind the last committed token of every row."""
        device = self.tokens.device
        read, starts = torch.tensor([self.read, step.starts], device=device)
        fed = self.tokens[self.rows, (read[:, None] - 1 + self.catch).clamp_min(0)]
        logits = self.model.catch_up(fed, self.read, starts - read)
        self.read = list(step.starts)
        return logits[:, :, None]

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
        gumbel = step.token_gumbel(law.scores.shape[-1], law.scores.dtype)[:, level.depth : level.depth + 1]
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


@lru_cache(maxsize=256)
def parents_of(tree: TreeShape, depth: int, device: torch.device) -> Tensor:
    """[f] the columns of this depth that have children."""
    with torch.inference_mode(False):
        return torch.tensor([column for column in tree.level(depth) if tree.counts[column]], device=device)


def catch_up_tokens(tree: TreeShape) -> int:
    """Tokens that the small model reads before it drafts: the last one again, and all that a round can commit."""
    return tree.depth + 2


def draft_pass_tokens(tree: TreeShape) -> int:
    """The longest pass of :class:`SmallAR` under a tree."""
    return max(catch_up_tokens(tree), tree.columns)


class SmallAR:
    """A small autoregressive model that drafts: any :class:`arsd.decoding.types.Target` over the target's vocabulary.

    A level of a tree is drafted by one pass over all levels above it, in a pass that grows.

    Args:
        engine: the model with the condition of every picture; its longest pass takes :func:`draft_pass_tokens` tokens.
    """

    def __init__(self, engine: Target) -> None:
        self.engine = engine

    def begin(self, target: Target) -> None:
        """Read the condition of every picture."""
        batch = int(target.batch)  # type: ignore[attr-defined]
        self.engine.prefill([-self.engine.unread] * batch, 1)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.engine.device)
        self.rows = torch.arange(batch, device=self.engine.device)

    def catch_up(self, tokens: Tensor, read: list[int], columns: Tensor) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        lengths = torch.tensor(read, device=tokens.device)
        self.engine.rollback(lengths)
        logits = self.engine.forward(tokens, lengths, read)
        self.lengths, self.grown = lengths + columns, tokens.gather(1, columns[:, None])
        return logits[:, self.rows, columns]

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        self.grown = torch.cat([self.grown, tokens[:, None]], 1)
        self.engine.rollback(self.lengths)
        return self.engine.forward(self.grown, self.lengths, self.lengths.tolist())[:, :, -1]

    def extend_tree(self, tokens: Tensor, tree: TreeShape, depth: int, starts: list[int]) -> Tensor:
        """See :class:`arsd.decoding.types.TreeDraftModel`."""
        self.grown = torch.cat([self.grown, tokens], 1)
        self.engine.rollback(self.lengths)
        logits = self.engine.forward(self.grown, self.lengths, starts, tree.head(self.grown.shape[1]))
        return logits[:, :, parents_of(tree, depth, logits.device)]

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.DraftModel`: read the conditions of ``rows`` while the others stand still."""
        self.engine.join(rows, pictures)
        starts = [-self.engine.unread if b in rows else n for b, n in enumerate(self.lengths.tolist())]
        self.engine.prefill(starts, 1)
        self.lengths[rows] = 0


@register_drafter("tree")
class TreeGuesses(TreeDrafter):
    """A tree of guesses from the call's own draft model.

    Args:
        setting: of the call; its ``draft_model`` is asked for passes of :func:`draft_pass_tokens`.
        shape: see :meth:`arsd.decoding.trees.TreeShape.parse`.

    Raises:
        StrategyError: for a bad shape, or where there is no draft model.
    """

    needs_law = True  # it can give q, and does for a rule that needs it
    trees = True

    def __init__(self, setting: Setting, shape: str = "3x2x1") -> None:
        tree = TreeShape.parse(shape)
        if setting.draft_model is None or setting.laws is None:
            raise StrategyError("drafter 'tree' needs a draft model: this pipeline has none")
        model = cast(TreeDraftModel, setting.draft_model(draft_pass_tokens(tree)))
        if not hasattr(model, "extend_tree"):
            raise StrategyError(f"drafter 'tree': {type(model).__name__} can draft chains only (it has no extend_tree)")
        coupled = not getattr(setting.rule, "needs_law", False)
        call = (setting.laws, setting.batch, setting.num_tokens, setting.device)
        super().__init__(model, tree, *call, coupled=coupled)
