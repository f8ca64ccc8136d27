"""The second, small cache of a sparse draft: what was kept of the prompt, and everything behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from arsd.cache import RowCache, RowCacheLayer
from arsd.models.selection import Kept


class CompactLayer(RowCacheLayer):
    """Kept entries of the prompt [R, G, K, d], K of the layer's own, then entries of the text behind it."""

    _base: Tensor | None = None

    @property
    def _owner(self) -> CompactCache:
        return cast(CompactCache, super()._owner)

    def keep(self, kept: Kept, dense: Any) -> None:
        """Copy the kept entries of the ``dense`` layer; what lies behind the prompt moves along with K."""
        count, tail = kept.index.shape[-1], self._owner.tail
        behind = self.keys.shape[2] - tail
        for name in ("keys", "values"):
            there, here = getattr(dense, name), getattr(self, name)
            index = kept.index.to(there.device)[..., None].expand(-1, -1, -1, there.shape[-1])
            if count != behind:
                grown = here.new_zeros(*here.shape[:2], count + tail, here.shape[-1])
                grown[:, :, count:] = here[:, :, behind:]
                setattr(self, name, grown)
                here = grown
            here[:, :, :count] = there.gather(2, index)
        if count != behind:
            self._base = None

    def place(self, positions: Tensor) -> Tensor:
        """[R * G * T] flat places of the positions [R, T] behind the prompt."""
        rows, groups, size = self.keys.shape[:3]
        if self._base is None:
            first = torch.arange(rows * groups, device=self.keys.device).view(rows, groups, 1) * size
            self._base = first + size - self._owner.tail
        return (self._base + positions.to(self.keys.device)[:, None]).flatten()

    def copy(self, dense: RowCacheLayer, places: Tensor, slots: Tensor) -> None:
        """Take the entries at flat ``slots`` of the ``dense`` layer for ``places`` of :meth:`place`."""
        width = self.keys.shape[-1]
        for mine, other in ((self.keys, dense.keys), (self.values, dense.values)):
            mine.view(-1, width).index_copy_(0, places, other.view(-1, width).index_select(0, slots.to(other.device)))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new entries [R, G, T, d] behind the prompt; all that this pass attends to."""
        owner, width = self._owner, self.keys.shape[-1]
        flat = self.place(owner.places)
        self.keys.view(-1, width).index_copy_(0, flat, key_states.reshape(-1, width))
        self.values.view(-1, width).index_copy_(0, flat, value_states.reshape(-1, width))
        end = self.keys.shape[2] - owner.tail + owner.attended
        return self.keys[:, :, :end], self.values[:, :, :end]


class CompactCache(RowCache):
    """A cache of sparse passes, and the :class:`arsd.models.attention.Observer` that gives each layer its mask.

    Lengths, positions and ``attended`` count from the last token of the prompt on (position 0); the kept entries of the
    prompt lie before that and are always attended to.

    Args:
        dense: the cache of the target.
        tail: places behind the prompt: its last token, the answer, and the overhang of the last pass.
    """

    layer_class = CompactLayer
    layers: list[Any]

    def __init__(self, dense: RowCache, tail: int) -> None:
        layers = cast(list[RowCacheLayer], dense.layers)
        first, places = layers[0], [layer.keys.device for layer in layers]
        rows, groups, _, head_dim = first.keys.shape
        shape = len(places), rows, groups, tail, head_dim
        super().__init__(*shape, first.keys.dtype, dense.lengths.device, places=places)
        self.tail, self._dense = tail, dense
        self._unused: list[Tensor | None] = [None] * len(places)
        self._level, self._behind, self._masks = False, torch.empty(0), dict[int, Tensor | None]()

    def keep(self, kept: Sequence[Kept]) -> None:
        """Hold these entries of the prompt, a choice for every layer."""
        for i, (layer, choice, dense) in enumerate(zip(self.layers, kept, self._dense.layers, strict=True)):
            layer.keep(choice, dense)
            self._unused[i] = choice.hidden if bool(choice.hidden.any()) else None

    def copy(self, first: Tensor, width: int, unread: int) -> None:
        """Take ``width`` entries from position ``first`` [R] on from the dense cache; there ``unread`` slots lie before."""
        positions = (first[:, None] + torch.arange(width, device=first.device)).clamp_max(self.tail - 1)
        slots = (self._dense.row_base + (positions + unread)[:, None]).flatten()
        for layer, dense in zip(self.layers, self._dense.layers, strict=True):
            layer.copy(dense, layer.place(positions), slots)

    def begin_row_passes(self, lengths: Tensor, starts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """Aim the next pass of ``width`` tokens at the positions from ``lengths`` [R] (``starts`` on the host) on."""
        self.rollback(lengths)
        positions, mask = self.begin(width, attended=max(starts) + width)
        self._level = width == 1 and min(starts) == max(starts)  # then nothing behind the prompt is out of sight
        self._behind, self._masks = mask, {}
        return positions, mask

    def mask(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """See :class:`arsd.models.attention.Observer`."""
        unused, kept = self._unused[layer], self.layers[layer].keys.shape[2] - self.tail
        if unused is None and self._level:
            return None
        key = kept if unused is None else -1 - layer
        if key not in self._masks:
            before = self._behind.new_zeros(*self._behind.shape[:3], kept)
            if unused is not None:
                before.masked_fill_(unused[:, None, None], torch.finfo(before.dtype).min)
            self._masks[key] = torch.cat([before, self._behind], -1)
        return self._masks[key]

    def saw(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Nothing is looked at in sparse passes."""
