"""A drafter for enumeration: guesses drawn one after another from the laws of a second table model, with their true q."""

from __future__ import annotations

import torch
from torch import Tensor

from arsd.decoding import Draft, Law, Laws, Parts, Purpose, Setting, Step, Verdict
from arsd.decoding.registry import bound
from arsd.decoding.types import FixedWindow
from arsd.exactness.guard import GuardedDrafter, GuardedRule, MakeRule
from arsd.exactness.tables import Build, TableTarget, World


class TableDrafter:
    """A small AR model that drafts a chain: guess j is drawn from q given the committed tokens and guesses 0 .. j - 1.

    Args:
        setting: of the call.
        world: its model; it has the ids, tokens and sampling options of this world, which need not be the target's.
    """

    needs_law = True

    def __init__(self, setting: Setting, world: World) -> None:
        self.world, self.laws = world, Laws(world.config, world.grammar())
        self.model: TableTarget = world.target(1)
        self.tokens = torch.zeros(setting.batch, world.num_tokens + 1, dtype=torch.int64)  # the last column: spill

    def propose(self, step: Step) -> Draft:
        """A chain of guesses and the law that each was drawn from."""
        known = torch.arange(self.tokens.shape[1]) < step.positions[:, :1]
        number = torch.zeros_like(step.width)  # of the prefix, in base V
        for n in range(self.world.num_tokens):
            number = torch.where(known[:, n], number * self.world.vocab + self.tokens[:, n], number)
        guesses, laws = [], []
        for j in range(step.positions.shape[1] - 1):
            at, active = step.positions[:, j : j + 1], step.active[:, j : j + 1]
            q = self._law(at, number)
            guess = step.noise.categorical(q, Purpose.REDRAFT, at, step.iteration, active)
            number = number * self.world.vocab + guess[:, 0]
            guesses.append(guess)
            laws.append(q)
        if not guesses:
            return Draft(step.positions[:, :0], torch.zeros(len(number), 0, self.world.vocab, dtype=torch.float64))
        return Draft(torch.cat(guesses, dim=1), torch.cat(laws, dim=1))

    def _law(self, at: Tensor, number: Tensor) -> Tensor:
        """q [B, 1, V] behind the prefix ``number`` [B] of length ``at`` [B, 1]; anything past the end."""
        position = at[:, 0].clamp_max(self.world.num_tokens)
        row = self.model.offsets[position] + torch.where(position < self.world.num_tokens, number, 0)
        return self.laws(self.model.flat[:, row][:, :, None], at).probs

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Keep the committed tokens."""
        place = torch.where(step.positions < lengths[:, None], step.positions, self.world.num_tokens)
        self.tokens.scatter_(1, place, verdict.tokens)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Begin other pictures."""
        self.tokens[rows] = 0


def rule_under_table(make_rule: MakeRule, draft: World, window: int, controller: type | None = None) -> Build:
    """The rule on trial, under the chains of a table model.

    Args:
        make_rule: makes the rule.
        draft: the model that drafts.
        window: slots per pass.
        controller: makes the controller; the window is fixed without.
    """

    def build(setting: Setting) -> Parts:
        drafter = GuardedDrafter(TableDrafter(setting, draft), setting.grammar.vocab)
        rule = GuardedRule(bound(make_rule(), setting))
        return Parts(drafter, rule, FixedWindow(window) if controller is None else controller(), window)

    return build
