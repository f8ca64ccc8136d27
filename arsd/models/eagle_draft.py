"""EAGLE drafters behind the :class:`arsd.decoding.types.DraftModel` protocol."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.trees import TreeShape, heads_of
from arsd.decoding.types import Target
from arsd.errors import InputError
from arsd.models.eagle import EagleDrafter
from arsd.models.target import DecoderTarget
from arsd.models.token_images import CodeEmbedding


class EagleDraftModel(SmallARDrafter):
    """An :class:`EagleDrafter` beside a :class:`DecoderTarget`, whose features it reads.

    Args:
        drafter: the trained layer.
        rotary: the target's rotary table.
        head: the target's head.
        embed: the target's embedding of its own ids, which a drafter with an embedding of its own does not use.
        condition: as the target's [S, M, P, D]. Where its slots are tokens (Lumina-mGPT, Anole) and the drafter has an
            embedding of its own, they must be looked up there: ``drafter.embed_tokens(ids)``.
        num_tokens: image tokens per picture.
        window: the widest pass.
        padding: as the target's [S, M, P], or ``None``.
        batch: rows.
        given: as the target's [M, F], or ``None``.
        count_padding: as the target's.
        ids: [V] the model's id of each of the loop's ids, where they are not the same.

    Raises:
        InputError: when the drafter does not fit the target.
    """

    CHUNK = 32  # condition slots per pass, at least

    def __init__(
        self,
        drafter: EagleDrafter,
        rotary: nn.Module,
        head: nn.Module,
        embed: nn.Module,
        condition: Tensor,
        num_tokens: int,
        window: int,
        padding: Tensor | None = None,
        batch: int | None = None,
        given: Tensor | None = None,
        count_padding: bool = True,
        ids: Tensor | None = None,
    ) -> None:
        _check_fit(drafter, rotary, head, condition)
        chunk = max(window, self.CHUNK)
        if drafter.embed_tokens is not None:
            embed = drafter.embed_tokens
        if drafter.config["condition_inputs"] == "zero-token":
            condition = embed(condition.new_zeros(1, dtype=torch.int64)).to(condition.dtype).expand(condition.shape)
        embed = embed if ids is None else CodeEmbedding(embed, ids)
        padding = _unread_slots(drafter, condition, padding)
        layers = (_EagleLayers(drafter, rotary), head, embed)
        target = _EagleTarget(*layers, condition, num_tokens, chunk, padding, batch, given, count_padding)
        super().__init__(target, chunk)

    def begin(self, target: Target) -> None:
        """Have the target keep its features.

        Raises:
            InputError: when the target has none.
        """
        super().begin(target)
        if not isinstance(target, DecoderTarget):
            raise InputError("an EAGLE drafter needs a target that keeps its features")
        self.model.source = target.keep_features()

    def catch_up(self, tokens: Tensor, read: list[int], columns: list[int]) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`: on the target's own features."""
        self.model.given = None
        logits = super().catch_up(tokens, read, columns)
        self.before = self._at(self.model.fed, self.column)
        return logits

    def extend_tree(self, tokens: Tensor, tree: TreeShape, depth: int) -> Tensor:
        """See :class:`arsd.decoding.types.TreeDraftModel`: every node reads the predicted feature of its parent."""
        guessed = self.model.given if depth == 1 else self.model.predicted
        assert guessed is not None
        known = sum(len(tree.level(d)) for d in range(1, depth + 1))
        self.model.given = torch.cat([self.before, guessed[:, heads_of(tree, known, guessed.device)]], dim=1)
        return super().extend_tree(tokens, tree, depth)

    def _pass(self, tokens: Tensor, last: Tensor, columns: list[int]) -> Tensor:
        logits = super()._pass(tokens, last, columns)
        self.column = last
        self.model.given = self._at(self.model.predicted, last)  # stands for the feature of the last token's slot
        return logits

    def _at(self, features: Tensor, column: Tensor) -> Tensor:
        """[S * B, 1, D] of one column [B] of each row."""
        at = column.repeat(self.model.streams)
        return features[torch.arange(len(at), device=features.device), at][:, None]


def _check_fit(drafter: EagleDrafter, rotary: nn.Module, head: nn.Module, condition: Tensor) -> None:
    config, width = drafter.config, condition.shape[-1]
    if width != config["hidden_size"]:
        raise InputError(f"the drafter is {config['hidden_size']} wide, the target {width}: it belongs to another model")
    if drafter.dtype != condition.dtype:
        raise InputError(f"the drafter is {drafter.dtype}, the target {condition.dtype}: give both one dtype, pipe.to(...)")
    first = torch.zeros(1, 1, dtype=torch.int64, device=condition.device)
    head_dim = rotary(condition[0, :1, :1], position_ids=first)[0].shape[-1]
    if head_dim * config["num_heads"] != width:
        raise InputError(
            f"the drafter has {config['num_heads']} heads, the target {width // head_dim}: it belongs to another model"
        )
    vocab = getattr(head, "out_features", 0)
    if drafter.embed_tokens is not None and drafter.embed_tokens.num_embeddings < vocab:
        raise InputError(
            f"the drafter has {drafter.embed_tokens.num_embeddings} ids, the target {vocab}: they must be the same"
        )


def _unread_slots(drafter: EagleDrafter, condition: Tensor, padding: Tensor | None) -> Tensor:
    """Condition slots [S, M, P] that no other slot reads."""
    if drafter.config["see_padding"] or padding is None:
        padding = torch.zeros(condition.shape[:3], dtype=torch.bool, device=condition.device)
    padding = padding.clone()
    if not drafter.config["see_first"]:
        padding.scatter_(-1, (~padding).int().argmax(-1, keepdim=True), True)
    if condition.shape[2] > 1:
        padding[:, :, 0] = True  # the first slot has no feature before it
    return padding


class _EagleTarget(DecoderTarget):
    """The drafter's layer as a decoder whose inputs also carry the feature of the slot before.

    Attributes:
        source: features of the target [S * B, slots, D].
        given: [S * B, T, D] features for the next pass, in the place of the target's own.
        fed: [S * B, T, D] features of the last pass.
        predicted: [S * B, T, D] what came of them.
    """

    source: Tensor
    fed: Tensor
    predicted: Tensor
    given: Tensor | None = None

    def _pass(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        embeds = embeds.reshape(-1, *embeds.shape[2:])
        self.fed = self._features(embeds.shape[1]) if self.given is None else self.given
        self.predicted = super()._pass(torch.cat([embeds, self.fed], dim=-1)[None], positions, mask)
        return self.predicted

    def _features(self, width: int) -> Tensor:
        """The target's own features of the slots before those that a chain of ``width`` tokens takes."""
        lengths = self.cache.lengths[:, None]
        before = lengths + torch.arange(width, device=self.device) - 1
        rows = torch.arange(len(lengths), device=self.device)[:, None]
        return torch.where((before >= 0)[..., None], self.source[rows, before.clamp(0, self.source.shape[1] - 1)], 0.0)


class _EagleLayers:
    """Calls the drafter as transformers calls a decoder; the inputs are [embedding, feature] side by side."""

    def __init__(self, drafter: EagleDrafter, rotary: nn.Module) -> None:
        self.drafter, self.rotary, self.config = drafter, rotary, drafter.block_config

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, use_cache: bool
    ) -> SimpleNamespace:
        embeds, features = inputs_embeds.chunk(2, dim=-1)
        turned = self.rotary(embeds, position_ids=position_ids)
        hidden = self.drafter(embeds, features, attention_mask, turned, past_key_values)
        return SimpleNamespace(last_hidden_state=hidden)
