"""Enumerable AR table models, and the statistics that hold the production sampler against their exact laws.

Everything is float64 on the CPU: these models prove a method, they draw nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import CounterNoise, DecodeRequest, DecodeResult, Grammar, LawConfig, Laws, Parts, Setting, decode
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.trees import TreeShape, tables

Build = Callable[[Setting], Parts]


class TableTarget:
    """A target whose float64 logits are a table over the whole prefix: another law for every prefix of every stream.

    Args:
        vocab: ids, V.
        num_tokens: tokens of a sequence, N; the tables hold V ** N rows in all.
        batch: rows, B.
        streams: 2 for guidance (conditional, unconditional), else 1.
        seed: of the random tables.
        sharpness: standard deviation of the logits.
    """

    def __init__(
        self, vocab: int, num_tokens: int, batch: int, streams: int = 1, seed: int = 0, sharpness: float = 1.5
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.num_tokens, self.batch, self.streams = vocab, num_tokens, batch, streams
        self.device, self.dtype, self.unread = torch.device("cpu"), torch.float64, 0
        self.first = 0
        self.set_tables(
            [
                sharpness * torch.randn(streams, vocab**n, vocab, generator=generator, dtype=torch.float64)
                for n in range(num_tokens)
            ]
        )
        self.offsets = torch.tensor([0, *(vocab**n for n in range(num_tokens))]).cumsum(0)
        self.context = torch.zeros(batch, num_tokens + 130, dtype=torch.int64)  # what a KV cache would remember
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.seed, self.sharpness = seed, sharpness

    def small(self) -> TableTarget:
        """A draft model for this one: logits that are half these and half those of another seed."""
        other = TableTarget(self.vocab, self.num_tokens, self.batch, self.streams, self.seed + 1000, self.sharpness)
        other.flat = (self.flat + other.flat) / 2
        return other

    def set_tables(self, tables: list[Tensor]) -> None:
        """Logits [S, V ** n, V] of every position n."""
        self.tables = tables
        past_the_end = torch.zeros(self.streams, 1, self.vocab, dtype=torch.float64)
        self.flat = torch.cat([*tables, past_the_end], dim=1)

    def prefill(self, starts: list[int], pass_tokens: int) -> int:
        """Nothing to read: 0 passes."""
        return 0

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Forget the context of ``rows``: every picture has the same condition."""
        self.context[rows] = 0

    def rollback(self, lengths: Tensor) -> None:
        """Note the committed lengths [B], which the next pass must start from."""
        self.lengths = lengths.clone()

    def remember(self, tokens: Tensor, lengths: Tensor, starts: list[int]) -> Tensor:
        """Write one pass into the context; slot s holds token s - 1, slot 0 is the condition. Returns the slots [B, T]."""
        assert torch.equal(self.lengths, lengths) and lengths.tolist() == starts
        slots = lengths[:, None] + torch.arange(tokens.shape[1])
        self.context.scatter_(1, slots, tokens)
        return slots

    def compact(self, path: Tensor, count: Tensor) -> None:
        """Keep the accepted path of a tree; see :class:`arsd.decoding.types.Target`."""
        columns = torch.arange(1, 1 + path.shape[1])
        source = torch.where(columns < count[:, None], path + 1, columns)
        first = self.lengths[:, None]
        self.context.scatter_(1, first + columns, self.context.gather(1, first + source))

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int], tree: TreeShape | None = None) -> Tensor:
        """Logits [S, B, T, V] of one pass; see :class:`arsd.decoding.types.Target`."""
        slots = self.remember(tokens, lengths, starts)
        index = torch.zeros(self.batch, self.num_tokens + 1, dtype=torch.int64)  # row of tables[n] that a prefix selects
        for n in range(1, self.num_tokens):
            index[:, n] = index[:, n - 1] * self.vocab + self.context[:, n]
        if tree is None:
            position = slots.clamp_max(self.num_tokens)
            return self.flat[:, self.offsets[position] + index.gather(1, position)]
        position = lengths[:, None] + tables(tree, tokens.shape[1], self.device).depths
        number = [index.gather(1, lengths[:, None].clamp_max(self.num_tokens))[:, 0]]
        for column in range(1, tokens.shape[1]):
            parent = tree.parents[column - 1] if column < tree.columns else 0
            number.append(number[parent] * self.vocab + tokens[:, column])
        inside = position < self.num_tokens
        row = torch.where(inside, self.offsets[position.clamp_max(self.num_tokens)] + torch.stack(number, 1), -1)
        return self.flat[:, row]


