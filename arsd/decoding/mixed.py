"""Several strategies in one batch: every picture is decoded by its own one, and all of them share each forward pass.

The parts of each strategy see all rows, with a width of 0 where a row belongs to another strategy; what they say of those
rows is not used. That costs their arithmetic once per strategy, and nothing when the whole batch has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.strategies import DecodingStrategy, Setting
from arsd.decoding.trees import refuse_trees
from arsd.decoding.types import Draft, Outcome, Parts, Step, Target, Verdict


@dataclass
class MixedDraft(Draft):
    """The drafts of all strategies besides the one that is fed."""

    members: list[Draft] = field(default_factory=list)


@dataclass
class MixedVerdict(Verdict):
    """The verdicts of all strategies besides the one that counts."""

    members: list[Verdict] = field(default_factory=list)


class _Groups:
    """Which rows belong to which strategy, and the part of a pass that each strategy sees."""

    def __init__(self, members: list[Parts], group: Tensor, batch: int) -> None:
        self.members, self.group = members, group
        self.row_group = group[:batch].clone()
        self.windows = [0] * len(members)

    def rows(self, g: int) -> Tensor:
        """[B, 1] rows of strategy ``g``."""
        return (self.row_group == g)[:, None]

    def step(self, step: Step, g: int) -> Step:
        """The window of strategy ``g``, empty in the rows of others."""
        window = self.windows[g]
        width = torch.where(self.row_group == g, step.width.clamp_max(window), 0)
        active = step.active[:, :window] & self.rows(g)
        return replace(step, positions=step.positions[:, :window], width=width, active=active)

    def law(self, law: Law, g: int) -> Law:
        """The laws of that window."""
        window = self.windows[g]
        if window == law.scores.shape[1]:
            return law
        return Law(law.scores[:, :window], None, None if law.ungreedy is None else law.ungreedy[:, :window])


class MixedController:
    """The longest window of all strategies."""

    def __init__(self, groups: _Groups) -> None:
        self.groups = groups

    def window(self) -> int:
        """See :class:`arsd.decoding.types.Controller`."""
        self.groups.windows = [member.controller.window() for member in self.groups.members]
        return max(self.groups.windows)

    def observe(self, counts: list[int], seconds: float) -> None:
        """Every controller hears of the whole pass, which is what it costs."""
        for member in self.groups.members:
            member.controller.observe(counts, seconds)


class MixedDrafter:
    """Each row's own guesses, zeros behind them."""

    def __init__(self, groups: _Groups) -> None:
        self.groups = groups
        self.needs_law = any(member.drafter.needs_law for member in groups.members)

    def begin(self, target: Target) -> None:
        """Members that read the target may do so."""
        for member in self.groups.members:
            if hasattr(member.drafter, "begin"):
                member.drafter.begin(target)

    def propose(self, step: Step) -> MixedDraft:
        """See :class:`arsd.decoding.types.Drafter`."""
        groups = self.groups
        drafts = [member.drafter.propose(groups.step(step, g)) for g, member in enumerate(groups.members)]
        tokens = step.positions.new_zeros(len(step.positions), step.positions.shape[1] - 1)
        for g, draft in enumerate(drafts):
            part = tokens[:, : draft.tokens.shape[1]]
            part.copy_(torch.where(groups.rows(g), draft.tokens, part))
        broken = [draft.broken for draft in drafts if draft.broken is not None]  # of a strategy's own rows only
        return MixedDraft(tokens, broken=torch.stack(broken).any(0) if broken else None, members=drafts)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """See :class:`arsd.decoding.types.Drafter`."""
        assert isinstance(verdict, MixedVerdict)
        for g, member in enumerate(self.groups.members):
            member.drafter.observe(self.groups.step(step, g), self.groups.law(law, g), verdict.members[g], lengths)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """The rows belong to the strategies of their new pictures."""
        self.groups.row_group[rows] = self.groups.group[pictures]
        for member in self.groups.members:
            member.drafter.join(rows, pictures)


class MixedRule:
    """Each row's own verdict."""

    def __init__(self, groups: _Groups) -> None:
        self.groups = groups

    def verify(self, step: Step, law: Law, draft: Draft) -> MixedVerdict:
        """See :class:`arsd.decoding.types.Rule`."""
        assert isinstance(draft, MixedDraft)
        groups, verdicts = self.groups, []
        count, near_tie = torch.zeros_like(step.width), torch.zeros_like(step.active)
        local_tv = torch.zeros(step.active.shape, dtype=torch.float64, device=step.active.device)
        tokens, outcome = torch.zeros_like(step.positions), torch.full_like(step.positions, int(Outcome.BONUS))
        for g, member in enumerate(groups.members):
            verdict = member.rule.verify(groups.step(step, g), groups.law(law, g), draft.members[g])
            mine, width = groups.rows(g), verdict.tokens.shape[1]
            count = torch.where(mine[:, 0], verdict.count, count)
            tokens[:, :width] = torch.where(mine, verdict.tokens, tokens[:, :width])
            outcome[:, :width] = torch.where(mine, verdict.outcome, outcome[:, :width])
            if verdict.near_tie is not None:
                near_tie[:, :width] |= mine & verdict.near_tie
            if verdict.local_tv is not None:
                local_tv[:, :width] = torch.where(mine, verdict.local_tv.double(), local_tv[:, :width])
            verdicts.append(verdict)
        return MixedVerdict(count, tokens, outcome, near_tie, local_tv, members=verdicts)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Members that remember something forget these rows."""
        for member in self.groups.members:
            if hasattr(member.rule, "join"):
                member.rule.join(rows, pictures)


def build_parts(strategies: Sequence[DecodingStrategy], setting: Setting) -> Parts:
    """The parts of one call whose pictures may have different strategies; all share the longest pass.

    Args:
        strategies: one for all pictures, or one for each.
        setting: of the call.
    """
    names = list(dict.fromkeys(str(strategy) for strategy in strategies))
    members = [next(s for s in strategies if str(s) == name).build(setting) for name in names]
    if len(members) == 1:
        return members[0]
    refuse_trees(member.drafter for member in members)
    group = torch.tensor([names.index(str(strategy)) for strategy in strategies], device=setting.device)
    groups = _Groups(members, group, setting.batch)
    longest = max(member.pass_tokens for member in members)
    return Parts(MixedDrafter(groups), MixedRule(groups), MixedController(groups), longest)
