"""The one decoding loop. Every method of this package is this loop with other parts (see DecodingStrategy)."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arsd.decoding.laws import Law, Laws
from arsd.decoding.noise import Noise
from arsd.decoding.recheck import recheck
from arsd.decoding.stats import DecodeStats, Stopwatch
from arsd.decoding.trees import followed, laid_out
from arsd.decoding.types import DecodeRequest, Draft, Outcome, Parts, Round, Step, Target, Verdict
from arsd.errors import NonFiniteLogitsError, StrategyError

DRAFTER_FAULT = 2  # what a row reports when it is the draft model whose logits are broken


@dataclass
class DecodeResult:
    """Tokens and figures of one call.

    Args:
        tokens: [M, N] of M pictures in the order asked for; a picture of fewer tokens is filled up with zeros.
        stats: see :class:`DecodeStats`.
        log_probs: [M, N] log-probability of each token under its law, when asked for.
        entropies: [M, N] entropy in nats of each token's law, when asked for.
        trace: every pass, when asked for.
    """

    tokens: Tensor
    stats: DecodeStats
    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    trace: list[Round] = field(default_factory=list)


class _Rows:
    """Which picture each row holds and how far it is, on the device and mirrored on the host (one read a round)."""

    def __init__(self, batch: int, request: DecodeRequest, unread: int, device: torch.device) -> None:
        count = batch if request.pictures is None else request.pictures
        wanted = request.num_tokens
        self.totals = [wanted] * count if isinstance(wanted, int) else list(wanted)
        self.unread, self.longest = unread, max(self.totals)
        self.first = 0 if request.given is None else request.given.shape[1]  # tokens that are given
        self.waiting = deque(range(batch, count))
        self.held = list(range(batch))  # the picture of each row
        self.starts, self.done = [-unread] * batch, [self.first] * count
        self.tokens = torch.zeros(count, self.longest + 1, dtype=torch.int64, device=device)  # last column: spill
        if request.given is not None:
            self.tokens[:, : self.first] = request.given
        self.lengths = torch.full((batch,), -unread, dtype=torch.int64, device=device)
        self.rounds = torch.zeros(batch, dtype=torch.int64, device=device)
        self.picture = torch.arange(batch, device=device)
        self.total = torch.tensor(self.totals[:batch], device=device)
        shape = self.tokens.shape if request.log_probs else (0, 0)
        self.log_probs, self.entropies = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.near_ties = torch.zeros(count, dtype=torch.int64, device=device)
        self.changed = torch.zeros(count, dtype=torch.float64, device=device)  # summed local total variation

    @property
    def active(self) -> list[int]:
        """Rows that are not finished."""
        return [b for b, n in enumerate(self.starts) if n < self.totals[self.held[b]]]

    @property
    def deciding(self) -> list[int]:
        """Rows that a pass may commit tokens of: neither finished nor still reading."""
        return [b for b in self.active if self.starts[b] >= self.first]

    def finished(self, rows: list[int]) -> list[int]:
        """The pictures of those ``rows`` that are finished."""
        return [self.held[b] for b in rows if self.starts[b] >= self.totals[self.held[b]]]

    def result_of(self, picture: int, stats: DecodeStats) -> DecodeResult:
        """One finished picture as the result of a call of its own (which has no seconds: passes were shared)."""
        one = slice(picture, picture + 1)
        alone = stats.of_picture(picture)
        alone.tokens, alone.near_ties = [self.done[picture] - self.first], self.near_ties[one].tolist()
        alone.expected_changed_tokens = self.changed[one].tolist()
        log_probs, entropies = (x[one, :-1].clone() if x.numel() else None for x in (self.log_probs, self.entropies))
        return DecodeResult(self.tokens[one, :-1].clone(), alone, log_probs, entropies)

    def moved(self, starts: list[int]) -> None:
        """Rows stand elsewhere: the device is told what the host knows."""
        self.starts = starts
        self.lengths = torch.tensor(starts, device=self.lengths.device)

    def refill(self) -> tuple[list[int], list[int]]:
        """Give finished rows the pictures that wait: (rows, their new pictures)."""
        active = set(self.active)
        rows = [b for b in range(len(self.held)) if b not in active][: len(self.waiting)]
        for b in rows:
            self.held[b] = self.waiting.popleft()
            self.total[b] = self.totals[self.held[b]]
        if rows:
            self.picture = torch.tensor(self.held, device=self.picture.device)
            self.rounds[rows] = 0
            self.moved([-self.unread if b in rows else n for b, n in enumerate(self.starts)])
        return rows, [self.held[b] for b in rows]

    def step(self, window: int, noise: Noise) -> Step:
        """The window of the next pass, clipped exactly at the end; empty in a row that still reads its condition."""
        offsets = torch.arange(window, device=self.lengths.device)
        first = self.lengths.clamp_min(self.first)
        width = torch.where(self.lengths < self.first, 0, (self.total - first).clamp_max(window))
        starts = [max(self.first, n) for n in self.starts]
        reading = [b for b, n in enumerate(self.starts) if n < self.first]
        return Step(first[:, None] + offsets, width, self.rounds, offsets < width[:, None], starts, reading, noise)

    def feed(self, drafts: Tensor, pass_tokens: int) -> Tensor:
        """[B, pass_tokens]: the last committed token, the guesses, padding."""
        fed = drafts.new_zeros(len(drafts), pass_tokens)
        fed[:, 0] = self.tokens[self.picture, (self.lengths - 1).clamp_min(0)]
        fed[:, 1 : 1 + drafts.shape[1]] = drafts
        return fed

    def commit(self, step: Step, law: Law, verdict: Verdict, counts: list[int], pass_tokens: int) -> None:
        """Write the committed tokens (everything behind them goes to the spill column); read condition slots."""
        slots = torch.arange(step.positions.shape[1], device=self.lengths.device)
        taken = slots < verdict.count[:, None]
        place = torch.where(taken, step.positions, self.longest)
        picture = self.picture[:, None]
        self.tokens[picture, place] = verdict.tokens
        if verdict.near_tie is not None:
            self.near_ties.index_add_(0, self.picture, (verdict.near_tie & taken).sum(1))
        if verdict.local_tv is not None:
            self.changed.index_add_(0, self.picture, torch.where(taken, verdict.local_tv.double(), 0.0).sum(1))
        if self.log_probs.numel():
            chosen = law.log_probs.gather(-1, verdict.tokens[..., None])[..., 0]
            self.log_probs[picture, place] = chosen.float()
            self.entropies[picture, place] = torch.special.entr(law.probs).sum(-1).float()
        self.rounds = self.rounds + (self.lengths >= self.first)
        read = (self.first - self.lengths).clamp(0, pass_tokens)
        self.lengths = self.lengths + verdict.count + read
        behind = [min(max(0, self.first - n), pass_tokens) for n in self.starts]
        self.starts = [n + c + r for n, c, r in zip(self.starts, counts, behind, strict=True)]
        for b, n in enumerate(self.starts):
            self.done[self.held[b]] = max(self.first, n)

    def end(self, rows: list[int]) -> None:
        """These rows are finished, however many tokens they were to have."""
        for b in rows:
            self.totals[self.held[b]] = self.starts[b]
            self.total[b] = self.starts[b]


@torch.inference_mode()
def decode(target: Target, parts: Parts, laws: Laws, noise: Noise, request: DecodeRequest, batch: int) -> DecodeResult:
    """Decode pictures of ``request.num_tokens`` tokens, ``batch`` of them at a time.

    Every pass has the shape (``batch``, ``parts.pass_tokens``), whatever the rows do: a row that finishes takes the next
    picture that waits and reads its condition while the others go on; when none waits, it is carried along masked.

    Args:
        target: the model, with the condition of every picture.
        parts: drafter, rule, controller and pass shape.
        laws: logits to laws.
        noise: the random choices.
        request: what to decode and to record.
        batch: rows.

    Raises:
        NonFiniteLogitsError: when a law cannot be formed; tokens committed before are in the error's ``tokens``.
        StrategyError: when more pictures than rows are asked of a drafter that cannot begin another one.
    """
    rows, trace = _Rows(batch, request, target.unread, target.device), []
    if rows.waiting and not hasattr(parts.drafter, "join"):
        raise StrategyError("this drafter cannot begin another picture in a freed row (no join): leave out batch_size")
    stats = DecodeStats(pass_tokens=parts.pass_tokens, batch=batch, row_passes=[0] * len(rows.totals))
    watch = Stopwatch(stats.seconds, target.device)
    if hasattr(parts.drafter, "begin"):
        parts.drafter.begin(target)
    with watch("prefill"):
        stats.prefill_passes = target.prefill(rows.starts, parts.pass_tokens)
        rows.moved([rows.first] * batch)
        target.rollback(rows.lengths)
    stopped, ends = False, torch.tensor(list(request.end_tokens), device=target.device) if request.end_tokens else None
    while rows.active and not stopped:
        began, active = time.perf_counter(), rows.deciding
        with watch("draft"):
            window = parts.controller.window()
            width = parts.width()
            step = rows.step(window, noise)
            draft = parts.drafter.propose(step)
        with watch("forward"):
            branches = () if draft.tree is None else (draft.tree,)
            target.active = rows.active
            logits = target.forward(rows.feed(draft.tokens, width), rows.lengths, rows.starts, *branches)
        with watch("verify"):
            positions, active_laws = laid_out(step, draft.tree)
            law = laws(logits[:, :, : positions.shape[1]], positions)
            verdict = parts.rule.verify(step, law, draft)
            if request.recheck is not None:
                again = recheck(
                    request.recheck, step, law, verdict, target, laws, rows.feed(draft.tokens[:, :0], 1), rows.lengths
                )
                stats.add_rechecks(again)
            faults = (~law.finite() & active_laws).any(1).long()
            if draft.broken is not None:
                faults = torch.where(draft.broken & (faults == 0), DRAFTER_FAULT, faults)
            verdict.count, ended = _until(ends, verdict)
            counts, bad, over = torch.stack(
                [verdict.count, faults, ended]
            ).tolist()  # the one device-to-host read of a round
        if any(bad):
            watch.close()
            raise _broken(rows, bad)
        with watch("other"):
            law, draft = followed(law, draft, verdict.path)
            if laws.grammar.any_forced:
                verdict.outcome[laws.grammar.forced_at(step.positions) >= 0] = int(Outcome.FORCED)
            heard = _kept(step, draft, verdict) if request.trace or request.on_round is not None else None
            rows.commit(step, law, verdict, counts, width)
            rows.end([b for b, end in enumerate(over) if end])
            if verdict.path is not None:
                target.compact(verdict.path, verdict.count)
            target.rollback(rows.lengths)
            parts.drafter.observe(step, law, verdict, rows.lengths)
            stats.add_pass([(rows.held[b], counts[b]) for b in active], width)
            parts.controller.observe([counts[b] for b in active], time.perf_counter() - began)
        if heard is not None:  # who listens pays for the reading, in no one's seconds
            positions, drafts, tokens, outcome = (x.cpu() for x in heard)
            arm = getattr(parts.controller, "arm", "")
            turn = Round(positions, drafts, tokens, outcome, list(counts), list(rows.held), arm)
            if request.trace:
                trace.append(turn)
            stopped = request.on_round is not None and bool(request.on_round(turn))
        if request.on_commit is not None:
            with watch("other"):
                stopped = bool(request.on_commit(sum(counts), rows.tokens[:, :-1])) or stopped
        if request.on_picture is not None:
            for picture in rows.finished(active):
                request.on_picture(picture, rows.result_of(picture, stats))
        if rows.waiting and not stopped:
            with watch("prefill"):
                stats.prefill_passes += _refill(rows, target, parts, laws, noise)
    watch.close()
    stats.tokens, stats.near_ties = [n - rows.first for n in rows.done], rows.near_ties.tolist()
    stats.expected_changed_tokens = rows.changed.tolist()
    if hasattr(parts.controller, "pulls"):
        stats.arms = parts.controller.pulls()
    log_probs, entropies = (rows.log_probs[:, :-1], rows.entropies[:, :-1]) if request.log_probs else (None, None)
    return DecodeResult(rows.tokens[:, :-1].clone(), stats, log_probs, entropies, trace)


def _refill(rows: _Rows, target: Target, parts: Parts, laws: Laws, noise: Noise) -> int:
    """Start waiting pictures in finished rows; the passes that took (passes of one token are too short to read in)."""
    fresh, pictures = rows.refill()
    if not fresh:
        return 0
    if hasattr(laws.grammar, "join"):  # most are the same for all pictures
        laws.grammar.join(fresh, pictures)
    for part in (target, noise, parts.drafter):
        part.join(fresh, pictures)
    if hasattr(parts.rule, "join"):  # most rules remember nothing
        parts.rule.join(fresh, pictures)
    passes = 0
    if parts.pass_tokens == 1 or hasattr(parts.controller, "pass_tokens"):
        passes = target.prefill(rows.starts, 1)
        rows.moved([max(rows.first, n) for n in rows.starts])
    target.rollback(rows.lengths)
    return passes


def _until(ends: Tensor | None, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """How many tokens each row commits, no further than one that ends it, and whether there is one: [B] and [B]."""
    if ends is None:
        return verdict.count, torch.zeros_like(verdict.count)
    slots = torch.arange(verdict.tokens.shape[1], device=ends.device)
    last = torch.isin(verdict.tokens, ends) & (slots < verdict.count[:, None])
    found = last.any(1)
    return torch.where(found, last.long().argmax(1) + 1, verdict.count), found.long()


def _broken(rows: _Rows, faults: list[int]) -> NonFiniteLogitsError:
    row = next(b for b, fault in enumerate(faults) if fault)
    picture, who = rows.held[row], "the drafter" if faults[row] == DRAFTER_FAULT else "the model"
    where = f"picture {picture} after {rows.done[picture]} tokens"
    message = f"{who} returned NaN or infinite logits in {where}: check the weights, or use float32"
    return NonFiniteLogitsError(message, rows.tokens[:, :-1].clone(), list(rows.done))


def _kept(step: Step, draft: Draft, verdict: Verdict) -> list[Tensor]:
    """The tensors of a :class:`Round`, on the device: drafters go on to write into theirs."""
    with torch.inference_mode(False):  # who hears of it may write into it
        return [x.clone() for x in (step.positions, draft.tokens, verdict.tokens, verdict.outcome)]
