"""What :mod:`arsd.generation` puts around the decoding loop: a whole causal model as target, its processors, its stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.generation import logits_process as hf

from arsd.cache import RowCache
from arsd.decoding.laws import Grammar, Law, LawConfig, Laws
from arsd.decoding.noise import CounterNoise
from arsd.decoding.trees import TreeShape
from arsd.errors import InputError
from arsd.models.target import DecoderTarget

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}  # of the self-check, relative; 0.1 in shorter dtypes
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


@dataclass
class Prompt:
    """What the model reads before the first token.

    Args:
        embeds: [S, M, P, D] embedded prompts of each stream.
        padding: [S, M, P], True at padded slots; the last one is real.
        positions: [..., S * M, P] what the model is told as position_ids; behind the prompt they go on one by one.
        ids: [S, M, P], where the prompt is given as ids.
        extras: other arguments of the model's own prefill (pictures); with any, it reads the ids by itself.
    """

    embeds: Tensor
    padding: Tensor
    positions: Tensor
    ids: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)


class Text:
    """The ids of every row: the prompt, what is committed, and the guesses of the pass in progress.

    Args:
        prompt: [M, K] ids of the prompt, as processors are to see it.
        num_tokens: N, new tokens.
        overhang: the longest pass.
    """

    def __init__(self, prompt: Tensor, num_tokens: int, overhang: int) -> None:
        self.known, self.num_tokens = prompt.shape[1], num_tokens
        self.ids = nn.functional.pad(prompt, (0, num_tokens + overhang))
        self.lengths = torch.zeros(len(prompt), dtype=torch.int64, device=prompt.device)  # committed tokens
        self.starts, self.moving = [-1] * len(prompt), list(range(len(prompt)))

    def drafted(self, tokens: Tensor, lengths: Tensor, starts: list[int]) -> None:
        """A pass reads [last committed token, guesses, padding] = ``tokens`` [M, T] of every row.

        A row that has not moved since the last pass is finished: every other one commits a token at least.
        """
        self.moving = [b for b, n in enumerate(starts) if n > self.starts[b]]
        self.starts = list(starts)
        columns = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        self.ids.scatter_(1, self.known + lengths[:, None] + columns, tokens[:, 1:])

    def committed(self, tokens: Tensor) -> None:
        """``tokens`` [M, N] are what is committed so far."""
        self.ids[:, self.known : self.known + self.num_tokens] = tokens


@dataclass(frozen=True)
class Layout:
    """The cache entries that a model makes in every layer, and the width of its logits."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    places: tuple[torch.device, ...]
    vocab: int


