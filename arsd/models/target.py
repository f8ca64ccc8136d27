"""A transformers decoder behind the :class:`arsd.decoding.types.Target` protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from arsd.cache import RowCache, harmless_step
from arsd.decoding.trees import TreeShape, tables
from arsd.errors import InputError

Place = Callable[[Tensor], Tensor]


def layer_devices(decoder: Any, device: torch.device) -> list[torch.device]:
    """Where each layer of a decoder computes: where a device map says, else on ``device``."""
    hooks = (getattr(layer, "_hf_hook", None) for layer in getattr(decoder, "layers", ()))
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return [device if place is None else torch.device(place) for place in found]


class DecoderTarget:
    """A stock decoder, its head, and the embedded condition of every picture and guidance stream.

    Streams lie one after another in the batch of the model: rows [0, B) are conditional, [B, 2B) unconditional. All streams
    of a row carry the same image tokens in one pass.

    Args:
        decoder: a transformers decoder without head (``LlamaModel``, ...), called with ``inputs_embeds``.
        head: hidden states to logits.
        embed: token ids to embeddings.
        condition: embedded condition of all M pictures [S, M, P, D], P >= 1.
        num_tokens: image tokens per picture.
        max_pass_tokens: the longest pass.
        padding: [S, M, P], True at padded condition slots; where the last one is padded, the first token must be given.
        batch: rows B; at first row b holds picture b. ``None``: as many as pictures.
        given: [M, F] tokens that each picture begins with; they are read along with its condition.
        count_padding: whether padded slots count in the positions that the decoder is told (LlamaGen), or every stream
            begins at position 0 (models of plain text, whose streams have lengths of their own).

    Attributes:
        place: ``positions [S * B, T] -> position_ids`` of a decoder that wants something else than these (GLM-Image).
    """

    place: Place | None = None

    def __init__(
        self,
        decoder: Any,
        head: nn.Module,
        embed: nn.Module,
        condition: Tensor,
        num_tokens: int,
        max_pass_tokens: int,
        padding: Tensor | None = None,
        batch: int | None = None,
        given: Tensor | None = None,
        count_padding: bool = True,
    ) -> None:
        if condition.ndim != 4 or condition.shape[2] < 1:
            raise InputError(f"the condition must be [streams, pictures, slots >= 1, width], not {tuple(condition.shape)}")
        self.decoder, self.head, self.embed = decoder, head, embed
        self.streams, pictures, self.prefix = condition.shape[:3]
        self.batch = min(batch or pictures, pictures)
        self.unread, self.first = self.prefix - 1, 0 if given is None else given.shape[1]
        self.device, self.dtype = condition.device, condition.dtype
        if given is not None:
            condition = torch.cat([condition, embed(given).to(self.dtype).expand(self.streams, -1, -1, -1)], dim=2)
        self.condition, self.padding = condition, padding if padding is not None and bool(padding.any()) else None
        self.pictures = torch.arange(self.batch, device=self.device)  # the picture of each row
        self.active: Sequence[int] = range(self.batch)
        self._slots = torch.arange(max(max_pass_tokens, condition.shape[2]), device=self.device)
        self._shift = None if count_padding or self.padding is None else self._padded(range(self.batch))
        self.cache = self._make_cache(self.prefix + num_tokens + max_pass_tokens)
        self._steps = {max_pass_tokens: self._harmless_step(max_pass_tokens)}
        self.vocab = int(getattr(head, "out_features", decoder.config.vocab_size))
        self.features: Tensor | None = None

    def keep_features(self) -> Tensor:
        """From now on keep what the head reads of every slot, [S * B, slots, D]; a pass overwrites its own slots."""
        if self.features is None:
            shape = (self.streams * self.batch, self.cache.get_max_length(), self.condition.shape[-1])
            self.features = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.features

    def _make_cache(self, size: int) -> RowCache:
        config, rows = self.decoder.config, self.streams * self.batch
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        hidden = None
        if self.padding is not None:
            hidden = torch.zeros(rows, size, dtype=torch.bool, device=self.device)
            hidden[:, : self.prefix] = self.padding[:, : self.batch].flatten(0, 1)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        places = layer_devices(self.decoder, self.device)
        return RowCache(layers, rows, heads, size, head_dim, self.dtype, self.device, hidden, places)

    def prefill(self, starts: list[int], pass_tokens: int) -> int:
        """See :class:`arsd.decoding.types.Target`: in passes of ``pass_tokens``, or one long pass when that is 1."""
        behind, passes = self.first - min(self.first, *starts), 0
        step = pass_tokens if pass_tokens > 1 else behind
        lengths = torch.tensor(starts, device=self.device)
        while behind > 0:
            self.rollback(lengths)
            embeds = self._with_condition(self.condition.new_zeros(1).expand(self._shape(step)), lengths)
            self._run(embeds, idle=(lengths >= self.first).repeat(self.streams))
            lengths = torch.where(lengths < self.first, (lengths + step).clamp_max(self.first), lengths)
            behind, passes = behind - step, passes + 1
        return passes

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int], tree: TreeShape | None = None) -> Tensor:
        """See :class:`arsd.decoding.types.Target`."""
        embeds = self.embed(tokens).to(self.dtype).expand(self.streams, -1, -1, -1)
        if min(starts) <= self.first:
            embeds = self._with_condition(embeds, lengths)
        attended = self._attended(starts, tokens.shape[1])
        hidden = self._run(embeds, attended=attended) if tree is None else self._run_tree(embeds, lengths, tree, attended)
        logits = self.head(hidden)
        return logits.view(self.streams, self.batch, *logits.shape[1:])

    def compact(self, path: Tensor, count: Tensor) -> None:
        """See :class:`arsd.decoding.types.Target`."""
        columns = torch.arange(1, 1 + path.shape[1], device=path.device)
        source = torch.where(columns < count[:, None], path + 1, columns).repeat(self.streams, 1)
        self.cache.compact(source)
        if self.features is not None:
            rows, first = torch.arange(len(source), device=path.device)[:, None], self.cache.lengths[:, None]
            self.features[rows, first + columns] = self.features[rows, first + source]

    def rollback(self, lengths: Tensor) -> None:
        """See :class:`arsd.decoding.types.Target`: entries for all committed tokens but the last."""
        self.cache.rollback((lengths + self.unread).expand(self.streams, -1).flatten())

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.Target`."""
        self.pictures[rows] = torch.tensor(pictures, device=self.device)
        if self.padding is not None:
            index = torch.tensor([s * self.batch + b for s in range(self.streams) for b in rows], device=self.device)
            hidden = self.padding.new_zeros(len(index), self.cache.get_max_length())
            hidden[:, : self.prefix] = self.padding[:, pictures].flatten(0, 1)
            self.cache.hide(index, hidden)
            if self._shift is not None:
                self._shift[index] = self._padded(pictures)

    def _padded(self, pictures: Iterable[int]) -> Tensor:
        """[S * B, 1] padded slots of the rows that hold ``pictures``, stream by stream."""
        assert self.padding is not None
        return self.padding[:, list(pictures)].flatten(0, 1).sum(-1, keepdim=True)

    def _harmless_step(self, pass_tokens: int) -> int | None:
        config, cache = self.decoder.config, self.cache
        if config._attn_implementation != "sdpa":
            return None
        keys = cast(Any, cache.layers[0]).keys
        rows, kv_heads, size, head_dim = keys.shape
        shape = (rows, config.num_attention_heads, kv_heads, pass_tokens, size, head_dim)
        return harmless_step(*shape, self.dtype, str(self.device))

    def _attended(self, starts: list[int], width: int) -> int | None:
        """Slots that attention must cover: as far as the farthest row goes, in steps that make no difference."""
        if width not in self._steps:
            self._steps[width] = self._harmless_step(width)
        step = self._steps[width]
        return None if step is None else -(-(self.unread + max(starts) + width) // step) * step

    def _shape(self, width: int) -> tuple[int, int, int, int]:
        return self.streams, self.batch, width, self.condition.shape[-1]

    def _with_condition(self, embeds: Tensor, lengths: Tensor) -> Tensor:
        """``embeds`` [S, B, T, D] with condition slots where the pass lies in the condition."""
        slots = (self.unread + lengths)[:, None] + self._slots[: embeds.shape[2]]
        known = self.condition.shape[2]
        given = self.condition[:, self.pictures[:, None], slots.clamp_max(known - 1)]
        return torch.where((slots < known)[..., None], given, embeds)

    def _run(self, embeds: Tensor, idle: Tensor | None = None, attended: int | None = None) -> Tensor:
        return self._pass(embeds, *self.cache.begin(embeds.shape[-2], idle, attended))

    def _run_tree(self, embeds: Tensor, lengths: Tensor, tree: TreeShape, attended: int | None) -> Tensor:
        """A pass over the columns of a tree; a row that reads its condition feeds a chain."""
        depths, sees = tables(tree, embeds.shape[-2], self.device)[:2]
        reading, slots = (lengths < self.first)[:, None], self._slots[: embeds.shape[-2]]
        depths = torch.where(reading, slots, depths).repeat(self.streams, 1)
        sees = torch.where(reading[..., None], slots[:, None] >= slots, sees).repeat(self.streams, 1, 1)
        return self._pass(embeds, *self.cache.begin_tree(depths, sees, attended))

    def _pass(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        embeds = embeds.reshape(-1, *embeds.shape[2:])
        if self._shift is not None:
            positions = (positions - self._shift).clamp_min(0)  # what a padded slot reads does not matter
        if self.place is not None:
            positions = self.place(positions)
        out = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = cast(Tensor, out.last_hidden_state)
        if self.features is not None:
            rows = torch.arange(len(hidden), device=hidden.device)[:, None]
            self.features[rows, self.cache.places] = hidden
        return hidden
