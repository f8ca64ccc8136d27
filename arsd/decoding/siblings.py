"""Rules for trees of guesses: at every node at most one child is taken, and the walk goes on from it.

``p`` is the target law of a node, ``q`` the law that its children were drawn from, one after another without replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.noise import Purpose
from arsd.decoding.rules import NEAR_TIE, SeedExact, acceptance_test, decided
from arsd.decoding.trees import TreeShape, TreeTables, tables
from arsd.decoding.types import Draft, Outcome, Step, Verdict
from arsd.errors import StrategyError

Schedule = float | Sequence[float] | Tensor | Callable[[int], Sequence[float] | Tensor]


class SiblingSampling:
    """Recursive rejection sampling without replacement (Jeon et al. 2024, arXiv 2402.14160): the first accepted sibling.

    At a node with R_0 = p and Q_0 = q, child j = 1, 2, ... with token x is taken with probability
    min(1, omega R_{j-1}(x) / Q_{j-1}(x)); refused, it leaves R_j = norm([R_{j-1} - min(Q_{j-1}, omega R_{j-1})]_+) and
    Q_j = Q_{j-1} without x, renormalised. When all are refused the token is drawn from the last R, at a leaf from p. A child
    of no probability in Q_{j-1} (q has fewer ids than the node children) does not exist. Without a law of the draft each
    child is a fixed token: Q_{j-1} is its point mass.

    With omega = 1 lossless; a chain is a tree. Otherwise the relaxation of COOL-SD (arXiv 2601.09212, equation for f_i) with
    one omega per depth, and the verdict's ``local_tv`` is the sum over siblings j of the probability, given the tokens
    drawn, that j is tested times sum([min(Q_{j-1}, omega R_{j-1}) - R_{j-1}]_+). Its expectation over the draws bounds the
    total variation between the node's output and p from above; with one child it is equal to it.

    Args:
        omega: one number, one for each depth 1, 2, ... of the guesses, or a function of the tree's depth that gives them.

    Raises:
        StrategyError: for an omega that is no positive number, or too few of them for the tree (when it is first used).
    """

    needs_law = True
    trees = True

    def __init__(self, omega: Schedule = 1.0) -> None:
        self.omega = omega
        self._omegas: dict[int, list[float]] = {}

    def omegas(self, depth: int) -> list[float]:
        """The omega of each depth of a tree."""
        if depth not in self._omegas:
            given = self.omega(depth) if callable(self.omega) else self.omega
            numbers = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
            if not callable(self.omega) and len(numbers) == 1:
                numbers *= depth
            if len(numbers) < depth or not all(0 < number < float("inf") for number in numbers):
                raise StrategyError(f"omega needs {depth} positive numbers, one for each depth of the tree, not {numbers}")
            self._omegas[depth] = numbers[:depth]
        return self._omegas[depth]

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        walk = _Walk(step, draft)
        p, batch = law.probs, torch.arange(len(law.probs), device=law.probs.device)
        omegas = self.omegas(walk.depth)
        relaxed = max(omegas, default=1.0) > 1
        last = torch.zeros_like(p[:, 0], dtype=torch.float64)  # what the token behind the accepted path is drawn from
        local_tv = torch.zeros(step.positions.shape, dtype=torch.float64, device=p.device)
        tested = torch.zeros_like(walk.going)  # whether the node where the walk ended had a child
        for depth in range(walk.depth + 1):
            reached = walk.going
            rest = p[batch, walk.at].double()
            if depth < walk.depth:
                q = None if draft.law is None else draft.law[batch, walk.tables.family[walk.at]].double()
                node = _Node(step, depth, omegas[depth], rest, q)
                for number in range(walk.tree.widest(depth)):
                    child, token = walk.child(number)
                    walk.take(node.test(token, child > 0, reached & walk.here, number), child)
                rest = node.rest
                tested = torch.where(reached, node.tested, tested)
                if relaxed:
                    local_tv[:, depth] = torch.where(reached, node.local_tv, 0.0)
                    walk.relaxed[:, depth] = node.relaxed
            else:
                tested = torch.where(reached, False, tested)
            last = torch.where(reached[:, None], rest, last)
            walk.descend()
        slot = walk.accepted[:, None]
        at, active = step.positions.gather(1, slot), step.active.gather(1, slot)
        fresh = step.noise.categorical(last[:, None], Purpose.RESIDUAL, at, step.iteration, active)
        return walk.verdict(walk.tokens.scatter(1, slot, fresh), tested, local_tv=local_tv if relaxed else None)


class SeedExactTree:
    """The Gumbel fixed point on a tree (see :class:`arsd.decoding.rules.SeedExact`): equal to plain AR token for token.

    At every node the token is argmax(log p + G); the child that is this token is taken. Any guesses will do. The promise is
    for float64: a column of a tree sums its attention over slots that lie elsewhere than a chain's, so in bfloat16 a picture
    can part from plain AR at a near-tie even where both have one pass shape.
    """

    trees = True

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        if draft.tree is None:  # which also gives the slots behind the first refusal their tokens
            return SeedExact().verify(step, law, draft)
        walk = _Walk(step, draft)
        vocab, dtype = law.scores.shape[-1], law.scores.dtype
        tokens, margin = decided(law, lambda: step.token_gumbel(vocab, dtype)[:, walk.tables.depths])
        near_tie = margin < NEAR_TIE
        batch = torch.arange(len(tokens), device=tokens.device)
        tested = torch.zeros_like(walk.going)
        for depth in range(walk.depth):
            tested = torch.where(walk.going, walk.tables.children[walk.at, 0] > 0, tested)
            wanted = tokens[batch, walk.at]
            for number in range(walk.tree.widest(depth)):
                child, token = walk.child(number)
                walk.take((child > 0) & (token == wanted) & walk.here, child)
            walk.descend()
        tested &= ~walk.going
        columns = torch.nn.functional.pad(walk.path + 1, (1, 0))
        return walk.verdict(tokens.gather(1, columns), tested, near_tie.gather(1, columns))


class _Walk:
    """One path down the tree in every row. Columns are those of a pass: 0 is the last committed token."""

    def __init__(self, step: Step, draft: Draft) -> None:
        self.step, self.guesses = step, draft.tokens
        self.tree: TreeShape = draft.tree or TreeShape.chain(draft.tokens.shape[1])
        self.chain, self.depth = draft.tree is None, self.tree.depth
        self.tables: TreeTables = tables(self.tree, self.tree.columns, step.positions.device)
        self.at = torch.zeros_like(step.width)
        self.next = torch.zeros_like(self.at)
        self.level = 0
        self.going = step.active[:, 0]
        self.accepted = torch.zeros_like(self.at)
        self.path = torch.zeros_like(step.positions[:, 1:])
        self.tokens = torch.zeros_like(step.positions)
        self.relaxed = torch.zeros_like(step.active)

    @property
    def here(self) -> Tensor:
        """[B] rows that stand at a node of this level and have taken no child of it yet."""
        return self.going & (self.next == 0)

    def child(self, number: int) -> tuple[Tensor, Tensor]:
        """Column [B] of the ``number``-th child of where each row stands (0: there is none), and its token [B]."""
        child = self.tables.children[self.at, number]
        return child, self.guesses.gather(1, (child - 1).clamp_min(0)[:, None])[:, 0]

    def take(self, taken: Tensor, child: Tensor) -> None:
        """Rows ``taken`` go on to ``child``."""
        self.next = torch.where(taken, child, self.next)

    def descend(self) -> None:
        """On to the children that were taken; the other rows end here."""
        if self.level < self.depth:
            moved = self.next > 0
            node = (self.next - 1).clamp_min(0)
            self.path[:, self.level] = node
            self.tokens[:, self.level] = self.guesses.gather(1, node[:, None])[:, 0]
            self.accepted = self.accepted + moved
            self.at, self.level = torch.where(moved, self.next, self.at), self.level + 1
            self.going = moved & self.step.active[:, self.level]
            self.next = torch.zeros_like(self.next)

    def verdict(
        self, tokens: Tensor, tested: Tensor, near_tie: Tensor | None = None, local_tv: Tensor | None = None
    ) -> Verdict:
        """Commit the path and one token more, never beyond the end of the image."""
        slots, accepted = torch.arange(tokens.shape[1], device=tokens.device), self.accepted[:, None]
        taken = torch.where(self.relaxed, int(Outcome.RELAXED), int(Outcome.ACCEPTED))
        outcome = torch.where(slots < accepted, taken, int(Outcome.BONUS))
        outcome = torch.where((slots == accepted) & tested[:, None], int(Outcome.RESAMPLED), outcome)
        count = torch.minimum(self.accepted + 1, self.step.width)
        return Verdict(count, tokens, outcome, near_tie, local_tv, None if self.chain else self.path)


class _Node:
    """The children of the node where each row stands, tested one after another; all [B] or [B, V], in float64."""

    def __init__(self, step: Step, depth: int, omega: float, p: Tensor, q: Tensor | None) -> None:
        self.step, self.depth, self.omega = step, depth, omega
        self.rest, self.q = p, q  # R_{j-1} and Q_{j-1}
        self.tested = torch.zeros(len(p), dtype=torch.bool, device=p.device)
        self.reach = torch.ones(len(p), dtype=torch.float64, device=p.device)
        self.local_tv = torch.zeros_like(self.reach)
        self.relaxed = torch.zeros_like(self.tested)  # whether the child taken would not have been with omega = 1

    def test(self, token: Tensor, exists: Tensor, here: Tensor, number: int) -> Tensor:
        """Whether child ``number`` is taken, in the rows ``here``; what is left of R and Q when it is not."""
        place, step, now = token[:, None], self.step, slice(self.depth, self.depth + 1)
        q = torch.zeros_like(self.rest).scatter_(1, place, 1.0) if self.q is None else self.q
        q_x = q.gather(1, place)[:, 0]
        exists = exists & (q_x > 0)
        rest_x = self.rest.gather(1, place)[:, 0]
        chance = (self.omega * rest_x / q_x).clamp_max(1.0)
        asked = (here & exists)[:, None]
        strict = (rest_x / q_x)[:, None] if self.omega > 1 else None
        taken, relaxed = acceptance_test(step, now, chance[:, None], strict, asked, number)
        if relaxed is not None:
            self.relaxed = self.relaxed | (relaxed & asked)[:, 0]
        delivered = torch.minimum(q, self.omega * self.rest)
        self.local_tv += torch.where(exists, self.reach * (delivered - self.rest).clamp_min(0).sum(-1), 0.0)
        self.reach = torch.where(exists, self.reach * (1 - chance), self.reach)
        left = (self.rest - delivered).clamp_min(0)
        mass = left.sum(-1)
        self.rest = torch.where((exists & (mass > 0))[:, None], left / mass[:, None], self.rest)
        if self.q is not None:
            others = q.scatter(1, place, 0.0)
            self.q = torch.where(exists[:, None], others / others.sum(-1, keepdim=True).clamp_min(1e-300), q)
        self.tested = self.tested | exists
        return (taken & asked)[:, 0]
