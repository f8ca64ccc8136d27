"""A transformers decoder behind the :class:`arsd.decoding.types.Target` protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arsd.cache import RowCache
from arsd.errors import InputError


class DecoderTarget:
    """A stock decoder, its head, and the embedded condition of every row and guidance stream.

    Streams lie one after another in the batch of the model: rows [0, B) are conditional, [B, 2B) unconditional. All streams
    of a row carry the same image tokens in one pass.

    Args:
        decoder: a transformers decoder without head (``LlamaModel``, ...), called with ``inputs_embeds``.
        head: hidden states to logits.
        embed: token ids to embeddings.
        condition: embedded condition [S, B, P, D], P >= 1.
        num_tokens: image tokens per row.
        max_pass_tokens: the longest pass.
        padding: [S, B, P], True at padded condition slots; the last slot must be real.
    """

    def __init__(
        self,
        decoder: Any,
        head: nn.Module,
        embed: nn.Module,
        condition: Tensor,
        num_tokens: int,
        max_pass_tokens: int,
        padding: Tensor | None = None,
    ) -> None:
        if condition.ndim != 4 or condition.shape[2] < 1:
            raise InputError(f"the condition must be [streams, rows, slots >= 1, width], not {tuple(condition.shape)}")
        self.decoder, self.head, self.embed = decoder, head, embed
        self.streams, self.batch, self.prefix = condition.shape[:3]
        self.condition = condition.flatten(0, 1)
        self.device, self.dtype = condition.device, condition.dtype
        config = decoder.config
        self.vocab = int(getattr(head, "out_features", config.vocab_size))
        size = self.prefix + num_tokens + max_pass_tokens
        rows = self.streams * self.batch
        hidden = None
        if padding is not None:
            hidden = torch.zeros(rows, size, dtype=torch.bool, device=self.device)
            hidden[:, : self.prefix] = padding.flatten(0, 1)
        self.cache = RowCache(
            config.num_hidden_layers,
            rows,
            config.num_key_value_heads,
            size,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            self.dtype,
            self.device,
            hidden,
        )

    def prefill(self, pass_tokens: int) -> int:
        """Feed all condition slots but the last, in passes of ``pass_tokens`` (one pass when that is 1)."""
        length = self.prefix - 1
        if not length:
            return 0
        step = pass_tokens if pass_tokens > 1 else length
        passes = 0
        for start in range(0, length, step):
            part = self.condition[:, start : start + step]
            part = part[:, : length - start]
            if part.shape[1] < step:  # the pass keeps its shape; what lies behind the condition is overwritten later
                part = torch.cat([part, part.new_zeros(len(part), step - part.shape[1], part.shape[2])], dim=1)
            self.cache.rollback(torch.full_like(self.cache.lengths, start))
            self._run(part)
            passes += 1
        self.cache.rollback(torch.full_like(self.cache.lengths, length))
        return passes

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int]) -> Tensor:
        """See :class:`arsd.decoding.types.Target`."""
        embeds = self.embed(tokens).to(self.dtype).repeat(self.streams, 1, 1)
        if 0 in starts:
            fresh = (lengths == 0).repeat(self.streams)[:, None]
            embeds[:, 0] = torch.where(fresh, self.condition[:, -1], embeds[:, 0])
        logits = self.head(self._run(embeds))
        return logits.view(self.streams, self.batch, *logits.shape[1:])

    def rollback(self, lengths: Tensor) -> None:
        """See :class:`arsd.decoding.types.Target`: entries for all committed tokens but the last."""
        self.cache.rollback((lengths + (self.prefix - 1)).expand(self.streams, -1).flatten())

    def _run(self, embeds: Tensor) -> Tensor:
        positions, mask = self.cache.begin(embeds.shape[1])
        out = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state
