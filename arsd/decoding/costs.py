"""What passes cost where memory traffic decides: bytes read, and what guessing is worth by it.

Symbols: W bytes of weights that a pass reads, kappa bytes of keys and values of a token over all layers, B rows, n tokens
of context, o the overhead of a pass (launches, Python) in bytes that would take as long; p the chance that a guess is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from arsd.errors import InputError

# Reads in bytes per second where the device does not tell; seconds of launches and Python per decoder layer and pass.
BANDWIDTH = {"cpu": 2e10, "cuda": 1e12, "mps": 2e11}
OVERHEAD = {"cpu": 1.5e-4, "cuda": 6e-4, "mps": 6e-4}
# On a CPU arithmetic shows: (tokens of a pass, its cost), as benchmarks/video_decoding.py measured them on two cores.
WIDE = {"cpu": ((4, 1.5), (6, 1.65), (10, 1.8), (20, 2.8))}
SHARE = 0.8  # of the bandwidth on the data sheet that reads reach


def expected_tokens(p: float, length: int) -> float:
    """Tokens of a round of ``length`` guesses, each taken with chance p: (1 - p^(length + 1)) / (1 - p).

    Leviathan et al. 2023 (arXiv 2211.17192), equation 1; ``length + 1`` for p = 1.
    """
    return float(length + 1) if p >= 1 else (1 - p ** (length + 1)) / (1 - p)


def speedup(p: float, length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Tokens of a round per cost of a round, plain AR being 1: E / (length c_d + c_v).

    Args:
        p: chance that a guess is taken.
        length: guesses of a round.
        draft_cost: c_d of one guess, in passes of one token of the target.
        verify_cost: c_v of the pass that verifies, in the same unit.
    """
    return expected_tokens(p, length) / (length * draft_cost + verify_cost)


def best_length(p: float, draft_cost: float, verify_cost: float = 1.0, longest: int = 16) -> int:
    """The number of guesses 1 .. ``longest`` with the highest :func:`speedup`."""
    return max(range(1, longest + 1), key=lambda length: speedup(p, length, draft_cost, verify_cost))


def chance_of(share: float, length: int) -> float:
    """The p that lets ``share`` of ``length`` guesses be taken: sum of p^i over i = 1 .. length, divided by length."""
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if sum(p**i for i in range(1, length + 1)) < share * length else (low, p)
    return (low + high) / 2


