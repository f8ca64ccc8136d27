"""Drafts of a small model: one guess after another, each drawn from the model's own law q (a chain)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arsd.decoding.drafters import Jacobi, redraft_by_rule
from arsd.decoding.laws import Law
from arsd.decoding.noise import Purpose
from arsd.decoding.options import number, whole
from arsd.decoding.strategies import Setting
from arsd.decoding.types import Draft, DraftModel, Seen, Step, Target, Verdict
from arsd.errors import StrategyError


class ModelDrafter:
    """What all drafters with a draft model share: it reads what was committed, then makes its guesses.

    Its laws are behind the processors of the target (guidance, temperature, top-k, grammar). For a rule that needs q, a
    guess is a draw from q with noise of its own. For any other the target's Gumbel noise G decides it: argmax(log q + G)
    meets argmax(log p + G) as often as q is like p.

    Args:
        setting: of the call; needs ``laws`` and ``draft_model``.
        window: slots of the target's pass, of which a round may commit all.
        widest: the longest pass of the draft model; ``None``: the window.

    Raises:
        StrategyError: when there is no draft model.
    """

    needs_law = True  # it can give q, and does for a rule that needs it

    def __init__(self, setting: Setting, window: int, widest: int | None = None) -> None:
        if setting.draft_model is None or setting.laws is None:
            raise StrategyError("this pipeline has no drafter: load one as the component `drafter`, or use sjd")
        self.laws, self.needs_law = setting.laws, bool(getattr(setting.rule, "needs_law", False))
        self.model: DraftModel = setting.draft_model(max(window, widest or window))
        self.window, self.num_tokens = window, setting.num_tokens
        size = setting.num_tokens + 2 * window + 1  # the last column takes what is not committed
        self.tokens = torch.zeros(setting.batch, size, dtype=torch.int64, device=setting.device)
        self.rows = torch.arange(setting.batch, device=setting.device)[:, None]
        self.given, self.first = setting.given, 0 if setting.given is None else setting.given.shape[1]
        self.read = [self.first] * setting.batch
        self._start(list(range(setting.batch)), list(range(setting.batch)))

    def begin(self, target: Target) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        self.model.begin(target)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Remember the committed tokens."""
        self.hear(Seen.of(step, law, verdict))

    def hear(self, seen: Seen) -> None:
        """Remember the committed tokens of several rounds."""
        place = torch.where(seen.taken, seen.positions, self.tokens.shape[1] - 1)  # which is read by nobody
        self.tokens.scatter_(1, place, seen.tokens)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        for b in rows:
            self.read[b] = self.first
        self._start(rows, pictures)
        self.model.join(rows, pictures)

    def _start(self, rows: list[int], pictures: list[int]) -> None:
        if self.given is not None:
            self.tokens[rows, : self.first] = self.given[pictures]

    def catch_up(self, step: Step) -> Tensor:
        """Let the model read what was committed since its last guesses; logits [S, B, V] of the next position."""
        reading = set(step.reading)
        # a row of another strategy may be further ahead than a window: it gets no guesses from here, only junk
        first = [max(r, n - self.window + 1) for r, n in zip(self.read, step.starts, strict=True)]
        columns = [0 if b in reading else n - m for b, (n, m) in enumerate(zip(step.starts, first, strict=True))]
        width = self.window
        if not self.needs_law:  # else rounding would let the neighbours of a row into its law, and into its picture
            width = min(width, 1 << max(columns).bit_length())  # few shapes: 1, 2, 4, ...
        offsets = torch.arange(width, device=self.tokens.device)
        index = torch.tensor(first, device=self.tokens.device)[:, None] - 1 + offsets
        known = [-1 if b in reading else m for b, m in enumerate(first)]
        logits = self.model.catch_up(self.tokens[self.rows, index.clamp_min(0)], known, columns)
        done = [min(n + 1, self.num_tokens) for n in step.starts]
        self.read = [r if b in reading else d for b, (r, d) in enumerate(zip(self.read, done, strict=True))]
        return logits


