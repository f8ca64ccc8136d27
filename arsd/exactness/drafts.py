"""A drafter for enumeration: chains of guesses from the laws of a second table model, with their true q."""

from __future__ import annotations

from dataclasses import replace

from arsd.decoding import Laws, Parts, Setting
from arsd.decoding.chain import ChainDrafter
from arsd.decoding.registry import bound
from arsd.decoding.rules import RejectionSampling
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.types import FixedWindow
from arsd.exactness.guard import GuardedDrafter, GuardedRule, MakeRule
from arsd.exactness.tables import Build, World


def rule_under_table(make_rule: MakeRule, draft: World, window: int, controller: type | None = None) -> Build:
    """The rule on trial, under the chains of a table model, which are drawn from q whether the rule asks for q or not.

    Args:
        make_rule: makes the rule.
        draft: the model that drafts, with its own sampling options and grammar.
        window: slots per pass.
        controller: makes the controller; the window is fixed without.
    """

    def build(setting: Setting) -> Parts:
        laws, model = Laws(draft.config, draft.grammar()), draft.target(setting.batch)
        call = replace(setting, window=window, rule=RejectionSampling(), laws=laws)
        call.draft_model = lambda pass_tokens: SmallARDrafter(model, pass_tokens)
        drafter = GuardedDrafter(ChainDrafter(call), setting.grammar.vocab)
        rule = GuardedRule(bound(make_rule(), setting))
        return Parts(drafter, rule, FixedWindow(window) if controller is None else controller(), window)

    return build
