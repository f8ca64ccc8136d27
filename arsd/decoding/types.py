"""The data that flows through the decoding loop. The guesses of a pass are a chain, or a tree of which one path is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from arsd.decoding.laws import Law
    from arsd.decoding.loop import DecodeResult
    from arsd.decoding.noise import Noise
    from arsd.decoding.trees import TreeShape


class Outcome(IntEnum):
    """How a committed token came about."""

    ACCEPTED = 0  # a draft that the rule took
    RESAMPLED = 1  # the rule's own token, where a draft was refused
    BONUS = 2  # drawn where there was no draft
    FORCED = 3  # the grammar leaves no choice
    RELAXED = 4  # a draft that only a relaxed rule took: a lossless one would have refused it with the same random numbers


@dataclass
class Draft:
    """Guesses for the positions that follow the last committed token.

    Args:
        tokens: [B, K]; guess j of a chain stands for position n + j, node j of a tree for n + depth - 1.
        law: [B, K, V] law q that each guess was really drawn from; ``None`` when the rule does not need it. Of a tree
            [B, F, V]: the law that the children of each column with children were drawn from, one after another without
            replacement; ``None`` means that every node is a fixed token.
        tree: which guess follows which, ``None`` for a chain.
        broken: [B] rows for whose guesses a draft model gave no law at all (NaN), which ends the call; ``None`` is no row.
    """

    tokens: Tensor
    law: Tensor | None = None
    tree: TreeShape | None = None
    broken: Tensor | None = None


@dataclass
class Verdict:
    """What a rule decided about one pass.

    Args:
        count: [B] tokens to commit, at least 1 in every active row.
        tokens: [B, W]; the first ``count`` are committed. A rule that judges every slot fills the rest as well, and a
            drafter may go on from there.
        outcome: [B, W] :class:`Outcome` of each slot.
        near_tie: [B, W] slots whose arg-max was decided by less than the stated margin, or ``None``.
        local_tv: [B, W] total variation between p and the law that the rule gives each slot when it is reached; ``None``
            of a lossless rule.
        path: [B, W - 1] accepted nodes of a tree, one per depth (anything behind the last one), ``None`` for a chain.
            W - 1 is the depth of the tree: a verdict on a tree is the chain that was taken of it.
    """

    count: Tensor
    tokens: Tensor
    outcome: Tensor
    near_tie: Tensor | None = None
    local_tv: Tensor | None = None
    path: Tensor | None = None


@dataclass
class Step:
    """Where every row stands in this round; rebuilt once per pass.

    Args:
        positions: [B, W] absolute image positions of the window's slots.
        width: [B] slots that may be committed: clipped exactly at the end of the image, 0 in a row that is finished or still
            reads its condition.
        iteration: [B] passes this row has seen, which keys the noise of tests, residuals and redrafts.
        active: [B, W] slots below ``width``.
        starts: first position of every row, on the host.
        reading: rows that still read their condition and the given tokens, on the host.
        noise: the random choices.
    """

    positions: Tensor
    width: Tensor
    iteration: Tensor
    active: Tensor
    starts: list[int]
    reading: list[int]
    noise: Noise

    def token_gumbel(self, vocab: int, dtype: torch.dtype, slots: slice = slice(None)) -> Tensor:
        """The canonical Gumbel noise [B, W, vocab] of the window's positions, or of some of its slots."""
        self.noise.prepare(self.starts, self.positions.shape[1], vocab, dtype)
        return self.noise.token_gumbel(self.positions[:, slots], vocab, dtype)


@dataclass
class Seen:
    """What rounds committed, for drafters that are told later.

    Args:
        positions: [B, n] places of the slots of these rounds, in order.
        tokens: [B, n] what the rule gave them.
        taken: [B, n] whether it was committed.
        scores: [B, m, V] log-weights of the target law in the last m > 0 slots, before a greedy one is made of them;
            ``None`` for a drafter that does not say ``hears_laws``.
    """

    positions: Tensor
    tokens: Tensor
    taken: Tensor
    scores: Tensor | None

    @classmethod
    def of(cls, step: Step, law: Law, verdict: Verdict) -> Seen:
        """One round."""
        slots = torch.arange(step.positions.shape[1], device=step.positions.device)
        return cls(step.positions, verdict.tokens, slots < verdict.count[:, None], law.before_greedy)