class ChainDrafter(ModelDrafter):
    """A chain of guesses.

    Args:
        setting: of the call; needs ``laws`` and ``draft_model``.
        length: guesses per pass; ``None`` fills the window.

    Raises:
        StrategyError: when there is no draft model, or ``length`` does not fit the window.
    """

    def __init__(self, setting: Setting, length: int | None = None) -> None:
        super().__init__(setting, setting.window)
        self.length = self.window - 1 if length is None else length
        if not 0 <= self.length < self.window:
            raise StrategyError(f"a window of {self.window} has no room for {length} drafted tokens")

    def propose(self, step: Step) -> Draft:
        """``length`` guesses of every row, or as many as this pass has room for."""
        length = min(self.length, step.positions.shape[1] - 1)
        positions = step.positions[:, :length]
        if not length:
            empty = torch.zeros(*positions.shape, self.laws.grammar.vocab, dtype=torch.float64, device=positions.device)
            return Draft(positions, empty if self.needs_law else None)
        logits = self.catch_up(step)
        laws: list[Law] = []
        tokens: list[Tensor] = []
        for j in range(length):
            if j:
                logits = self.model.extend(tokens[-1][:, 0])
            law = self.laws(logits[:, :, None], positions[:, j : j + 1])
            tokens.append(self._draw(step, law, j))
            laws.append(law)
        q = torch.cat([law.probs for law in laws], dim=1) if self.needs_law else None
        finite = torch.cat([law.finite() for law in laws], dim=1)
        return Draft(torch.cat(tokens, dim=1), q, broken=(~finite & step.active[:, :length]).any(1))

    def _draw(self, step: Step, law: Law, j: int) -> Tensor:
        """Guess j of every row [B, 1]."""
        at = slice(j, j + 1)
        if self.needs_law:
            active = step.active[:, at]
            return step.noise.categorical(law.probs, Purpose.REDRAFT, step.positions[:, at], step.iteration, active)
        scores = self._scores(step, law, j)
        return (scores + step.token_gumbel(scores.shape[-1], scores.dtype, at)).argmax(-1)

    def _scores(self, step: Step, law: Law, j: int) -> Tensor:
        """Log-weights [B, 1, V] of guess j, before the noise."""
        return law.scores


class HybridDrafter:
    """A model's guesses at the front of the window, Jacobi iterates behind them. For rules that take any guess as it is.

    What the target's last pass said of a position is seldom useless, even if it read a wrong token on the way. So the front
    is the arg-max of log p' + weight log q + G, where p' is the law of the last pass, if the position was in its window:
    with weight 0 that is the Jacobi iterate, with a large one the model's own guess.

    Args:
        setting: of the call.
        length: guesses of the model.
        weight: of the model's law against that of the last pass; ``None`` leaves out the latter.
        init: what a Jacobi slot holds when it enters the window.

    Raises:
        StrategyError: for a value out of range, or where there is no draft model.
    """

    needs_law = False

    def __init__(self, setting: Setting, length: int = 2, weight: float | None = 0.05, init: str = "uniform") -> None:
        whole("length", length, 1)
        if weight is not None:
            number("weight", weight, 0, otherwise=" or none")
        self.front = _Front(replace(setting, rule=None), min(length, setting.window - 1), weight)
        self.rest = Jacobi.of(setting, redraft_by_rule, init, False)

    def begin(self, target: Target) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        self.front.begin(target)

    def propose(self, step: Step) -> Draft:
        """The model's guesses, then the iterates."""
        front, rest = self.front.propose(step), self.rest.propose(step).tokens
        return Draft(torch.cat([front.tokens, rest[:, front.tokens.shape[1] :]], dim=1), broken=front.broken)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Both learn the outcome."""
        self.front.observe(step, law, verdict, lengths)
        self.rest.observe(step, law, verdict, lengths)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        self.front.join(rows, pictures)
        self.rest.join(rows, pictures)


class _Front(ChainDrafter):
    """A chain whose guesses also weigh what the target's last pass said of their positions."""

    LEAST = -20.0  # log q of an id that the model excludes, wrongly perhaps
    NOWHERE = 1 << 40  # the first position of a row without a last pass

    def __init__(self, setting: Setting, length: int, weight: float | None) -> None:
        super().__init__(setting, length)
        self.weight = weight
        self.last: tuple[Tensor, Tensor] | None = None  # (first position [B], log p [B, W, V]) of the last pass

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Remember the law as well."""
        super().observe(step, law, verdict, lengths)
        if self.weight is not None:
            self.last = (torch.where(step.width > 0, step.positions[:, 0], self.NOWHERE), law.log_probs)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Forget the law as well."""
        super().join(rows, pictures)
        if self.last is not None:
            self.last[0][rows] = self.NOWHERE

    def _scores(self, step: Step, law: Law, j: int) -> Tensor:
        if self.last is None or self.weight is None:
            return law.scores
        first, log_p = self.last
        offset = step.positions[:, j : j + 1] - first[:, None]
        known = (offset >= 0) & (offset < log_p.shape[1])
        before = log_p[self.rows, offset.clamp(0, log_p.shape[1] - 1)]
        mixed = before + self.weight * law.log_probs.clamp_min(self.LEAST)
        return torch.where(known[..., None], mixed, law.scores)
