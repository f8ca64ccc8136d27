"""Drafts of a small model: one guess after another, each drawn from the model's own law q (a chain)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arsd.decoding.drafters import Jacobi, redraft_by_rule
from arsd.decoding.laws import Law
from arsd.decoding.noise import Purpose
from arsd.decoding.strategies import Setting
from arsd.decoding.types import Draft, DraftModel, Step, Target, Verdict
from arsd.errors import StrategyError


class ChainDrafter:
    """Guesses of a draft model under the processors of the target (guidance, temperature, top-k, grammar).

    For a rule that needs q, a guess is a draw from q with noise of its own. For any other it is argmax(log q + G) with the
    target's own Gumbel noise, which meets argmax(log p + G) as often as q is like p.

    Args:
        setting: of the call; needs ``laws`` and ``draft_model``.
        length: guesses per pass; ``None`` fills the window.

    Raises:
        StrategyError: when there is no draft model, or ``length`` does not fit the window.
    """

    needs_law = True  # it can give q, and does for a rule that needs it

    def __init__(self, setting: Setting, length: int | None = None) -> None:
        if setting.draft_model is None or setting.laws is None:
            raise StrategyError("this pipeline has no drafter: load one as the component `drafter`, or use sjd")
        self.length = setting.window - 1 if length is None else length
        if not 0 <= self.length < setting.window:
            raise StrategyError(f"a window of {setting.window} has no room for {length} drafted tokens")
        self.laws, self.needs_law = setting.laws, bool(getattr(setting.rule, "needs_law", False))
        self.model: DraftModel = setting.draft_model(setting.window)
        self.window, self.num_tokens = setting.window, setting.num_tokens
        self.tokens = torch.zeros(
            setting.batch, setting.num_tokens + 2 * setting.window, dtype=torch.int64, device=setting.device
        )
        self.rows = torch.arange(setting.batch, device=setting.device)[:, None]
        self.read = [0] * setting.batch

    def begin(self, target: Target) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        self.model.begin(target)

    def propose(self, step: Step) -> Draft:
        """``length`` guesses of every row."""
        positions = step.positions[:, : self.length]
        if not self.length:
            return Draft(positions, self._empty(positions) if self.needs_law else None)
        logits = self._catch_up(step)
        laws: list[Law] = []
        tokens: list[Tensor] = []
        for j in range(self.length):
            if j:
                logits = self.model.extend(tokens[-1][:, 0])
            law = self.laws(logits[:, :, None], positions[:, j : j + 1])
            tokens.append(self._draw(step, law, j))
            laws.append(law)
        return Draft(torch.cat(tokens, dim=1), torch.cat([law.probs for law in laws], dim=1) if self.needs_law else None)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Remember the committed tokens."""
        taken = step.positions < lengths[:, None]
        here = self.tokens[self.rows, step.positions]
        self.tokens[self.rows, step.positions] = torch.where(taken & (step.width[:, None] > 0), verdict.tokens, here)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        for b in rows:
            self.read[b] = 0
        self.model.join(rows, pictures)

    def _catch_up(self, step: Step) -> Tensor:
        """Let the model read what was committed since its last guesses, in a pass of the window's width."""
        reading = set(step.reading)
        # a row of another strategy may be further ahead than a window: it gets no guesses from here, only junk
        first = [max(r, n - self.window + 1) for r, n in zip(self.read, step.starts, strict=True)]
        columns = [0 if b in reading else n - m for b, (n, m) in enumerate(zip(step.starts, first, strict=True))]
        offsets = torch.arange(self.window, device=self.tokens.device)
        index = torch.tensor(first, device=self.tokens.device)[:, None] - 1 + offsets
        logits = self.model.catch_up(
            self.tokens[self.rows, index.clamp_min(0)], [-1 if b in reading else m for b, m in enumerate(first)], columns
        )
        self.read = [
            r if b in reading else min(n + 1, self.num_tokens)
            for b, (r, n) in enumerate(zip(self.read, step.starts, strict=True))
        ]
        return logits

    def _draw(self, step: Step, law: Law, j: int) -> Tensor:
        """Guess j of every row [B, 1]."""
        at = slice(j, j + 1)
        if self.needs_law:
            active = step.active[:, at]
            return step.noise.categorical(law.probs, Purpose.REDRAFT, step.positions[:, at], step.iteration, active)
        noise = step.token_gumbel(law.scores.shape[-1], law.scores.dtype)[:, at]
        return (law.scores + noise).argmax(-1)

    def _empty(self, positions: Tensor) -> Tensor:
        return torch.zeros(*positions.shape, self.laws.grammar.vocab, dtype=torch.float64, device=positions.device)


class HybridDrafter:
    """A model's guesses at the front of the window, Jacobi iterates behind them. For rules that take any guess as it is.

    Args:
        setting: of the call.
        length: guesses of the model.
        init: what a Jacobi slot holds when it enters the window.
    """

    needs_law = False

    def __init__(self, setting: Setting, length: int = 4, init: str = "uniform") -> None:
        call = (setting.batch, setting.num_tokens, setting.row_length, setting.window, setting.grammar, setting.noise)
        self.front = ChainDrafter(replace(setting, rule=None), min(length, setting.window - 1))
        self.rest = Jacobi(redraft_by_rule, init, False, *call, setting.device)

    def begin(self, target: Target) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        self.front.begin(target)

    def propose(self, step: Step) -> Draft:
        """The model's guesses, then the iterates."""
        front, rest = self.front.propose(step).tokens, self.rest.propose(step).tokens
        return Draft(torch.cat([front, rest[:, front.shape[1] :]], dim=1))

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Both learn the outcome."""
        self.front.observe(step, law, verdict, lengths)
        self.rest.observe(step, law, verdict, lengths)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        self.front.join(rows, pictures)
        self.rest.join(rows, pictures)