class HashTarget(TableTarget):
    """Like a table model, for sequences too long to enumerate: logits are a hash of the position and the last few tokens.

    Args: those of :class:`TableTarget`.
    """

    ROWS = 997

    def __init__(
        self, vocab: int, num_tokens: int, batch: int, streams: int = 1, seed: int = 0, sharpness: float = 2.0
    ) -> None:
        super().__init__(vocab, 1, batch, streams, seed)
        self.num_tokens = num_tokens
        generator = torch.Generator().manual_seed(seed)
        self.table = sharpness * torch.randn(streams, self.ROWS, vocab, generator=generator, dtype=torch.float64)
        self.context = torch.zeros(batch, num_tokens + 200, dtype=torch.int64)
        self.sharpness = sharpness

    def small(self) -> HashTarget:
        """See :meth:`TableTarget.small`."""
        other = HashTarget(self.vocab, self.num_tokens, self.batch, self.streams, self.seed + 1000, self.sharpness)
        other.table = (self.table + other.table) / 2
        return other

    def forward(self, tokens: Tensor, lengths: Tensor, starts: list[int], tree: TreeShape | None = None) -> Tensor:
        """Logits [S, B, T, V] of one pass; see :class:`arsd.decoding.types.Target`."""
        slots = self.remember(tokens, lengths, starts)
        own, parent, depth = slots, slots - 1, slots
        if tree is not None:
            columns = torch.tensor([-1, *tree.parents, *[0] * (tokens.shape[1] - tree.columns)])
            parent = lengths[:, None] + columns
            depth = lengths[:, None] + tables(tree, tokens.shape[1], self.device).depths
        key = torch.zeros_like(slots)
        for back, (factor, read) in enumerate(((7, own), (31, parent))):  # depends weakly on far tokens, as pictures do
            seen = self.context.gather(1, read.clamp_min(0)) % (5 - 2 * back)
            key = key + factor * torch.where(depth - back > 0, seen, 0)
        return self.table[:, (key * 13 + depth) % self.ROWS]


