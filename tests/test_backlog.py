"""What drafters are told later, all at once, is what they would have been told round by round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arsd.decoding import CounterNoise, Draft, Grammar, Setting, Step, TreeShape
from arsd.decoding.backlog import Backlog, hears_late
from arsd.decoding.chain import ChainDrafter, HybridDrafter
from arsd.decoding.drafters import NoDraft
from arsd.decoding.laws import Law
from arsd.decoding.lookup import LookupDrafter
from arsd.decoding.recycling import RecyclingDrafter
from arsd.decoding.trees import followed
from arsd.decoding.types import Outcome, Verdict

BATCH, VOCAB, TOKENS, WINDOW, WIDEST = 3, 23, 60, 7, 11
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
        window = (1, 4, 1, 1, WIDEST)[n % 5]
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


def committed(told: list[Told]) -> list[list[int]]:
    """The tokens of every row."""
    rows: list[list[int]] = [[] for _ in range(BATCH)]
    for _, _, verdict, _ in told:
        for b, row in enumerate(rows):
            row += verdict.tokens[b, : int(verdict.count[b])].tolist()
    return rows


def state(drafter: Any) -> list[Tensor]:
    """All that decides the next guesses."""
    if isinstance(drafter, LookupDrafter):
        return [drafter.text[:, :-1]]
    if isinstance(drafter, ChainDrafter):
        return [drafter.tokens[:, :TOKENS]]
    return [drafter.last, drafter.matrix[:-1]]


@pytest.mark.parametrize("kind", ["lookup", "chain", "shared", "own"])
@pytest.mark.parametrize("greedy", [False, True])
def test_late_is_the_same_as_at_once(monkeypatch, kind: str, greedy: bool):
    """In whatever portions; the last committed token of every row and the newest law of every token count."""
    monkeypatch.setattr(Backlog, "SLOTS", 1000)
    at_once, told = made(kind), rounds(24, greedy=greedy)
    for one in told:
        at_once.observe(*one)
    before, texts = state(made(kind)), committed(told)
    if kind in ("lookup", "chain"):
        text = at_once.text[:, at_once.origin :] if kind == "lookup" else at_once.tokens
        for b, row in enumerate(texts):
            assert text[b, : len(row)].tolist() == row and not text[b, len(row) : TOKENS].gt(0).any()
    else:
        assert at_once.last[:, 0].tolist() == [row[-1] for row in texts]
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
    assert not backlog.rounds and not backlog.laws


def test_old_laws_are_forgotten_and_tokens_are_not():
    """Long texts of plain AR must not fill the memory with laws that nobody may ever ask for."""
    told, late, recent = rounds(60), made("own"), made("own")
    backlog = Backlog([late])
    for step, law, verdict, _ in told:
        backlog.add(None, step, law, verdict)
        assert sum(x.shape[1] for x in backlog.laws) <= Backlog.SLOTS
    kept = len(backlog.laws)
    assert 10 < kept < 40 and len(backlog.rounds) == 60
    backlog.tell(late)
    recent.last = torch.tensor([[row[-1]] for row in committed(told[:-kept])])
    for one in told[-kept:]:
        recent.observe(*one)
    assert torch.equal(late.last, recent.last) and torch.equal(late.matrix[:-1], recent.matrix[:-1])
    assert not backlog.rounds and not backlog.laws


def test_the_newest_law_is_always_there_and_a_view_does_not_hold_what_it_is_a_part_of(monkeypatch):
    monkeypatch.setattr(Backlog, "NUMBERS", 1)
    backlog = Backlog([made("own")])
    for step, law, verdict, _ in rounds(5):
        whole = torch.zeros(BATCH, 50, VOCAB)
        law.scores = whole[:, : law.scores.shape[1]]
        backlog.add(None, step, law, verdict)
        assert len(backlog.laws) == 1 and backlog.laws[0].untyped_storage().nbytes() < whole.nbytes / 4


def test_laws_are_kept_only_for_those_who_read_them():
    told = rounds(4)
    for kinds, keeps in ((("lookup", "chain"), False), (("lookup", "own"), True)):
        drafters, heard = [made(kind) for kind in kinds], []
        backlog = Backlog(drafters)
        for step, law, verdict, _ in told:
            backlog.add(None, step, law, verdict)
        assert len(backlog.laws) == 4 * keeps
        for drafter in drafters:
            drafter.hear = heard.append
            backlog.tell(drafter)
        assert heard[0].scores is None and (heard[1].scores is not None) == keeps


def test_a_tree_is_heard_of_with_its_laws_before_they_were_greedy():
    """Along the path that was taken: a matrix of several successors could not be made of one."""
    scores = torch.randn(2, 5, 9)
    greedy = torch.where(scores == scores.amax(-1, keepdim=True), 0.0, -torch.inf)
    draft = Draft(torch.zeros(2, 4, dtype=torch.int64), tree=TreeShape.parse("2x1"))
    path = torch.tensor([[0, 2], [1, 3]])
    law, _ = followed(Law(greedy, None, scores), draft, path)
    assert torch.equal(law.before_greedy, scores[torch.arange(2)[:, None], torch.tensor([[0, 1, 3], [0, 2, 4]])])


def test_who_hears_late():
    """Drafters that say how, unless a subclass has changed how it is told at once."""

    class Counting(LookupDrafter):
        def observe(self, *args: Any) -> None: ...

    class Both(Counting):
        def observe(self, *args: Any) -> None: ...

        def hear(self, seen: Any) -> None: ...

    assert all(hears_late(made(kind)) for kind in ("lookup", "chain", "own")) and hears_late(Both(setting()))
    assert not hears_late(NoDraft()) and not hears_late(Counting(setting()))
    assert not hears_late(HybridDrafter.__new__(HybridDrafter)) and not hears_late(object())
