"""A preallocated key/value cache with a length per row, behind transformers' cache interface.

Nothing is ever concatenated, and nothing but the accepted path of a tree is moved: a pass scatters its new entries, rolling
back assigns lengths, and stale entries are masked until they are overwritten. Attention runs over the buffers under a 4-D
mask, so that the bits of a pass do not depend on how far a row has come: over the full buffers, or, where
:func:`harmless_step` has found that it makes no difference in any bit, over as many slots as the farthest row needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowCacheLayer(CacheLayerMixin):
    """Keys and values [B, H, S, d] of one decoder layer; entries go to the flat slots of the pass in progress."""

    is_compileable = True

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, owner: RowCache) -> None:
        super().__init__()
        self.keys: Tensor = torch.zeros(shape, dtype=dtype, device=device)  # zeros: a NaN behind the mask would leak
        self.values: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.is_initialized = True
        self._pass = weakref.ref(owner)  # a cycle would keep the buffers until the garbage collector comes by

    @property
    def _owner(self) -> RowCache:
        owner = self._pass()
        assert owner is not None
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers exist from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new entries [B, H, T, d] and return the buffers as far as this pass attends."""
        owner, width = self._owner, self.keys.shape[-1]
        flat = owner.slots_on(self.keys.device)
        self.keys.view(-1, width).index_copy_(0, flat, key_states.reshape(-1, width))
        self.values.view(-1, width).index_copy_(0, flat, value_states.reshape(-1, width))
        return self.keys[:, :, : owner.attended], self.values[:, :, : owner.attended]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(attended slots, 0)."""
        return self._owner.attended, 0

    def get_seq_length(self) -> int:
        """0: positions and mask are always given explicitly, never derived from here."""
        return 0

    def get_max_length(self) -> int:
        """S."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """S (the name of ``get_max_length`` before transformers 5.20)."""
        return self.keys.shape[2]


class RowCache(Cache):
    """All layers, the committed length of each row, and the mask of the pass in progress.

    Use: ``begin(T)`` before a pass over T tokens (sets write slots, returns positions and mask), then ``rollback(lengths)``.
    Do not hand it to ``generate()``.

    Args:
        num_layers: decoder layers.
        batch: rows B (streams included).
        heads: key/value heads H.
        size: slots S per row: condition + tokens + the overhang of the last pass.
        head_dim: d.
        dtype: of keys, values and mask.
        device: of all tensors.
        hidden: [B, S] slots that no token may attend to (padded condition), or ``None`` when there never are any.
        places: the device of each layer's entries; ``None`` or too few: ``device``.
    """

    layer_class = RowCacheLayer

    def __init__(
        self,
        num_layers: int,
        batch: int,
        heads: int,
        size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        hidden: Tensor | None = None,
        places: Sequence[torch.device] | None = None,
    ) -> None:
        device = torch.device(device)
        shape = (batch, heads, size, head_dim)
        places = places if places and len(places) == num_layers else [device] * num_layers
        layers: list[Any] = [self.layer_class(shape, dtype, place, self) for place in places]
        super().__init__(layers=layers)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.slots = torch.zeros(0, dtype=torch.int64, device=device)
        self._slots_elsewhere: dict[torch.device, Tensor] = {}
        self.places = torch.zeros(batch, 0, dtype=torch.int64, device=device)  # [B, T] slots of the pass in progress
        self.attended = size
        self._size, self._hidden = size, hidden
        self._every_slot = torch.arange(size, device=device)
        self.row_base = (torch.arange(batch * heads, device=device) * size).view(batch, heads, 1)
        self._mask, self._later = torch.empty(0, dtype=dtype, device=device), torch.empty(0, dtype=torch.bool, device=device)

    def begin(self, num_tokens: int, idle: Tensor | None = None, attended: int | None = None) -> tuple[Tensor, Tensor]:
        """Aim the next pass at the slots behind each row's length.

        Args:
            num_tokens: T, tokens of the pass.
            idle: [B], True in rows that only keep the pass in shape: they write to the one slot behind their length.
            attended: slots that attention covers, all that any row needs among them; ``None``: the full buffers.

        Returns:
            positions [B, T] (absolute slots) and the additive mask [B, 1, T, attended], a buffer that the next pass reuses.
        """
        self.attended = self._size if attended is None else min(attended, self._size)
        positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        if idle is not None:
            positions = torch.where(idle[:, None], self.lengths[:, None], positions)
        self.places = positions
        self.slots, self._slots_elsewhere = (self.row_base + positions[:, None]).flatten(), {}
        batch = len(self.lengths)
        shape = (batch * num_tokens, self.attended)
        if self._mask.shape != shape:
            self._mask = torch.empty(shape, dtype=self._mask.dtype, device=positions.device)
            self._later = torch.empty(shape, dtype=torch.bool, device=positions.device)
        torch.gt(self._every_slot[: self.attended], positions.view(-1, 1), out=self._later)
        self._mask.zero_().masked_fill_(self._later, torch.finfo(self._mask.dtype).min)
        mask = self._mask.view(batch, 1, num_tokens, self.attended)
        if self._hidden is not None:
            mask.masked_fill_(self._hidden[:, None, None, : self.attended], torch.finfo(mask.dtype).min)
            mask.scatter_(-1, positions[:, None, :, None], 0.0)  # a padded slot sees itself, or its row would be empty
        return positions, mask

    def begin_tree(self, depths: Tensor, sees: Tensor, attended: int | None = None) -> tuple[Tensor, Tensor]:
        """Aim the next pass as :meth:`begin` does, for tokens that follow each other as a tree.

        Args:
            depths: [B, T] how far each token stands behind the row's length.
            sees: [B, T, T] which tokens of the pass each one attends to: itself, and none behind it.
            attended: see :meth:`begin`.

        Returns:
            Positions [B, T] (length + depth; the slots are :attr:`places`) and the mask, as :meth:`begin` does.
        """
        batch, width = depths.shape
        places, mask = self.begin(width, attended=attended)
        here = places[:, None, None].expand(batch, 1, width, width)
        closed = mask.gather(-1, here).masked_fill_(~sees[:, None], torch.finfo(mask.dtype).min)
        return self.lengths[:, None] + depths, mask.scatter_(-1, here, closed)

    def compact(self, source: Tensor) -> None:
        """Move entries of the pass in progress: column i + 1 becomes what column ``source[:, i]`` [B, D] is now."""
        columns = torch.arange(1, 1 + source.shape[1], device=source.device)
        into, out_of = ((self.row_base + (self.lengths[:, None] + x)[:, None]).flatten() for x in (columns, source))
        for layer in self.layers:
            for entries in (cast(Any, layer).keys, cast(Any, layer).values):
                flat, there = entries.view(-1, entries.shape[-1]), entries.device
                flat.index_copy_(0, into.to(there), flat.index_select(0, out_of.to(there)))

    def slots_on(self, device: torch.device) -> Tensor:
        """:attr:`slots` on the device of a layer; copied once a pass."""
        if device == self.slots.device:
            return self.slots
        if device not in self._slots_elsewhere:
            self._slots_elsewhere[device] = self.slots.to(device)
        return self._slots_elsewhere[device]

    def get_max_length(self) -> int:  # type: ignore[override]
        """S."""
        return self._size

    def hide(self, rows: Tensor, hidden: Tensor) -> None:
        """Other padding [R, S] for ``rows`` [R], whose entries are forgotten."""
        if self._hidden is not None:
            self._hidden[rows] = hidden

    def rollback(self, lengths: Tensor) -> None:
        """Keep ``lengths`` [B] entries per row; what lies behind is overwritten by the next passes."""
        self.lengths = lengths


STEP = 64  # attended slots come in multiples of it


@lru_cache(maxsize=256)
def harmless_step(
    rows: int, heads: int, kv_heads: int, num_tokens: int, size: int, head_dim: int, dtype: torch.dtype, device: str
) -> int | None:
    """In which steps attention may leave out slots behind the farthest row without changing a bit; ``None``: in none.

    Attention is the only operation of a pass whose shape depends on the length of the cache. It is tried here on random
    entries, in the very shape of the pass, for every length in steps of :data:`STEP`. CPU only: GPUs were not measured.

    Args:
        rows: rows B of the model's batch.
        heads: query heads.
        kv_heads: key/value heads.
        num_tokens: T.
        size: S.
        head_dim: d.
        dtype: of queries, keys and values.
        device: as text.
    """
    if not device.startswith("cpu") or size <= STEP:
        return None
    generator = torch.Generator(device).manual_seed(0)
    query, keys, values = (
        torch.randn(rows, h, n, head_dim, generator=generator, device=device).to(dtype)
        for h, n in ((heads, num_tokens), (kv_heads, size), (kv_heads, size))
    )
    keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
    slots = torch.arange(size, device=device)
    for attended in range(STEP, size, STEP):
        last = torch.arange(attended - num_tokens, attended, device=device).clamp_min(0)
        mask = torch.zeros(rows, 1, num_tokens, size, dtype=dtype, device=device)
        mask.masked_fill_(slots > last[:, None], torch.finfo(dtype).min)
        short, full = (
            torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :n], values[:, :, :n], mask[..., :n])
            for n in (attended, size)
        )
        if not torch.equal(short, full):
            return None
    return STEP
