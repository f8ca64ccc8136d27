"""Guesses from the frame before: what stands still in a clip costs no pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module
from torch import Tensor

from arsd.decoding.drafters import same_place
from arsd.decoding.laws import Law
from arsd.decoding.model_strategies import check_length
from arsd.decoding.noise import Purpose
from arsd.decoding.options import one_of
from arsd.decoding.registry import register_drafter
from arsd.decoding.rules import SeedExact
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.types import Draft, FixedWindow, Parts, Step, Verdict

GUESSES = ("token", "law")


@register_drafter("frame-copy")
class FrameCopyDrafter:
    """What the latest frame that is known holds at the same place of a clip (in a picture: the row above).

    ``token`` copies the committed token; given what is committed it is a fixed token, and its law is that point mass.
    ``law`` copies the law p that the token was drawn from, and draws from it anew: with the noise of the position that is
    guessed, as a seed-exact rule does, or with noise of its own for a rule that needs q, which then is that p.
    Where there is no frame before, guesses are drawn evenly from the allowed ids.

    Args:
        setting: of the call; reads ``frame_length`` (``row_length`` where that is 0), ``given`` and ``rule``.
        guess: ``token`` or ``law``. ``law`` keeps a law for each place of a frame, [B, frame_length, V].

    Raises:
        StrategyError: for an unknown ``guess``.
    """

    needs_law = True  # it can give q, and does for a rule that needs it

    def __init__(self, setting: Setting, guess: str = "token") -> None:
        self.from_laws = one_of("guess", guess, GUESSES) == "law"
        self.needs_law = bool(getattr(setting.rule, "needs_law", False))
        self.length, self.grammar, self.given = setting.frame_length or setting.row_length, setting.grammar, setting.given
        self.first = 0 if self.given is None else self.given.shape[1]
        self.rows = torch.arange(setting.batch, device=setting.device)[:, None]
        shape = (setting.batch, setting.num_tokens + setting.window)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=setting.device)
        self.laws: Tensor | None = None  # log-weights [B, frame_length, V] of the latest token at each place
        self.heard = torch.zeros(setting.batch, max(1, self.length), dtype=torch.bool, device=setting.device)
        self.join(list(range(setting.batch)), list(range(setting.batch)))

    def propose(self, step: Step) -> Draft:
        """The guesses; all rows and places at once."""
        positions = step.positions[:, :-1]
        source, known = same_place(positions, step.positions[:, :1], self.length)
        spoken = torch.zeros_like(known)
        if self.laws is not None:
            place = positions % self.length
            spoken = known & self.heard[self.rows, place]
        tokens, forced = self.tokens[self.rows, source], self.grammar.forced_at(positions)
        if not self.needs_law:
            index = step.noise.integers(self.grammar.num_choices(positions), Purpose.INITIAL, positions)
            tokens = torch.where(known, tokens, self.grammar.choice(positions, index))
            if self.laws is not None and positions.shape[1]:
                scores = self.laws[self.rows, place]
                noisy = scores + step.token_gumbel(scores.shape[-1], scores.dtype, slice(0, -1))
                tokens = torch.where(spoken, noisy.argmax(-1), tokens)
            return Draft(torch.where(forced >= 0, forced, tokens))
        drawn = (spoken | ~known) & (forced < 0)
        law = self.grammar.uniform_law(positions)  # anew in every pass: a draw that is shown twice is no draw
        if self.laws is not None:
            law = torch.where(spoken[..., None], torch.softmax(self.laws[self.rows, place], dim=-1).to(law.dtype), law)
        fresh = step.noise.categorical(law, Purpose.REDRAFT, positions, step.iteration, drawn & step.active[:, :-1])
        tokens = torch.where(forced >= 0, forced, torch.where(drawn, fresh, tokens))
        ids = torch.arange(self.grammar.vocab, device=tokens.device)
        return Draft(tokens, torch.where(drawn[..., None], law, (ids == tokens[..., None]).to(law.dtype)))

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Keep what was committed, and its laws."""
        slots = torch.arange(step.positions.shape[1], device=lengths.device)
        taken = slots < verdict.count[:, None]
        last = self.tokens.shape[1] - 1
        place = torch.where(taken, step.positions, last)
        self.tokens[self.rows, place] = torch.where(taken, verdict.tokens, self.tokens[:, last:])
        if not self.from_laws or not self.length:
            return
        if self.laws is None:
            shape = (len(self.rows), self.length + 1, law.scores.shape[-1])  # the last place takes what is not committed
            self.laws = law.scores.new_zeros(shape)
            self.heard = torch.cat([self.heard, self.heard[:, :1]], dim=1)
        taken &= slots + self.length >= verdict.count[:, None]  # of a pass longer than a frame, the latest of a place
        place = torch.where(taken, step.positions % self.length, self.length)
        self.laws[self.rows, place] = law.scores
        self.heard[self.rows, place] = True

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """The rows begin other clips: nothing is known of them but what is given."""
        self.heard[rows] = False
        if self.given is not None:
            self.tokens[rows, : self.first] = self.given[pictures]


class FrameCopy(DecodingStrategy):
    """Copies of the frame before (:class:`FrameCopyDrafter`); lossless, seed-exact, and next to free.

    The plainest draft that knows time: it pays as far as a clip stands still. :class:`arsd.SJD` with
    ``init="previous-frame"`` begins with the same guesses and then improves on them.

    Args:
        draft_length: guesses per pass.
        guess: ``token`` (a copy) or ``law`` (a new draw from the law of the frame before, with the noise of its place).
        pass_tokens: tokens per pass, at least ``draft_length + 1``; ``None`` means that.

    Raises:
        StrategyError: for values that do not fit.
    """

    name = "frame-copy"

    @register_to_config
    def __init__(self, draft_length: int = 15, guess: str = "token", pass_tokens: int | None = None) -> None:
        check_length(draft_length, pass_tokens)
        one_of("guess", guess, GUESSES)

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        window, rule = self.config["draft_length"] + 1, SeedExact()
        drafter = FrameCopyDrafter(replace(setting, window=window, rule=rule), self.config["guess"])
        return Parts(drafter, rule, FixedWindow(window), self.config["pass_tokens"] or window)


STRATEGIES[FrameCopy.name] = FrameCopy
