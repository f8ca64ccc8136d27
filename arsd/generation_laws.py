"""The laws of :func:`arsd.generate_fn`: what transformers' logits processors make of the logits of a whole window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from arsd.decoding.laws import Grammar, Law, LawConfig, Laws
from arsd.decoding.noise import CounterNoise
from arsd.errors import InputError
from arsd.generation_parts import Text

OF_SCORES: set[type] = {
    hf.TemperatureLogitsWarper,
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
}
OF_ANY_TEXT: set[type] = {  # they read the text, and take any text
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.WatermarkLogitsProcessor,
}


class NoNoise(CounterNoise):
    """For greedy decoding: an arg-max needs no noise, which costs time where the vocabulary is large."""

    def prepare(self, starts: Sequence[int], window: int, vocab: int, dtype: torch.dtype) -> None:
        """Nothing to prepare."""

    def token_gumbel(self, positions: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """Zeros [B, W, vocab]."""
        return torch.zeros((), dtype=dtype, device=positions.device).expand(*positions.shape, vocab)


class ProcessedLaws(Laws):
    """The laws that transformers' logits processors make of the logits: float32, in the order of the list.

    Processors that look at scores only, at the end of the list, see all slots at once. All others are called once for every
    length of text in the window, with the whole batch: prompt, committed tokens and the guesses before the slot. A row
    that has no slot of that length shows the text of one that has. A guess that a constraint forbids is never taken by a
    lossless rule; where a processor may not bear such a text, it sees the likeliest token in its place.

    Args:
        processors: transformers' list.
        text: what they see.
        grammar: allows everything.
        greedy: take the most likely token.
        cfg_scale: s of ``u + s (c - u)`` on log-probabilities, as transformers' guidance has it.

    Attributes:
        nothing: [M, N + overhang] positions at which the processors left no token at all.
    """

    def __init__(self, processors: list[Any], text: Text, grammar: Grammar, greedy: bool, cfg_scale: float) -> None:
        super().__init__(LawConfig(temperature=0.0 if greedy else 1.0), grammar)
        self.text, self.cfg_scale = text, cfg_scale
        split = 1 + max((i for i, p in enumerate(processors) if type(p) not in OF_SCORES), default=-1)
        self.reading: Any = hf.LogitsProcessorList([self._for_some_rows(p) for p in processors[:split]])
        self.tail: Any = hf.LogitsProcessorList(processors[split:])
        self.guarded = any(type(p) not in OF_SCORES | OF_ANY_TEXT for p in processors[:split])
        self.unproven, self.rows = self.guarded, list(range(len(text.ids)))
        self.nothing = torch.zeros_like(text.ids[:, text.known :], dtype=torch.bool)

    def __call__(self, logits: Tensor, positions: Tensor) -> Law:
        """See :class:`arsd.decoding.laws.Laws`."""
        scores = _guided_scores(logits, self.cfg_scale)
        if self.reading:
            self._read(scores)
        if self.tail:
            slots = scores.flatten(0, 1)
            scores = self.tail(positions.reshape(-1, 1), slots).view_as(scores)
        empty = scores.amax(-1) == -torch.inf  # perhaps behind a guess that is refused; if it is not, see the caller
        self.nothing.scatter_(1, positions, empty)
        scores[..., 0].masked_fill_(empty, 0.0)  # as the arg-max of nothing has it
        return super().__call__(scores[None], positions)

    def _read(self, scores: Tensor) -> None:
        """Apply the processors that read the text to ``scores`` [M, W, V], in place."""
        text, width, every = self.text, scores.shape[1], range(len(scores))
        ids = text.ids.clone() if self.guarded else text.ids
        for n in sorted({text.starts[b] + j for b in text.moving for j in range(width)}):
            if n >= text.num_tokens:
                break
            self.rows = [b for b in text.moving if 0 <= n - text.starts[b] < width]
            shown = [b if b in self.rows else self.rows[0] for b in every]
            slots = [n - text.starts[b] for b in shown]
            seen = ids[shown, : text.known + n]
            out = self._judged(seen, scores[shown, slots])[self.rows]
            scores[self.rows, [slots[b] for b in self.rows]] = out
            if self.guarded:
                guess = ids[self.rows, text.known + n]
                allowed = out.gather(1, guess[:, None])[:, 0] > -torch.inf
                ids[self.rows, text.known + n] = torch.where(allowed, guess, out.argmax(-1))

    def _judged(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not self.unproven:
            return self.reading(ids, scores)
        self.unproven = False
        first, second = (self.reading(ids, scores.clone()).float() for _ in range(2))
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            names = ", ".join(type(p).__name__ for p in self.reading if type(p) not in OF_SCORES | OF_ANY_TEXT)
            raise InputError(f"a logits processor gave two answers for one text: of {names}, none may remember its calls")
        return first

    def _for_some_rows(self, processor: Any) -> Any:
        """A constraint is asked for the rows that need it only."""
        if type(processor) is not hf.PrefixConstrainedLogitsProcessor:
            return processor
        allowed = processor._prefix_allowed_tokens_fn
        return hf.PrefixConstrainedLogitsProcessor(lambda b, ids: allowed(b, ids) if b in self.rows else [0], 1)


class DraftLaws(Laws):
    """The laws of a drafter that has logits of its own: guidance, and the processors that look at scores only.

    Args:
        processors: transformers' list.
        grammar: allows everything.
        greedy: take the most likely token.
        cfg_scale: see :class:`ProcessedLaws`.
    """

    def __init__(self, processors: list[Any], grammar: Grammar, greedy: bool, cfg_scale: float) -> None:
        super().__init__(LawConfig(temperature=0.0 if greedy else 1.0), grammar)
        self.cfg_scale = cfg_scale
        self.of_scores: Any = hf.LogitsProcessorList([p for p in processors if type(p) in OF_SCORES])

    def __call__(self, logits: Tensor, positions: Tensor) -> Law:
        """See :class:`arsd.decoding.laws.Laws`."""
        scores = _guided_scores(logits, self.cfg_scale)
        scores = self.of_scores(positions.reshape(-1, 1), scores.flatten(0, 1)).view_as(scores)
        return super().__call__(scores[None], positions)


def _guided_scores(logits: Tensor, cfg_scale: float) -> Tensor:
    """[M, W, V] scores in float32 of the logits [S, M, W, V] of one stream, or of two under guidance."""
    scores = logits[0].to(torch.float32, copy=True)
    if len(logits) == 2:
        scores, other = scores.log_softmax(-1), logits[1].float().log_softmax(-1)
        scores = cfg_scale * (scores - other) + other
    return scores