class Drafter(Protocol):
    """Where guesses come from. Its state lives in the object, which belongs to one call.

    A drafter that reads the target (its features, its weights) also has ``begin(target)``, called once before the prefill.
    One that can learn what the rounds of other drafters brought in one go, before its next guesses, has ``hear(seen)`` for a
    :class:`Seen`, in the class that has its ``observe`` (with laws, if that says ``hears_laws = True``); others are told
    after each round.
    """

    needs_law: bool

    def propose(self, step: Step) -> Draft:
        """Guesses for the window's slots but the last."""
        ...

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Learn the outcome; ``lengths`` [B] are the committed lengths after this pass."""
        ...

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Forget what is known of ``rows``: they begin other pictures. The noise has joined them already."""
        ...


class Rule(Protocol):
    """When a guess is taken.

    Optional: ``bind(setting)``, called once with the :class:`arsd.decoding.Setting` of the call before its first pass, for
    what a rule makes of the codebook, the batch or the length of a picture; a rule that remembers anything between passes
    has ``join(rows, pictures)`` too, as drafters have.
    """

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """Judge the drafts of one pass under the target law."""
        ...


class Target(Protocol):
    """The big model behind the loop; owns its cache and the condition of every picture.

    Lengths count known tokens: those that are given with the picture, and those that were committed. A row whose length
    is below ``first`` still has to read; a negative length -k says that k condition slots of it lie before the pass that
    would give the first token.
    """

    vocab: int
    device: torch.device
    dtype: torch.dtype
    unread: int  # condition slots that are read before the first token's pass
    first: int  # tokens of each picture that are given
    active: Sequence[int]  # rows that are not finished; told by the loop before each pass

    def prefill(self, starts: list[int], pass_tokens: int) -> int:
        """Let rows with a length below ``first`` read; the others stay as they are. Returns the passes taken."""
        ...

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int], tree: TreeShape | None = None) -> Tensor:
        """One pass over [last committed token, drafts, padding] = ``tokens`` [B, T]; logits [S, B, T, V].

        ``lengths`` [B] (``starts`` on the host) are the known lengths. Where a row's length is not above ``first``, its
        condition and given tokens are fed in the place of its first columns. With a ``tree`` every column sees its
        ancestors only, except in a row whose length is below ``first``: all that it feeds is to be read. A target that
        takes no tree need not have the argument, nor :meth:`compact`.
        """
        ...

    def compact(self, path: Tensor, count: Tensor) -> None:
        """After the pass of a tree: the accepted nodes go where a chain would have put them.

        Args:
            path: [B, D] accepted node of each depth.
            count: [B] committed tokens; ``count - 1`` of the nodes are kept, none where it is 0.
        """
        ...

    def rollback(self, lengths: Tensor) -> None:
        """Keep the cache up to the last token but one of each row; the rest is forgotten without a copy."""
        ...

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Give ``rows`` the conditions of other pictures; what the cache holds of these rows is forgotten."""
        ...


class DraftModel(Protocol):
    """A small model that gives guesses one after another; it owns its cache. Lengths are those of the target."""

    def begin(self, target: Target) -> None:
        """The call begins; a model that reads the target's features says so here."""
        ...

    def catch_up(self, tokens: Tensor, read: list[int], columns: list[int]) -> Tensor:
        """Read committed tokens; logits [S, B, V] of the position behind each row's last one.

        Args:
            tokens: [B, T]; row b holds tokens ``read[b] - 1``, ``read[b]``, ... of its picture (the condition stands for
                token -1), and junk behind the last committed one.
            read: the first of these numbers plus one, on the host: what the model knows of a row lies before it. -1: the
                row has nothing to read yet, and its logits are not used.
            columns: column of each row's last committed token, on the host.
        """
        ...

    def extend(self, tokens: Tensor) -> Tensor:
        """Read one guess more of every row [B]; logits [S, B, V] of the position behind it."""
        ...

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """``rows`` begin other pictures."""
        ...


