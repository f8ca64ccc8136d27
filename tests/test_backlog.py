"""What drafters are told later, all at once, is what they would have been told round by round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arsd.decoding import CounterNoise, Grammar, Setting, Step
from arsd.decoding.backlog import Backlog, hears_late
from arsd.decoding.chain import ChainDrafter, HybridDrafter
from arsd.decoding.drafters import NoDraft
from arsd.decoding.laws import Law
from arsd.decoding.lookup import LookupDrafter
from arsd.decoding.recycling import RecyclingDrafter
from arsd.decoding.types import Outcome, Verdict

BATCH, VOCAB, TOKENS, WINDOW = 3, 23, 60, 7
Told = tuple[Step, Law, Verdict, Tensor]


def setting() -> Setting:
    grammar, noise = Grammar(TOKENS, VOCAB), CounterNoise([0] * BATCH, [0] * BATCH)
    model = {"laws": object(), "draft_model": lambda window: object()}
    prompt = torch.arange(BATCH * 4).view(BATCH, 4)
    return Setting(BATCH, TOKENS, 0, grammar, noise, torch.device("cpu"), window=WINDOW, prompt=prompt, **model)  # type: ignore[arg-type]


def made(kind: str) -> Any:
    if kind == "lookup":
        return LookupDrafter(setting())
    if kind == "chain":
        return ChainDrafter(setting())
    return RecyclingDrafter(setting(), "3x1", k=4, shared=kind == "shared")


def rounds(count: int, seed: int = 0, greedy: bool = False) -> list[Told]:
    """Rounds of several widths; a row may sit one out, and what lies behind a refusal is junk."""
    generator = torch.Generator().manual_seed(seed)
    lengths, told = torch.zeros(BATCH, dtype=torch.int64), []
    for n in range(count):
        window = (1, 4, 1, 1, WINDOW)[n % 5]
        width = (TOKENS - lengths).clamp_max(window)
        width[n % 4 :: 4] = 0
        taken = (torch.rand(BATCH, generator=generator) * (width + 1)).long().clamp_min(1).minimum(width)
        positions = lengths[:, None] + torch.arange(window)
        active = torch.arange(window) < width[:, None]
        step = Step(positions, width, lengths, active, lengths.tolist(), [], CounterNoise([0] * BATCH, [0] * BATCH))
        scores = torch.randn(BATCH, window, VOCAB, generator=generator)
        tokens = torch.randint(VOCAB, (BATCH, window), generator=generator)
        verdict = Verdict(taken, tokens, torch.full_like(tokens, Outcome.BONUS))
        lengths = lengths + taken
        law = (
            Law(torch.where(scores == scores.amax(-1, keepdim=True), 0.0, -torch.inf), None, scores)
            if greedy
            else Law(scores)
        )
        told.append((step, law, verdict, lengths))
    return told


def state(drafter: Any) -> list[Tensor]:
    """All that decides the next guesses."""
    if isinstance(drafter, LookupDrafter):
        return [drafter.text[:, :-1]]
    if isinstance(drafter, ChainDrafter):
        return [drafter.tokens[:, :TOKENS]]
    return [drafter.last, drafter.matrix[:-1]]


@pytest.mark.parametrize("kind", ["lookup", "chain", "shared", "own"])
@pytest.mark.parametrize("greedy", [False, True])
def test_late_is_the_same_as_at_once(kind: str, greedy: bool):
    """In whatever portions; the last committed token of every row and the newest law of every token count."""
    at_once, told = made(kind), rounds(24, greedy=greedy)
    for one in told:
        at_once.observe(*one)
    before = state(made(kind))
    for portion in (1, 2, 5, 24):
        late = made(kind)
        backlog = Backlog([late])
        for n, (step, law, verdict, _) in enumerate(told):
            backlog.add(None, step, law, verdict)
            if (n + 1) % portion == 0:
                backlog.tell(late)
        backlog.tell(late)
        assert not backlog.rounds
        for ours, theirs, fresh in zip(state(late), state(at_once), before, strict=True):
            assert torch.equal(ours, theirs) and not torch.equal(ours, fresh)


def test_every_drafter_has_its_own_place_in_the_backlog():
    """One that had a round of its own was told of it; the others hear of it, once."""
    told, drafters = rounds(12), [made("lookup"), made("chain"), made("own")]
    apart = [made("lookup"), made("chain"), made("own")]
    backlog = Backlog(drafters)
    for n, (step, law, verdict, lengths) in enumerate(told):
        now = drafters[n % 4] if n % 4 < 3 else None
        if now is not None:
            backlog.tell(now)
            now.observe(step, law, verdict, lengths)
        backlog.add(now, step, law, verdict)
        for other in apart:
            other.observe(step, law, verdict, lengths)
    for drafter, other in zip(drafters, apart, strict=True):
        backlog.tell(drafter)
        assert all(torch.equal(a, b) for a, b in zip(state(drafter), state(other), strict=True))
    assert not backlog.rounds and backlog.size == 0


def test_old_laws_are_forgotten_and_tokens_are_not(monkeypatch):
    """Long texts of plain AR must not fill the memory with laws that nobody may ever ask for."""
    monkeypatch.setattr(Backlog, "LAWS", 3 * BATCH * WINDOW * VOCAB)
    told, late, recent = rounds(30), made("own"), made("own")
    backlog = Backlog([late])
    for step, law, verdict, _ in told:
        backlog.add(None, step, law, verdict)
        assert backlog.size == sum(x.numel() for _, _, x in backlog.rounds if x is not None) <= Backlog.LAWS
    kept = backlog.kept
    assert 20 < kept < 29 and len(backlog.rounds) == 30
    backlog.tell(late)
    last = torch.full((BATCH,), recent.start)
    for _, _, verdict, _ in told[:kept]:
        end = verdict.tokens.gather(1, (verdict.count[:, None] - 1).clamp_min(0))[:, 0]
        last = torch.where(verdict.count > 0, end, last)
    recent.last = last[:, None]
    for one in told[kept:]:
        recent.observe(*one)
    assert torch.equal(late.last, recent.last) and torch.equal(late.matrix[:-1], recent.matrix[:-1])
    monkeypatch.setattr(Backlog, "LAWS", 1)
    backlog = Backlog([late])
    for step, law, verdict, _ in told:
        backlog.add(None, step, law, verdict)
    assert backlog.kept == 29, "the newest one is always there"
    backlog.tell(late)


def test_who_hears_late():
    """Drafters that say how, unless a subclass has changed how it is told at once."""

    class Counting(LookupDrafter):
        def observe(self, *args: Any) -> None: ...

    class Both(Counting):
        def observe(self, *args: Any) -> None: ...

        def hear(self, seen: Any) -> None: ...

    assert all(hears_late(made(kind)) for kind in ("lookup", "chain", "own")) and hears_late(Both(setting()))
    assert not hears_late(NoDraft()) and not hears_late(Counting(setting()))
    assert not hears_late(HybridDrafter.__new__(HybridDrafter))
