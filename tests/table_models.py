"""Enumerable AR table models: exact laws to hold the production sampler against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from arsd.decoding import CounterNoise, DecodeRequest, Grammar, LawConfig, Laws, Setting, decode


class TableTarget:
    """A target whose logits are a table over the whole prefix (float64): a different law for every prefix of every stream."""

    def __init__(self, vocab: int, num_tokens: int, batch: int, streams: int = 1, seed: int = 0, sharpness: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.num_tokens, self.batch, self.streams = vocab, num_tokens, batch, streams
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.tables = [
            sharpness * torch.randn(streams, vocab**n, vocab, generator=generator, dtype=torch.float64) for n in range(num_tokens)
        ]
        self.context = torch.zeros(batch, 2 * num_tokens + 66, dtype=torch.int64)  # what a KV cache would remember
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def prefill(self, pass_tokens: int) -> int:
        return 0

    def rollback(self, lengths: Tensor) -> None:
        self.lengths = lengths.clone()

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int]) -> Tensor:
        assert torch.equal(self.lengths, lengths) and lengths.tolist() == starts
        rows = torch.arange(self.batch)[:, None]
        slots = lengths[:, None] + torch.arange(tokens.shape[1])  # slot s holds token s - 1; slot 0 is the condition
        self.context[rows, slots] = tokens
        out = torch.zeros(self.streams, self.batch, tokens.shape[1], self.vocab, dtype=torch.float64)
        index = torch.zeros(self.batch, dtype=torch.int64)
        prefix = [index]
        for position in range(int(slots.max())):
            index = index * self.vocab + self.context[:, position + 1]
            prefix.append(index)
        for j in range(tokens.shape[1]):
            for b in range(self.batch):
                n = int(slots[b, j])
                if n < self.num_tokens:
                    out[:, b, j] = self.tables[n][:, prefix[n][b]]
        return out


class HashTarget(TableTarget):
    """Like a table model, for sequences too long to enumerate: logits are a hash of the position and the last few tokens."""

    def __init__(self, vocab: int, num_tokens: int, batch: int, streams: int = 1, seed: int = 0, sharpness: float = 2.0) -> None:
        super().__init__(vocab, 1, batch, streams, seed)
        self.num_tokens, self.rows, self.sharpness = num_tokens, 997, sharpness
        generator = torch.Generator().manual_seed(seed)
        self.table = sharpness * torch.randn(streams, self.rows, vocab, generator=generator, dtype=torch.float64)
        self.context = torch.zeros(batch, num_tokens + 200, dtype=torch.int64)

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int]) -> Tensor:
        assert torch.equal(self.lengths, lengths) and lengths.tolist() == starts
        rows = torch.arange(self.batch)[:, None]
        slots = lengths[:, None] + torch.arange(tokens.shape[1])
        self.context[rows, slots] = tokens
        key = torch.zeros_like(slots)
        for back, factor in enumerate((7, 31)):  # depends weakly on far tokens, as pictures do
            seen = self.context[rows, (slots - back).clamp_min(0)] % (5 - 2 * back)
            key = key + factor * torch.where(slots - back > 0, seen, 0)
        return self.table[:, (key * 13 + slots) % self.rows]


def exact_law(target: TableTarget, laws: Laws) -> dict[tuple[int, ...], float]:
    """Probability of every sequence under plain autoregressive decoding."""
    out = {}
    for sequence in itertools.product(range(target.vocab), repeat=target.num_tokens):
        mass, index = 1.0, 0
        for n, token in enumerate(sequence):
            logits = target.tables[n][:, index][:, None, None]
            mass *= float(laws(logits, torch.tensor([[n]])).probs[0, 0, token])
            index = index * target.vocab + token
        out[sequence] = mass
    return out


def run(target, strategy, *, config=None, grammar=None, seeds=None, images=None, noise=None, row_length=0, parts=None, **request):
    """Decode a target with a strategy, as a pipeline does."""
    grammar = grammar or Grammar(target.num_tokens, target.vocab)
    laws = Laws(config or LawConfig(), grammar)
    noise = noise or CounterNoise(seeds or [0] * target.batch, images or list(range(target.batch)))
    setting = Setting(target.batch, target.num_tokens, row_length, grammar, noise, target.device)
    wanted = DecodeRequest(target.num_tokens, row_length, **request)
    return decode(target, (parts or strategy.build)(setting), laws, noise, wanted, target.batch)
