"""Drafters: where guesses come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arsd.decoding.laws import Grammar, Law
from arsd.decoding.noise import Noise, Purpose
from arsd.decoding.options import one_of
from arsd.decoding.types import Draft, Step, Verdict

if TYPE_CHECKING:
    from arsd.decoding.strategies import Setting

Redraft = Callable[[Step, Law, Verdict], Tensor]
INITS = ("uniform", "left", "above", "previous-frame", "random")


def redraft_by_rule(step: Step, law: Law, verdict: Verdict) -> Tensor:
    """Go on with the token that the rule itself gave each slot (Gumbel fixed point, maximal coupling)."""
    return verdict.tokens


def redraft_by_gumbel(step: Step, law: Law, verdict: Verdict) -> Tensor:
    """argmax(log p + G) with noise fixed per position: SCD-GS (arXiv 2510.24211). Tests and residuals use other noise."""
    noise = step.token_gumbel(law.scores.shape[-1], law.scores.dtype)
    return (law.scores + noise).argmax(-1)


def redraft_independently(step: Step, law: Law, verdict: Verdict) -> Tensor:
    """A fresh draw from p in every slot: SJD as published (arXiv 2410.01699)."""
    behind = torch.arange(step.positions.shape[1], device=step.positions.device) >= verdict.count[:, None]
    return step.noise.categorical(law.probs, Purpose.REDRAFT, step.positions, step.iteration, step.active & behind)


def same_place(positions: Tensor, known: Tensor, frame_length: int) -> tuple[Tensor, Tensor]:
    """The latest position of the same place in a frame that lies below ``known``, and whether there is one.

    Args:
        positions: [B, K].
        known: [B, 1] positions below it are known.
        frame_length: tokens from one frame to the next; 0: there are no frames.

    Returns:
        Positions [B, K] (0 where there is none) and a mask [B, K].
    """
    if not frame_length:
        return torch.zeros_like(positions), torch.zeros_like(positions, dtype=torch.bool)
    back = (positions - known).div(frame_length, rounding_mode="floor").clamp_min(0) + 1
    source = positions - back * frame_length
    return source.clamp_min(0), source >= 0


class NoDraft:
    """Plain autoregressive decoding: no guesses."""

    needs_law = False

    def propose(self, step: Step) -> Draft:
        """No guess."""
        return Draft(step.positions[:, :0])

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Nothing to learn."""

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Nothing to forget."""


class Jacobi:
    """Jacobi iterates (SJD, arXiv 2410.01699, section 3): last pass's tokens are this pass's guesses.

    Guesses are kept by absolute position, never by slot. For a rule that needs it, the law recorded with a guess is always
    the one that it was drawn from: p of the last pass, or the initialiser's.

    Args:
        redraft: how slots behind the first refusal get their next guess.
        init: what a slot holds when it enters the window: ``uniform`` (drawn, and recorded as uniform over the allowed
            ids), ``random`` (the same draw recorded as a point mass, as released SJD code does), ``left`` or ``above`` (a
            copy of the neighbour), or ``previous-frame`` (a copy of the latest known token at the same place of a clip, see
            :func:`same_place`; drawn in the first frame). Forced positions start with the forced token.
        needs_law: keep draft laws.
        batch: rows.
        num_tokens: tokens per row.
        row_length: tokens per line of the picture.
        grammar: forced and allowed ids.
        noise: for the initial draws.
        given: [M, F] tokens that each picture begins with, or ``None``.
        frame_length: tokens from one frame of a clip to the next; 0 where there are no frames.

    Raises:
        StrategyError: for an unknown ``init``.
    """

    def __init__(
        self,
        redraft: Redraft,
        init: str,
        needs_law: bool,
        batch: int,
        num_tokens: int,
        row_length: int,
        window: int,
        grammar: Grammar,
        noise: Noise,
        device: torch.device | str = "cpu",
        given: Tensor | None = None,
        frame_length: int = 0,
    ) -> None:
        self.redraft, self.init, self.needs_law = redraft, one_of("init", init, INITS), needs_law
        self.num_tokens, self.row_length, self.grammar = num_tokens, row_length, grammar
        self.frame_length = frame_length
        self.noise = noise
        self.given = torch.zeros(batch, 0, dtype=torch.int64, device=device) if given is None else given
        self.guesses = torch.zeros(batch, num_tokens + window, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]
        self.entered = torch.zeros(batch, dtype=torch.int64, device=device)  # positions below it have been in a window
        self._start(list(range(batch)), list(range(batch)))
        self.last_law: tuple[Tensor, Tensor] | None = None  # (first position [B], p [B, W, V]) of the last pass

    @classmethod
    def of(cls, setting: Setting, redraft: Redraft, init: str, needs_law: bool, window: int | None = None) -> Jacobi:
        """For a call; ``window`` is the setting's own unless given."""
        size = setting.batch, setting.num_tokens, setting.row_length, window or setting.window
        where = setting.grammar, setting.noise, setting.device
        return Jacobi(redraft, init, needs_law, *size, *where, setting.given, setting.frame_length)

    def propose(self, step: Step) -> Draft:
        """Last pass's tokens, and initial ones for the slots that enter."""
        positions = step.positions[:, :-1]
        if self.init in ("left", "above", "previous-frame") and positions.shape[1]:
            self._copy_neighbours(positions)
        tokens = self.guesses[self.rows, positions]
        return Draft(tokens, self._recorded_law(positions, tokens) if self.needs_law else None)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Write the next guesses; remember p as their law."""
        committed = step.positions < lengths[:, None]
        tokens = torch.where(committed, verdict.tokens, self.redraft(step, law, verdict))
        live = step.width[:, None] > 0
        self.guesses[self.rows, step.positions] = torch.where(live, tokens, self.guesses[self.rows, step.positions])
        self.entered = torch.where(live[:, 0], torch.maximum(self.entered, step.positions[:, -1] + 1), self.entered)
        if self.needs_law:  # a row that still reads its condition has no law yet: its window lies out of reach
            self.last_law = (torch.where(live[:, 0], step.positions[:, 0], self.guesses.shape[1]), law.probs)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Initial guesses for the pictures that begin in ``rows``."""
        self._start(rows, pictures)
        if self.last_law is not None:
            self.last_law[0][rows] = self.guesses.shape[1]

    def _start(self, rows: list[int], pictures: list[int]) -> None:
        """Initial guesses behind what is given of ``pictures`` (of all, when nothing is)."""
        self.guesses[rows, : self.num_tokens] = self._initial(len(self.guesses))[rows]
        self.entered[rows] = first = self.given.shape[1]
        if first:
            self.guesses[rows, :first] = self.given[pictures]

    def _initial(self, batch: int) -> Tensor:
        """[B, N] drawn over the allowed ids; the forced token where there is one."""
        positions = torch.arange(self.num_tokens, device=self.guesses.device).expand(batch, -1)
        index = self.noise.integers(self.grammar.num_choices(positions), Purpose.INITIAL, positions)
        forced = self.grammar.forced_at(positions)
        return torch.where(forced >= 0, forced, self.grammar.choice(positions, index))

    def _copy_neighbours(self, positions: Tensor) -> None:
        fresh = positions >= self.entered[:, None]
        copies, known = self._neighbours(positions)
        fresh &= known & (self.grammar.forced_at(positions) < 0) & self._allowed(positions, copies)
        now = self.guesses[self.rows, positions]
        self.guesses[self.rows, positions] = torch.where(fresh, copies, now)

    def _neighbours(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What slots that enter copy, and whether there is anything to copy."""
        if self.init == "previous-frame":
            source, known = same_place(positions, self.entered[:, None], self.frame_length)
            return self.guesses[self.rows, source], known
        left = self.guesses[self.rows, (self.entered[:, None] - 1).clamp_min(0)].expand_as(positions)
        if self.init == "above" and self.row_length:
            above = self.guesses[self.rows, (positions - self.row_length).clamp_min(0)]
            left = torch.where(positions >= self.row_length, above, left)
        return left, positions > 0

    def _allowed(self, positions: Tensor, tokens: Tensor) -> Tensor:
        if self.grammar.allowed is None:
            return torch.ones_like(positions, dtype=torch.bool)
        group = self.grammar.group[positions.clamp_max(self.num_tokens - 1)]
        return self.grammar.allowed[group, tokens.expand_as(positions)]

    def _recorded_law(self, positions: Tensor, tokens: Tensor) -> Tensor:
        """q [B, K, V] of the guesses at ``positions``.

        p of the last pass where the slot was in its window; uniform where the slot enters now and ``init`` draws uniformly.
        Everything else (forced tokens, copies, guesses that sat out a smaller window) is a point mass: given the past it
        is a fixed token, and a point mass is a true account of that.
        """
        ids = torch.arange(self.grammar.vocab, device=positions.device)
        law = (ids == tokens[..., None]).double()
        if self.init == "uniform":
            drawn = (positions >= self.entered[:, None]) & (self.grammar.forced_at(positions) < 0)
            law = torch.where(drawn[..., None], self.grammar.uniform_law(positions), law)
        if self.last_law is None:
            return law
        first, p = self.last_law
        offset = positions - first[:, None]
        known = (offset >= 0) & (offset < p.shape[1])
        return torch.where(known[..., None], p[self.rows, offset.clamp(0, p.shape[1] - 1)].to(law.dtype), law)