@dataclass(frozen=True)
class PassCosts:
    """What passes of one model cost, in bytes read.

    Args:
        weights: W, of the decoder layers and the head.
        entry: kappa, keys and values of one token over all layers.
        rows: B, with those of a guidance stream.
        context: n, tokens before the first new one.
        overhead: o.
        bandwidth: bytes per second, where seconds are wanted.
        wide: measured (tokens of a pass, its cost against a pass of one); between them the cost is interpolated, and beyond
            them it grows as between the last two. Without, a wide pass costs what a pass of one token costs: weights and
            keys are read once either way.
    """

    weights: float
    entry: float
    rows: int = 1
    context: int = 0
    overhead: float = 0.0
    bandwidth: float | None = None
    wide: tuple[tuple[int, float], ...] = ()

    def dense(self, generated: int = 0) -> float:
        """W + B kappa (n + generated) + o: a pass of the model behind that many new tokens."""
        return self.weights + self.rows * self.entry * (self.context + generated) + self.overhead

    def sparse(self, kept: int, generated: int = 0) -> float:
        """W + B kappa (kept + generated) + o: a pass of the same weights over ``kept`` tokens of the context (StD)."""
        return self.weights + self.rows * self.entry * (min(kept, self.context) + generated) + self.overhead

    def draft_cost(self, kept: int, generated: int = 0) -> float:
        """c_d = sparse / dense of one guess by a sparse pass."""
        return self.sparse(kept, generated) / self.dense(generated)

    def verify_cost(self, tokens: int) -> float:
        """c_v of a pass of ``tokens`` against a pass of one: 1, or as measured (``wide``)."""
        if tokens <= 1 or not self.wide:
            return 1.0
        points = sorted({1: 1.0, **dict(self.wide)}.items())
        if len(points) == 1:
            return 1.0
        (t0, c0), (t1, c1) = next((pair for pair in pairwise(points) if tokens <= pair[1][0]), (points[-2], points[-1]))
        return c0 + (c1 - c0) * (tokens - t0) / (t1 - t0)

    @property
    def pressure(self) -> float:
        """B kappa n / W. Below 1 a draft by the model's own weights cannot win much, whatever its length."""
        return self.rows * self.entry * self.context / self.weights

    def seconds(self, generated: int = 0) -> float:
        """Of a dense pass.

        Raises:
            InputError: when the bandwidth is not known.
        """
        if self.bandwidth is None:
            raise InputError("seconds need the bandwidth: give it, or take the costs from of_model or fitted")
        return self.dense(generated) / self.bandwidth

    def fitted(self, measured: Sequence[tuple[float, float]]) -> PassCosts:
        """The same with overhead and bandwidth by least squares: seconds = (bytes + o) / bandwidth.

        Args:
            measured: (bytes without overhead, seconds) of passes, at contexts or batches that differ.

        Raises:
            InputError: for fewer than two sizes, or seconds that do not grow with the bytes.
        """
        if len({size for size, _ in measured}) < 2:
            raise InputError("a fit needs passes of two sizes at least: measure another context or batch")
        mean_x, mean_y = (sum(column) / len(measured) for column in zip(*measured, strict=True))
        slope = sum((x - mean_x) * (y - mean_y) for x, y in measured) / sum((x - mean_x) ** 2 for x, _ in measured)
        if slope <= 0:
            raise InputError("the seconds do not grow with the bytes: measure sizes that differ more, and more often")
        return replace(self, overhead=max(0.0, mean_y / slope - mean_x), bandwidth=1 / slope)

    @classmethod
    def of_model(
        cls,
        model: Any,
        rows: int,
        context: int,
        bandwidth: float | None = None,
        overhead_seconds: float | None = None,
    ) -> PassCosts:
        """From the sizes of a causal or Video-LLM of transformers: its text part, without what looks at pictures.

        W counts the decoder and the head, not the embedding, of which a pass reads a line per token. Experts that a token is
        not sent to are counted as well: an upper bound. kappa = 2 x layers x key/value heads x head size x bytes.

        Args:
            model: with ``get_decoder()`` and ``get_output_embeddings()``.
            rows: B, with those of a guidance stream.
            context: n.
            bandwidth: bytes per second; by default 0.8 of what the GPU states, else :data:`BANDWIDTH` of the kind of device.
            overhead_seconds: of a pass; by default :data:`OVERHEAD` of the kind of device times the layers, which is what
                eager passes of transformers take.

        Raises:
            InputError: when the model does not tell its sizes.
        """
        try:
            config, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            layers, weights = int(config.num_hidden_layers), _weights(decoder, model.get_output_embeddings())
            device, itemsize = model.device, model.dtype.itemsize
        except (AttributeError, TypeError) as error:
            raise InputError(f"{type(model).__name__} does not tell its sizes ({error}): make PassCosts yourself") from None
        bandwidth = _bandwidth(device) if bandwidth is None else bandwidth
        overhead = OVERHEAD.get(device.type, OVERHEAD["cuda"]) * layers if overhead_seconds is None else overhead_seconds
        entry, wide = 2 * layers * heads * head_dim * itemsize, WIDE.get(device.type, ())
        return cls(weights, entry, rows, context, overhead * bandwidth, bandwidth, wide)


def _weights(decoder: nn.Module, head: nn.Module | None) -> float:
    """Bytes of the weights of a pass, each tensor once."""
    tables = {id(p) for module in decoder.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    read = {id(p): p for p in decoder.parameters() if id(p) not in tables}
    if head is not None:  # also where it is the embedding's own table: a head reads all of it
        read |= {id(p): p for p in head.parameters()}
    return float(sum(p.numel() * p.element_size() for p in read.values()))


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of reads."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        clock, bits = (getattr(facts, name, 0) or 0 for name in ("memory_clock_rate", "memory_bus_width"))  # kHz
        if clock and bits:
            return SHARE * 2 * 1e3 * clock * bits / 8  # two transfers per clock
    return BANDWIDTH.get(device.type, BANDWIDTH["cuda"])
