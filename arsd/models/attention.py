"""An attention implementation that lets a call look on, registered with transformers as ``arsd``.

Without an observer it is ``sdpa``. With one (:func:`observed`), the observer sees the queries and keys of every layer of the
text stack beside the ordinary kernel, and may give each layer a mask of its own. Nothing of a model is copied or patched:
implementations are looked up by the name in the configuration, which is put back afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from arsd.errors import InputError
from arsd.models.visual import text_config

NAME = "arsd"
PACKED_QUERIES = 64  # passes of so few tokens run on the key/value heads as they are


class Observer(Protocol):
    """What looks on in a pass."""

    def mask(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """The additive mask [R, 1, T, S] of a layer, in the place of the model's own ``mask``; ``None``: see everything."""
        ...

    def saw(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """A layer is about to attend: ``query`` [R, H, T, d] and ``key`` [R, G, S, d], both behind the rotary embedding."""
        ...


class Nobody:
    """Looks at nothing: passes of a few tokens run on the key/value heads as they are (:func:`packed`)."""

    def mask(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """The model's own."""
        return mask

    def saw(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Nothing to see."""


NOBODY = Nobody()
_OBSERVER: ContextVar[Observer | None] = ContextVar("arsd_attention_observer", default=None)
_LOCK, _USERS = threading.Lock(), dict[int, list[Any]]()  # configuration -> [how many use it, its own implementation]


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``sdpa``, with the observer of this call looking on."""
    observer, layer = _OBSERVER.get(), getattr(module, "layer_idx", None)
    if observer is not None and layer is not None:
        attention_mask = observer.mask(layer, attention_mask)
        observer.saw(layer, query, key, scaling)
        if _packable(query, key, attention_mask, dropout, kwargs):
            return packed(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Grouped-query attention without copies of the keys: the heads of a group are further rows of queries.

    Args:
        query: [R, H, T, d].
        key: [R, G, S, d], H a multiple of G.
        value: likewise.
        mask: additive, [R, 1, T, S].
        scaling: of the scores.

    Returns:
        [R, T, H, d].
    """
    rows, heads, width, head_dim = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, -1, head_dim)
    if mask is not None and width > 1:
        mask = mask[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(2, 3)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.view(rows, heads, width, -1).transpose(1, 2).contiguous()


def _packable(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> bool:
    width, grouped = query.shape[2], query.shape[1] > key.shape[1]
    plain = not dropout and kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    shared = width == 1 if mask is None else mask.ndim == 4 and mask.shape[1] == 1
    return grouped and plain and shared and width <= PACKED_QUERIES


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def own_implementation(config: Any) -> str:
    """The attention implementation of a configuration, whoever looks on just now."""
    with _LOCK:
        users = _USERS.get(id(config))
        return str(config._attn_implementation if users is None else users[1])


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[None]:
    """Let ``observer`` look on in the passes of this thread; other threads that use the model notice nothing.

    Raises:
        InputError: when the model attends with another kernel than sdpa.
    """
    config = text_config(model)
    with _LOCK:
        users = _USERS.setdefault(id(config), [0, config._attn_implementation])
        if users[1] != "sdpa":
            del _USERS[id(config)]
            raise InputError(f"attn_implementation={users[1]!r} cannot be observed: load the model with 'sdpa'")
        users[0] += 1
        config._attn_implementation = NAME
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)
        with _LOCK:
            users[0] -= 1
            if not users[0]:
                config._attn_implementation = users[1]
                del _USERS[id(config)]