class TreeDraftModel(DraftModel, Protocol):
    """A small model that can read several guesses for the same position."""

    def extend_tree(self, tokens: Tensor, tree: TreeShape, depth: int) -> Tensor:
        """Read the nodes of one level after those of all levels above it, which follow a :meth:`catch_up`.

        Args:
            tokens: [B, n] tokens of the columns ``tree.level(depth)``.
            tree: which node follows which; each sees its ancestors only.
            depth: 1, 2, ... up to ``tree.depth - 1``.

        Returns:
            Logits [S, B, f, V] of the position behind each node of the level that has children.
        """
        ...


class Controller(Protocol):
    """How many guesses to make.

    Optional: ``pass_tokens()``, called after ``window()``: tokens of this pass, at least the window (or the columns of the
    tree that the drafter makes in it) and at most ``Parts.pass_tokens``, which is what a pass takes without it; and
    ``pulls()``: rounds of each arm, for ``DecodeStats.arms``, where it chooses among strategies; and ``arm``, the name of
    the one that it chose last, for :class:`Round`.
    """

    def window(self) -> int:
        """Slots of the next pass: the last committed token and the guesses after it."""
        ...

    def observe(self, counts: list[int], seconds: float) -> None:
        """Learn how many tokens each active row committed, and what the pass cost."""
        ...


@dataclass
class FixedWindow:
    """The same window in every pass."""

    size: int

    def window(self) -> int:
        """The fixed size."""
        return self.size

    def observe(self, counts: list[int], seconds: float) -> None:
        """Nothing to learn."""


@dataclass
class Parts:
    """One combination of parts, made by a strategy for one call."""

    drafter: Drafter
    rule: Rule
    controller: Controller
    pass_tokens: int

    def width(self) -> int:
        """Tokens of the next pass, after ``controller.window()``."""
        asked = getattr(self.controller, "pass_tokens", None)
        return self.pass_tokens if asked is None else int(asked())


@dataclass
class Round:
    """One pass of one call (host tensors): see :class:`Draft` and :class:`Verdict`.

    Args:
        positions: [B, W] places of the slots.
        drafts: [B, W - 1] guesses; of a tree, those along the path that was taken.
        tokens: [B, W] what the rule gave each slot.
        outcome: [B, W] :class:`Outcome` of each slot.
        counts: how many of these tokens each row committed.
        pictures: which picture each row held.
        arm: the strategy that decoded the round, where the controller chooses among several.
    """

    positions: Tensor
    drafts: Tensor
    tokens: Tensor
    outcome: Tensor
    counts: list[int]
    pictures: list[int]
    arm: str = ""


OnRound = Callable[[Round], bool | None]


@dataclass
class DecodeRequest:
    """What to decode.

    Args:
        num_tokens: N, tokens per picture, or one number for each picture.
        given: [M, F] tokens that each picture begins with (F < N); they are read, not decoded, and returned with the others.
        end_tokens: ids that end a picture (or text) where they are committed.
        row_length: tokens per line of the picture, for the spatial initialisers.
        recheck: decide tokens whose best two scores lie nearer than this again (:func:`arsd.decoding.recheck.recheck`).
        log_probs: also return each token's log-probability and the entropy of its law.
        trace: also return every :class:`Round`.
        on_round: called after each pass with its :class:`Round`; returns ``True`` to stop the call after this pass. What it
            does is in no one's seconds: neither in those of the figures nor in those that a controller is told.
        on_commit: called after each pass, behind ``on_round``, with the number of newly committed tokens and the tokens so
            far [M, N]; returns ``True`` to stop.
        pictures: how many to decode; ``None`` means one per row. Rows that finish take the next one of those that wait.
        on_picture: called with (picture, :class:`arsd.decoding.loop.DecodeResult` of it alone) when a picture is finished,
            while others go on; in no one's seconds either.
    """

    num_tokens: int | Sequence[int]
    row_length: int = 0
    given: Tensor | None = None
    end_tokens: Sequence[int] = ()
    recheck: float | None = None
    log_probs: bool = False
    trace: bool = False
    on_commit: Callable[[int, Tensor], bool] | None = field(default=None, repr=False)
    pictures: int | None = None
    on_picture: Callable[[int, DecodeResult], None] | None = field(default=None, repr=False)
    on_round: OnRound | None = field(default=None, repr=False)