def random_codebook(vocab: int) -> Tensor:
    """Code vectors [V, 2] for rules that look at neighbours."""
    return torch.randn(vocab, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(
    target: Any,
    strategy: Any = None,
    *,
    config: LawConfig | None = None,
    grammar: Grammar | None = None,
    seeds: list[int] | None = None,
    images: list[int] | None = None,
    noise: Any = None,
    row_length: int = 0,
    frame_length: int = 0,
    parts: Build | None = None,
    draft: dict[str, Any] | None = None,
    **request: Any,
) -> DecodeResult:
    """Decode a target with a strategy (or with ``parts``), as a pipeline does.

    Args:
        target: the model, with ``batch`` rows.
        strategy: a :class:`arsd.decoding.DecodingStrategy`; not needed with ``parts``.
        config: sampling options; plain sampling when not given.
        grammar: forced and allowed ids; its ``num_tokens`` are decoded.
        seeds: one per picture, 0 when not given.
        images: index of each picture; 0, 1, ... when not given.
        noise: stands in for the production noise, e.g. a choice tape.
        row_length: tokens per line of the picture.
        frame_length: tokens from one frame of a clip to the next.
        parts: makes the parts of the loop, instead of ``strategy``.
        draft: ``codebook`` and ``draft_model`` of :class:`arsd.decoding.Setting`; by default a random codebook, and a model
            that is half the target.
        request: more of :class:`arsd.decoding.DecodeRequest`.
    """
    grammar = grammar or Grammar(target.num_tokens, target.vocab)
    laws = Laws(config or LawConfig(), grammar)
    count = request.get("pictures") or target.batch
    noise = noise or CounterNoise(seeds or [0] * count, images or list(range(count)), batch=target.batch)
    call = (target.batch, grammar.num_tokens, row_length, grammar, noise, target.device)
    given: dict[str, Any] = {"codebook": random_codebook(target.vocab), "given": request.get("given")}
    if hasattr(target, "small"):
        given["draft_model"] = lambda window: SmallARDrafter(target.small(), window)
    setting = Setting(*call, laws=laws, frame_length=frame_length, **{**given, **(draft or {})})
    wanted = DecodeRequest(grammar.num_tokens, row_length, **request)
    return decode(target, (parts or strategy.build)(setting), laws, noise, wanted, target.batch)


@dataclass(frozen=True)
class World:
    """An enumerable task: a table model, sampling options and a grammar. Sequences are numbered in base ``vocab``.

    Args:
        vocab: ids, V.
        num_tokens: tokens of a sequence, N.
        seed: of the table model.
        config: sampling options; a guidance scale other than 1 gives the model a second stream.
        forced: ``{position: token}``.
        forbidden: one id per position that may not stand there, ``{position: token}``.
        row_length: tokens per line, for drafters that look up.
        frame_length: tokens per frame, for drafters that look back.
        sharpness: standard deviation of the logits.
        tables: logits [V ** n, V] of every position n, instead of random ones.
    """

    vocab: int
    num_tokens: int
    seed: int = 0
    config: LawConfig = field(default_factory=LawConfig)
    forced: dict[int, int] = field(default_factory=dict)
    forbidden: dict[int, int] = field(default_factory=dict)
    row_length: int = 2
    frame_length: int = 2
    sharpness: float = 1.5
    tables: Sequence[Tensor] | None = None

    def target(self, batch: int) -> TableTarget:
        """The model with ``batch`` rows."""
        streams = 2 if self.config.guidance_scale != 1 else 1
        target = TableTarget(self.vocab, self.num_tokens, batch, streams, self.seed, self.sharpness)
        if self.tables is not None:
            target.set_tables([table.expand(streams, -1, -1) for table in self.tables])
        return target

    def grammar(self) -> Grammar:
        """What each position may hold."""
        if not self.forbidden:
            return Grammar(self.num_tokens, self.vocab, self.forced)
        allowed = torch.ones(self.num_tokens, self.vocab, dtype=torch.bool)
        for position, token in self.forbidden.items():
            allowed[position, token] = False
        return Grammar(self.num_tokens, self.vocab, self.forced, allowed, range(self.num_tokens))

    def law(self) -> Tensor:
        """Probability of every sequence [V ** N] under plain autoregressive decoding."""
        target, laws = self.target(1), Laws(self.config, self.grammar())
        mass = torch.ones(1, dtype=torch.float64)
        for n, table in enumerate(target.tables):
            probs = laws(table[:, :, None], torch.full((table.shape[1], 1), n)).probs[:, 0]
            mass = (mass[:, None] * probs).flatten()
        return mass

    def number(self, tokens: Tensor) -> Tensor:
        """The number of every row of ``tokens`` [B, n], in base V."""
        number = torch.zeros(len(tokens), dtype=torch.int64)
        for n in range(tokens.shape[1]):
            number = number * self.vocab + tokens[:, n]
        return number

    def decode(self, batch: int, build: Build, noise: Any, **request: Any) -> DecodeResult:
        """Run the production loop with the parts of ``build`` on ``batch`` rows."""
        size = {"row_length": self.row_length, "frame_length": self.frame_length}
        request = {"config": self.config, "grammar": self.grammar(), **size, **request}
        return run(self.target(batch), parts=build, noise=noise, **request)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half of the summed absolute differences of two laws: 0 for equal ones, at most 1."""
    return float((p - q).abs().sum() / 2)


def chi_square_z(numbers: Tensor, law: Tensor) -> float:
    """Chi-square of drawn cell numbers against their exact law, as a standard normal z; cells expected < 5 times are merged.

    By Wilson and Hilferty's cube root (1931): (chi2 - df) / sqrt(2 df) is skewed, and with 80 degrees of freedom exceeds 5
    about 60 times as often as a normal variable. A draw in a cell of probability 0 gives infinity, a law of one cell 0.
    """
    counts = torch.bincount(numbers, minlength=len(law)).double()
    if bool((counts[law == 0] > 0).any()):
        return float("inf")
    expected = law * len(numbers)
    rare = expected < 5
    observed, expected = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    keep = expected > 0
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    if not freedom:
        return 0.0
    spread = 2 / (9 * freedom)
    return float(((chi2 / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def sample(world: World, build: Build, count: int, images_per_seed: int = 250, noise: Any = CounterNoise) -> Tensor:
    """Tokens [count, N] from the production sampler: consecutive images of consecutive seeds, one row each."""
    seeds = [1 + row // images_per_seed for row in range(count)]
    source = noise(seeds, [row % images_per_seed for row in range(count)])
    source.AHEAD = 4  # the same numbers, made in smaller steps: the sequences are short
    return world.decode(count, build, source).tokens


def law_z(world: World, tokens: Tensor) -> float:
    """z of whole sequences against the exact law."""
    return chi_square_z(world.number(tokens), world.law())


def pairs_z(world: World, tokens: Tensor) -> float:
    """z of (first two tokens of a row, first two tokens of the row after it) against two independent draws."""
    head = world.law().view(world.vocab**2, -1).sum(1)
    number = world.number(tokens[:, :2])
    return chi_square_z(number[::2] * len(head) + number[1::2], (head[:, None] * head).flatten())
