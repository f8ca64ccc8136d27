"""What stands around a rule or drafter on trial: its protocol is checked in every pass, and its partners try it hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import Draft, Law, Parts, Setting, Step, Verdict
from arsd.decoding.drafters import Jacobi, NoDraft, Redraft
from arsd.decoding.registry import bound
from arsd.decoding.rules import SeedExact
from arsd.decoding.siblings import SeedExactTree, SiblingSampling
from arsd.decoding.tree_drafter import TreeDrafter
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import Drafter, FixedWindow, Rule
from arsd.exactness.tables import Build
from arsd.exactness.tape import ChoiceTape
from arsd.plugins import one_line

MakeRule = Callable[[], Any]
MakeDrafter = Callable[[Setting], Any]


class ProtocolError(Exception):
    """A rule or drafter that returned something other than it promised."""


def _expect(what: str, value: Any, shape: tuple[int, ...], names: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise ProtocolError(f"{what} must be a tensor {names}, not {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ProtocolError(f"{what} must have the shape {names} = {list(shape)}, not {list(value.shape)}")
    if value.dtype not in dtypes:
        raise ProtocolError(f"{what} must be {' or '.join(str(d) for d in dtypes)}, not {value.dtype}")


def _expect_ids(what: str, ids: Tensor, vocab: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ProtocolError(
            f"{what} must be ids in 0..{vocab - 1}, also where they do not count, not {_outside(ids, vocab)}"
        )


def _outside(ids: Tensor, vocab: int) -> int:
    return int(ids[(ids < 0) | (ids >= vocab)][0])


class GuardedRule:
    """A rule whose every verdict is held against :class:`arsd.decoding.Verdict`; each pass gets on, so decoding ends."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """The rule's verdict.

        Raises:
            ProtocolError: when it is not one.
        """
        try:
            verdict = self.rule.verify(step, law, draft)
        except (AttributeError, TypeError, AssertionError) as error:
            if draft.law is None and "NoneType" in str(error):
                raise ProtocolError(f"a rule that reads Draft.law must say needs_law = True ({one_line(error)})") from error
            raise
        if not isinstance(verdict, Verdict):
            raise ProtocolError(f"verify must return a Verdict, not {type(verdict).__name__}")
        (batch, window), vocab = step.positions.shape, law.scores.shape[-1]
        _expect("Verdict.count", verdict.count, (batch,), "[B]", (torch.int64,))
        _expect("Verdict.tokens", verdict.tokens, (batch, window), "[B, W]", (torch.int64,))
        _expect("Verdict.outcome", verdict.outcome, (batch, window), "[B, W]", (torch.int64,))
        if draft.tree is not None:
            _expect("Verdict.path", verdict.path, (batch, window - 1), "[B, W - 1]", (torch.int64,))
        if verdict.near_tie is not None:
            _expect("Verdict.near_tie", verdict.near_tie, (batch, window), "[B, W]", (torch.bool,))
        active = step.width > 0
        if bool((verdict.count < active).any()):
            raise ProtocolError("Verdict.count must be at least 1 in every row that is not finished, or decoding never ends")
        if bool((verdict.count > step.width).any()):
            raise ProtocolError(
                "Verdict.count must not exceed step.width: 0 in a finished row, clipped at the picture's end"
            )
        _expect_ids("Verdict.tokens", verdict.tokens[active], vocab)
        if verdict.local_tv is not None:
            floats = (torch.float32, torch.float64)
            _expect("Verdict.local_tv", verdict.local_tv, (batch, window), "[B, W]", floats)
            if not bool((verdict.local_tv >= 0)[step.active].all()):
                raise ProtocolError("Verdict.local_tv must not be negative or NaN")
        return verdict

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Pass it on."""
        if hasattr(self.rule, "join"):
            self.rule.join(rows, pictures)


class GuardedDrafter:
    """A drafter whose every draft is held against :class:`arsd.decoding.Draft`."""

    def __init__(self, drafter: Drafter, vocab: int) -> None:
        self.drafter, self.vocab = drafter, vocab
        self.needs_law = bool(getattr(drafter, "needs_law", False))
        if hasattr(drafter, "begin"):
            self.begin = drafter.begin

    def propose(self, step: Step) -> Draft:
        """The drafter's guesses.

        Raises:
            ProtocolError: when they are none.
        """
        if isinstance(step.noise, ChoiceTape):
            step.noise.live = step.width > 0
        draft = self.drafter.propose(step)
        if not isinstance(draft, Draft):
            raise ProtocolError(f"propose must return a Draft, not {type(draft).__name__}")
        batch, guesses = step.positions[:, :-1].shape
        if draft.tree is not None:
            self._expect_tree(batch, draft.tree, draft)
            return draft
        _expect("Draft.tokens", draft.tokens, (batch, guesses), "[B, W - 1]", (torch.int64,))
        _expect_ids("Draft.tokens", draft.tokens, self.vocab)
        if self.needs_law:
            floats = (torch.float32, torch.float64)
            _expect("Draft.law", draft.law, (batch, guesses, self.vocab), "[B, W - 1, V]", floats)
            assert draft.law is not None
            q, active = draft.law.double(), step.active[:, :-1]
            sums = (q.sum(-1) - 1).abs() < 1e-5
            if not bool((sums & (q.amin(-1) >= 0))[active].all()):
                raise ProtocolError("Draft.law must be probabilities that sum to 1")
            if not bool((q.gather(-1, draft.tokens[..., None])[..., 0] > 0)[active].all()):
                raise ProtocolError("Draft.law must give every guess a chance: q(guess) is 0")
        return draft

    def _expect_tree(self, batch: int, tree: TreeShape, draft: Draft) -> None:
        _expect("Draft.tokens", draft.tokens, (batch, len(tree.parents)), "[B, K]", (torch.int64,))
        _expect_ids("Draft.tokens", draft.tokens, self.vocab)
        if draft.law is not None:
            shape = (batch, len(tree.families), self.vocab)
            _expect("Draft.law", draft.law, shape, "[B, F, V]", (torch.float32, torch.float64))

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Pass it on."""
        self.drafter.observe(step, law, verdict, lengths)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Pass it on."""
        self.drafter.join(rows, pictures)