class ModelTarget(DecoderTarget):
    """A whole causal model as :class:`arsd.decoding.types.Target`: the logits are those of its own forward.

    Args:
        model: any causal model of transformers that :func:`layout_of` accepts.
        layout: of its cache.
        prompt: what to read first.
        num_tokens: N, new tokens per row.
        max_pass_tokens: the longest pass.
        text: is told the ids of every pass.
    """

    def __init__(
        self, model: Any, layout: Layout, prompt: Prompt, num_tokens: int, max_pass_tokens: int, text: Text | None = None
    ) -> None:
        self.model, self.layout, self.prompt, self.text = model, layout, prompt, text
        behind = torch.arange(1, num_tokens + max_pass_tokens + 1, device=prompt.positions.device)
        behind = prompt.positions[..., -1:] + behind.clamp_max(num_tokens)  # the padding of a pass goes no further
        self._told = torch.cat([prompt.positions, behind], dim=-1)
        self._keep: dict[str, int] = {}
        config = SimpleNamespace(config=model.config.get_text_config(decoder=True))
        head = nn.Identity()
        head.out_features = layout.vocab  # type: ignore[assignment]
        sizes = prompt.embeds, num_tokens, max_pass_tokens, prompt.padding
        super().__init__(config, head, model.get_input_embeddings(), *sizes)

    def _make_cache(self, size: int) -> RowCache:
        layout, rows = self.layout, self.streams * self.batch
        hidden = None
        if self.padding is not None:
            hidden = nn.functional.pad(self.padding.flatten(0, 1), (0, size - self.prefix))
        shape = len(layout.places), rows, layout.heads, size, layout.head_dim
        return RowCache(*shape, layout.dtype, self.device, hidden, layout.places)

    def prefill(self, starts: list[int], pass_tokens: int) -> int:
        """See :class:`arsd.decoding.types.Target`: one long pass, whatever the strategy."""
        self._keep = _last_logits(self.model)
        try:
            if not self.prompt.extras:
                return super().prefill(starts, 1)
            self.rollback(torch.tensor(starts, device=self.device))
            ids = self.prompt.ids
            fed = {"inputs_embeds": self.condition.flatten(0, 1)} if ids is None else {"input_ids": ids.flatten(0, 1)}
            self._call(*self.cache.begin(self.prefix), {**fed, **self.prompt.extras})
            return 1
        finally:
            self._keep = {}

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int], tree: TreeShape | None = None) -> Tensor:
        """See :class:`arsd.decoding.types.Target`."""
        if self.text is not None:
            self.text.drafted(tokens, lengths, starts)
        return super().forward(tokens, lengths, starts, tree)

    def rollback(self, lengths: Tensor) -> None:
        """See :class:`arsd.decoding.types.Target`."""
        super().rollback(lengths)
        if self.text is not None:
            self.text.lengths = lengths

    def _pass(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self._call(positions, mask, {"inputs_embeds": embeds.reshape(-1, *embeds.shape[2:])})

    def _call(self, positions: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        told = self._told.gather(-1, positions.expand(*self._told.shape[:-1], -1))
        where = {"attention_mask": mask, "position_ids": told, "past_key_values": self.cache}
        out = self.model(**inputs, **where, use_cache=True, return_dict=True, **self._keep)
        return cast(Tensor, out.logits).to(self.device)


def _last_logits(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


_LAYOUTS: WeakKeyDictionary[Any, dict[tuple[Any, ...], Layout]] = WeakKeyDictionary()


def layout_of(model: Any, prompt: Prompt) -> Layout:
    """The cache layout of a model, which has shown once that the passes of the loop give its own logits.

    Six tokens are read at once by the plain model, and by the loop's target in two rows: one is padded, and both take a
    wrong window back before the right one. Pictures, and whatever else only the model's own prefill understands, are held
    against the model's plain prefill in the same way when they come up for the first time.

    Raises:
        InputError: when the logits differ, or the model cannot be called so.
    """
    config, embeds = model.config.get_text_config(decoder=True), prompt.embeds
    known = _LAYOUTS.setdefault(model, {})
    key = (embeds.dtype, embeds.device, config._attn_implementation, torch.is_autocast_enabled(embeds.device.type))
    try:
        if key not in known:
            known[key] = _checked_layout(model, config.vocab_size, embeds.device)
        with_extras = (*key, *sorted(prompt.extras))
        if with_extras not in known:
            _check_prompt(model, known[key], prompt)
            known[with_extras] = known[key]
    except InputError:
        raise
    except Exception as error:  # whatever a model of another kind may say
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(f"{type(model).__name__} cannot be decoded in windows: {reason}") from error
    return known[key]


def _checked_layout(model: Any, vocab: int, device: torch.device) -> Layout:
    ids = (torch.arange(1, 7, device=device) * max(1, vocab // 8)) % vocab
    out = model(input_ids=ids[None], use_cache=True, return_dict=True)
    layers = getattr(getattr(out, "past_key_values", None), "layers", None) or []
    entries: list[Any] = [getattr(layer, which, None) for layer in layers for which in ("keys", "values")]
    if not entries or any(not isinstance(x, Tensor) or x.ndim != 4 or x.shape != entries[0].shape for x in entries):
        raise InputError(f"{type(model).__name__} keeps no plain keys and values, of one shape in all layers: not supported")
    (_, heads, _, head_dim), places = entries[0].shape, tuple(x.device for x in entries[::2])
    layout = Layout(heads, head_dim, entries[0].dtype, places, out.logits.shape[-1])
    rows = torch.stack([ids[:4], torch.stack([ids[0], ids[0], ids[0], ids[1]])])
    padding = torch.tensor([[False] * 4, [True, True, False, False]], device=device)[None]
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]], device=device)
    target = ModelTarget(model, layout, Prompt(model.get_input_embeddings()(rows)[None], padding, positions), 3, 3)
    begin, right = torch.zeros(2, dtype=torch.int64, device=device), torch.stack([ids[3:], ids[1:4]])
    target.prefill([-target.unread] * 2, 1)
    for guesses in (right.flip(0), right):
        target.rollback(begin)
        logits = target.forward(guesses, begin, [0, 0])[0]
    _compare(model, logits, torch.stack([out.logits[0, 3:], out.logits[0, 1:4]]), "a window of tokens")
    return layout


def _check_prompt(model: Any, layout: Layout, prompt: Prompt) -> None:
    """One pass behind the real prompt."""
    rows, mask = prompt.embeds.shape[1], (~prompt.padding[0]).long()
    target = ModelTarget(model, layout, prompt, 1, 1)
    begin = torch.zeros(rows, dtype=torch.int64, device=target.device)
    target.prefill([-target.unread] * rows, 1)
    target.rollback(begin)
    logits = target.forward(begin[:, None], begin, [0] * rows)[0]
    positions = prompt.positions[..., :rows, :]
    fed = {"inputs_embeds": prompt.embeds[0]} if prompt.ids is None else {"input_ids": prompt.ids[0]}
    out = model(**fed, attention_mask=mask, position_ids=positions, return_dict=True, **prompt.extras, **_last_logits(model))
    _compare(model, logits, out.logits[:, -1:].to(target.device), f"a prompt with {', '.join(prompt.extras)}")


def _compare(model: Any, logits: Tensor, reference: Tensor, what: str) -> None:
    """Hold our logits against the model's own; a model that gives no numbers at all is left to the loop."""
    if bool((reference.isnan() | reference.isposinf()).any()):
        return
    forbidden, ours_forbidden = (x <= torch.finfo(x.dtype).min for x in (reference, logits))  # ids, by the model itself
    ours, own = (x.double().masked_fill(forbidden, 0) for x in (logits, reference))
    spread = (own - own.mean(-1, keepdim=True)).square().mean().sqrt()
    error = float((ours - own).square().mean().sqrt() / spread.clamp_min(1e-30))
    if not error <= TOLERANCE.get(reference.dtype, 0.1) or not torch.equal(forbidden, ours_forbidden):
        raise InputError(
            f"{type(model).__name__} gives other logits for {what} than in its own generate (off by {error:.1e} of their "
            "spread): this kind of model is not supported, or it is not in eval mode"
        )


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
        scores = logits[0].to(torch.float32, copy=True)
        if len(logits) == 2:
            scores, other = scores.log_softmax(-1), logits[1].float().log_softmax(-1)
            scores = self.cfg_scale * (scores - other) + other
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
