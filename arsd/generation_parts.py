"""What :mod:`arsd.generation` puts around the decoding loop: a whole causal model as target, its processors, its stops."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from arsd.cache import RowCache, harmless_step
from arsd.decoding.trees import TreeShape
from arsd.errors import InputError
from arsd.models.attention import NOBODY, PACKED_QUERIES, Observer, observed, own_implementation
from arsd.models.target import DecoderTarget

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}  # of the self-check, relative; 0.1 in shorter dtypes


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

    def drafted(self, tokens: Tensor, lengths: Tensor, starts: list[int], active: Sequence[int]) -> None:
        """A pass reads [last committed token, guesses, padding] = ``tokens`` [M, T] of every row; some are ``active``."""
        self.starts, self.moving = list(starts), list(active)
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

    Attributes:
        observer: looks on in the passes (:func:`arsd.models.attention.observed`), while there is one.
        reach: slots that the pass in progress fills or finds filled, in the row that is farthest.
    """

    def __init__(
        self, model: Any, layout: Layout, prompt: Prompt, num_tokens: int, max_pass_tokens: int, text: Text | None = None
    ) -> None:
        self.model, self.layout, self.prompt, self.text = model, layout, prompt, text
        self.observer: Observer | None = None
        self.reach = 0
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
                self.reach = self.unread
                return super().prefill(starts, 1)
            self.rollback(torch.tensor(starts, device=self.device))
            self.reach, ids = self.prefix, self.prompt.ids
            fed = {"inputs_embeds": self.condition.flatten(0, 1)} if ids is None else {"input_ids": ids.flatten(0, 1)}
            self._observed(*self.cache.begin(self.prefix), {**fed, **self.prompt.extras})
            return 1
        finally:
            self._keep = {}

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int], tree: TreeShape | None = None) -> Tensor:
        """See :class:`arsd.decoding.types.Target`."""
        self.reach = self.unread + max(starts) + tokens.shape[1]
        if self.text is not None:
            self.text.drafted(tokens, lengths, starts, self.active)
        return super().forward(tokens, lengths, starts, tree)

    def rollback(self, lengths: Tensor) -> None:
        """See :class:`arsd.decoding.types.Target`."""
        super().rollback(lengths)
        if self.text is not None:
            self.text.lengths = lengths

    def pass_over(self, cache: RowCache, tokens: Tensor, lengths: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """A pass of guesses over another cache of the same model; logits [S, M, T, V].

        Args:
            cache: aimed at the pass.
            tokens: [M, T] guesses; in the place of the first one behind the prompt, the last token of the prompt is read.
            lengths: [M] tokens known before.
            positions: [S * M, T] of the tokens, counted from the last token of the prompt on.
            mask: what they attend to, as :meth:`arsd.cache.RowCache.begin` gives it.
        """
        embeds = self._with_condition(self.embed(tokens).to(self.dtype).expand(self.streams, -1, -1, -1), lengths)
        inputs = {"inputs_embeds": embeds.reshape(-1, *embeds.shape[2:])}
        logits = self._call(positions + self.unread, mask, inputs, cache)
        return logits.view(self.streams, self.batch, *logits.shape[1:])

    def _pass(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        inputs = {"inputs_embeds": embeds.reshape(-1, *embeds.shape[2:])}
        return self._observed(positions, mask, inputs)

    def _observed(self, positions: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        observer = self.observer or (NOBODY if self._packs(positions.shape[1]) else None)
        with nullcontext() if observer is None else observed(self.model, observer):
            return self._call(positions, mask, inputs, self.cache)

    def _packs(self, width: int) -> bool:
        """Whether a pass goes without copies of the keys for every query head, as transformers' passes of one token do."""
        config = self.decoder.config
        grouped = config.num_attention_heads > self.layout.heads
        return grouped and 1 < width <= PACKED_QUERIES and own_implementation(config) == "sdpa"

    def _harmless_step(self, pass_tokens: int) -> int | None:
        if not self._packs(pass_tokens):
            return super()._harmless_step(pass_tokens)
        rows, heads, size, head_dim = cast(Any, self.cache.layers[0]).keys.shape
        queries = pass_tokens * (self.decoder.config.num_attention_heads // heads)
        return harmless_step(rows, heads, heads, queries, size, head_dim, self.dtype, str(self.device))

    def _call(self, positions: Tensor, mask: Tensor, inputs: dict[str, Any], cache: RowCache) -> Tensor:
        told = self._told.gather(-1, positions.expand(*self._told.shape[:-1], -1))
        where = {"attention_mask": mask, "position_ids": told, "past_key_values": cache}
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
    key = (embeds.dtype, embeds.device, own_implementation(config), torch.is_autocast_enabled(embeds.device.type))
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