class AsFixed:
    """A drafter's guesses under the law that is true of any guess: given the past it is a fixed token, q a point mass."""

    needs_law = True

    def __init__(self, drafter: Drafter, vocab: int) -> None:
        self.drafter, self.vocab = drafter, vocab
        if hasattr(drafter, "begin"):
            self.begin = drafter.begin

    def propose(self, step: Step) -> Draft:
        """The guesses, q one-hot."""
        draft = self.drafter.propose(step)
        if draft.tree is not None:  # which needs no law for that
            return replace(draft, law=None)
        tokens = draft.tokens
        return Draft(tokens, torch.nn.functional.one_hot(tokens, self.vocab).double())

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Pass it on."""
        self.drafter.observe(step, law, verdict, lengths)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Pass it on."""
        self.drafter.join(rows, pictures)


class Replay:
    """Guesses that know the answer [B, N], but for every ``wrong``-th position (0: none): long accepted runs."""

    needs_law = False

    def __init__(self, answer: Tensor, vocab: int, wrong: int) -> None:
        self.answer, self.vocab, self.wrong = answer, vocab, wrong

    def propose(self, step: Step) -> Draft:
        """The answer's tokens."""
        positions = step.positions[:, :-1]
        tokens = self.answer.gather(1, positions.clamp_max(self.answer.shape[1] - 1))
        if self.wrong:
            tokens = torch.where(positions % self.wrong == 0, (tokens + 1) % self.vocab, tokens)
        return Draft(tokens)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Nothing to learn."""

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Nothing to forget."""


def rule_under_jacobi(make_rule: MakeRule, redraft: Redraft, init: str, window: int) -> Build:
    """The rule on trial, with Jacobi guesses."""

    def build(setting: Setting) -> Parts:
        rule = bound(make_rule(), setting)
        drafter = Jacobi.of(setting, redraft, init, bool(getattr(rule, "needs_law", False)), window)
        return Parts(GuardedDrafter(drafter, setting.grammar.vocab), GuardedRule(rule), FixedWindow(window), window)

    return build


def rule_under_replay(make_rule: MakeRule, answer: Tensor, vocab: int, wrong: int, window: int) -> Build:
    """The rule on trial, with guesses that are mostly right."""

    def build(setting: Setting) -> Parts:
        drafter: Drafter = Replay(answer, vocab, wrong)
        return Parts(drafter, GuardedRule(bound(make_rule(), setting)), FixedWindow(window), window)

    return build


def rule_under_trees(make_rule: MakeRule, shape: str) -> Build:
    """The rule on trial, with trees of the call's draft model whose siblings are drawn from q."""

    def build(setting: Setting) -> Parts:
        drafter = TreeDrafter(replace(setting, rule=SiblingSampling()), shape)
        tree, rule = drafter.tree, GuardedRule(bound(make_rule(), setting))
        return Parts(GuardedDrafter(drafter, setting.grammar.vocab), rule, FixedWindow(tree.depth + 1), tree.columns)

    return build


def drafter_under(make_drafter: MakeDrafter, make_rule: MakeRule, window: int, fixed: bool = False) -> Build:
    """The drafter on trial, under one of this package's rules; ``fixed`` calls its guesses point masses."""

    def build(setting: Setting) -> Parts:
        rule, vocab = bound(make_rule(), setting), setting.grammar.vocab
        made = make_drafter(replace(setting, window=window, rule=SeedExact() if fixed else rule))
        drafter: Drafter = GuardedDrafter(made, vocab)
        drafter = AsFixed(drafter, vocab) if fixed else drafter
        tree = getattr(made, "tree", None)
        if tree is not None:  # which has rules and a pass of its own
            rule = SeedExactTree() if isinstance(rule, SeedExact) else SiblingSampling()
            return Parts(drafter, GuardedRule(rule), FixedWindow(tree.depth + 1), tree.columns)
        slots = FixedWindow(1 if isinstance(made, NoDraft) else window)  # as Speculative has it
        return Parts(drafter, GuardedRule(rule), slots, window)

    return build
