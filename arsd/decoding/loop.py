"""The one decoding loop. Every method of this package is this loop with other parts (see DecodingStrategy)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arsd.decoding.laws import Law, Laws
from arsd.decoding.noise import Noise
from arsd.decoding.stats import DecodeStats, Stopwatch
from arsd.decoding.types import DecodeRequest, Outcome, Parts, Round, Step, Target, Verdict
from arsd.errors import NonFiniteLogitsError


@dataclass
class DecodeResult:
    """Tokens and figures of one call.

    Args:
        tokens: [B, N].
        stats: see :class:`DecodeStats`.
        log_probs: [B, N] log-probability of each token under its law, when asked for.
        entropies: [B, N] entropy in nats of each token's law, when asked for.
        trace: every pass, when asked for.
    """

    tokens: Tensor
    stats: DecodeStats
    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    trace: list[Round] = field(default_factory=list)


class _Rows:
    """Where each row stands, on the device and mirrored on the host (one read a round)."""

    def __init__(self, batch: int, request: DecodeRequest, device: torch.device) -> None:
        self.total = request.num_tokens
        self.tokens = torch.zeros(batch, request.num_tokens + 1, dtype=torch.int64, device=device)  # last column: spill
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rounds = torch.zeros(batch, dtype=torch.int64, device=device)
        self.starts = [0] * batch
        self.index = torch.arange(batch, device=device)[:, None]
        shape = (batch, request.num_tokens + 1) if request.log_probs else (0, 0)
        self.log_probs, self.entropies = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.near_ties = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def active(self) -> list[int]:
        """Rows that are not finished."""
        return [b for b, n in enumerate(self.starts) if n < self.total]

    def step(self, window: int, noise: Noise) -> Step:
        """The window of the next pass, clipped exactly at the end."""
        offsets = torch.arange(window, device=self.lengths.device)
        width = (self.total - self.lengths).clamp_max(window)
        return Step(self.lengths[:, None] + offsets, width, self.rounds, offsets < width[:, None], self.starts, noise)

    def feed(self, drafts: Tensor, pass_tokens: int) -> Tensor:
        """[B, pass_tokens]: the last committed token, the guesses, padding."""
        fed = drafts.new_zeros(len(drafts), pass_tokens)
        fed[:, :1] = self.tokens.gather(1, (self.lengths - 1).clamp_min(0)[:, None])
        fed[:, 1 : 1 + drafts.shape[1]] = drafts
        return fed

    def commit(self, step: Step, law: Law, verdict: Verdict, counts: list[int]) -> None:
        """Write the committed tokens; everything behind them goes to the spill column."""
        slots = torch.arange(step.positions.shape[1], device=self.lengths.device)
        taken = slots < verdict.count[:, None]
        place = torch.where(taken, step.positions, self.total)
        self.tokens.scatter_(1, place, verdict.tokens)
        if verdict.near_tie is not None:
            self.near_ties += (verdict.near_tie & taken).sum(1)
        if self.log_probs.numel():
            chosen = law.log_probs.gather(-1, verdict.tokens[..., None])[..., 0]
            self.log_probs.scatter_(1, place, chosen.float())
            self.entropies.scatter_(1, place, torch.special.entr(law.probs).sum(-1).float())
        self.lengths = self.lengths + verdict.count
        self.rounds = self.rounds + 1
        self.starts = [n + c for n, c in zip(self.starts, counts, strict=True)]


@torch.inference_mode()
def decode(target: Target, parts: Parts, laws: Laws, noise: Noise, request: DecodeRequest, batch: int) -> DecodeResult:
    """Decode ``batch`` rows of ``request.num_tokens`` tokens.

    Args:
        target: the model, with the condition of every row.
        parts: drafter, rule, controller and pass shape.
        laws: logits to laws.
        noise: the random choices.
        request: what to decode and to record.
        batch: rows.

    Raises:
        NonFiniteLogitsError: when a law cannot be formed; tokens committed before are in the error's ``tokens``.
    """
    rows, stats, trace = _Rows(batch, request, target.device), DecodeStats(pass_tokens=parts.pass_tokens), []
    watch = Stopwatch(stats.seconds, target.device)
    stats.row_passes = [0] * batch
    with watch("prefill"):
        stats.prefill_passes = target.prefill(parts.pass_tokens)
        target.rollback(rows.lengths)
    stopped = False
    while rows.active and not stopped:
        began, active = time.perf_counter(), rows.active
        with watch("draft"):
            window = parts.controller.window()
            step = rows.step(window, noise)
            draft = parts.drafter.propose(step)
        with watch("forward"):
            logits = target.forward(rows.feed(draft.tokens, parts.pass_tokens), rows.lengths, rows.starts)
        with watch("verify"):
            law = laws(logits[:, :, :window], step.positions)
            verdict = parts.rule.verify(step, law, draft)
            broken = (~law.finite() & step.active).any(1)
            counts, bad = torch.stack([verdict.count, broken.long()]).tolist()  # the one device-to-host read of a round
        if any(bad):
            watch.close()
            where = f"row {bad.index(1)} after {rows.starts[bad.index(1)]} tokens"
            message = f"the model returned NaN or infinite logits in {where}: check the weights, or use float32"
            raise NonFiniteLogitsError(message, rows.tokens[:, :-1].clone(), list(rows.starts))
        with watch("other"):
            if laws.grammar.any_forced:
                verdict.outcome[laws.grammar.forced_at(step.positions) >= 0] = int(Outcome.FORCED)
            if request.trace:
                positions, drafts, tokens, outcome = (
                    x.cpu().clone() for x in (step.positions, draft.tokens, verdict.tokens, verdict.outcome)
                )
                trace.append(Round(positions, drafts, tokens, outcome, counts))
            rows.commit(step, law, verdict, counts)
            target.rollback(rows.lengths)
            parts.drafter.observe(step, law, verdict, rows.lengths)
            for b in active:
                stats.row_passes[b] += 1
                stats.accepted_lengths[counts[b]] += 1
            stats.forward_passes += 1
            parts.controller.observe([counts[b] for b in active], time.perf_counter() - began)
            if request.on_commit is not None:
                stopped = bool(request.on_commit(sum(counts), rows.tokens[:, :-1]))
    watch.close()
    stats.tokens, stats.near_ties = list(rows.starts), rows.near_ties.tolist()
    stats.expected_changed_tokens = [0.0] * batch
    log_probs, entropies = (rows.log_probs[:, :-1], rows.entropies[:, :-1]) if request.log_probs else (None, None)
    return DecodeResult(rows.tokens[:, :-1].clone(), stats, log_probs, entropies, trace)
