"""The same weights without some sublayers: a shallow view of a model's tree of modules, which itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arsd.errors import StrategyError


class Sublayer(NamedTuple):
    """An attention (``"a"``) or MLP (``"m"``) sublayer of a decoder layer; ``3a`` is the attention of layer 3."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}{self.kind}"


NAMES = {"a": "self_attn", "m": "mlp"}


class _NoAttention(nn.Module):
    """Adds nothing to the residual stream, and writes nothing into the cache."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.__dict__["_replaced"] = replaced  # no submodule

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros, and no weights."""
        return torch.zeros_like(hidden_states), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_replaced"], name)  # layers may ask whether it is a sliding one


class _NoMLP(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_states)


def num_layers(model: Any) -> int:
    """Decoder layers of a model whose sublayers can be skipped.

    Raises:
        StrategyError: for a model whose decoder layers are not made of ``self_attn`` and ``mlp``.
    """
    return len(_way_to_layers(model)[-1][1])


def skipping(model: Any, sublayers: Iterable[Sublayer]) -> Any:
    """The model without ``sublayers``: the same parameters, and modules of its own only where something is left out.

    Args:
        model: a causal model of transformers.
        sublayers: what is left out.

    Returns:
        A model of the same class.

    Raises:
        StrategyError: for a model that cannot be taken apart so.
    """
    way = _way_to_layers(model)
    views = [_view(module) for _, module in way]
    for (name, _), above, below in zip(way[1:], views, views[1:], strict=False):
        above._modules[name] = below
    layers: dict[str, nn.Module] = {}
    for layer, kind in sublayers:
        name = str(layer)
        if name not in layers:
            layers[name] = views[-1]._modules[name] = _view(way[-1][1][layer])
        replaced = getattr(layers[name], NAMES[kind])
        layers[name]._modules[NAMES[kind]] = _NoAttention(replaced) if kind == "a" else _NoMLP()
    return views[0]


def _view(module: Any) -> Any:
    """The module with a dictionary of submodules of its own."""
    if "forward" in vars(module):  # which would go on to the modules of the model itself
        name = type(module).__name__
        raise StrategyError(f"layer-skip needs a plain model, and the forward of {name} is wrapped (device_map, compile)")
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def _way_to_layers(model: Any) -> list[tuple[str, Any]]:
    """(name in its parent, module) from the model down to the list of decoder layers."""
    layers = getattr(model.get_decoder(), "layers", None)
    found = list(layers) if isinstance(layers, nn.ModuleList) else []
    if len(found) < 3 or not all(hasattr(layer, name) for layer in found for name in NAMES.values()):
        raise StrategyError(
            f"layer-skip needs a decoder of three or more layers of self_attn and mlp, which {type(model).__name__} has not"
        )
    path = next(name for name, module in model.named_modules() if module is layers)
    way, at = [("", model)], model
    for name in path.split("."):
        at = at._modules[name]
        way.append((name, at))
    return way
