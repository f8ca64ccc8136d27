"""Decoding strategies against plain AR in one run: the same engine, cache, dtype and prompts, interleaved."""

from __future__ import annotations

import math
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from arsd.decoding import Autoregressive, DecodeStats, DecodingStrategy
from arsd.devices import dtype_name
from arsd.errors import InputError


def as_inputs(inputs: Sequence[Any]) -> dict[str, Any]:
    """Prompts or class labels as arguments of a pipeline call."""
    return {"class_labels" if isinstance(inputs[0], int) else "prompt": list(inputs)}


@dataclass
class BenchRow:
    """Figures of one strategy over all calls."""

    decoder: str
    lossless: bool
    pictures: int = 0
    tokens: int = 0
    forward_passes: int = 0
    row_passes: int = 0
    pass_tokens: int = 1
    seconds: list[float] = field(default_factory=list)
    part_seconds: dict[str, float] = field(default_factory=dict)
    near_ties: int = 0
    changed: float = 0.0
    identical: bool | None = None
    memory: int = 0

    def add(self, stats: DecodeStats) -> None:
        """Count one call."""
        self.pictures += len(stats.tokens)
        self.tokens += sum(stats.tokens)
        self.forward_passes += stats.forward_passes
        self.row_passes += sum(stats.row_passes)
        self.pass_tokens = stats.pass_tokens
        self.seconds.append(stats.total_seconds)
        for part, seconds in stats.seconds.items():
            self.part_seconds[part] = self.part_seconds.get(part, 0.0) + seconds
        self.near_ties += sum(stats.near_ties)
        self.changed += sum(stats.expected_changed_tokens)
        self.memory = max(self.memory, peak_memory())

    @property
    def pass_seconds(self) -> float:
        """Mean seconds of a forward pass."""
        return self.part_seconds.get("forward", 0.0) / max(1, self.forward_passes)

    def as_dict(self, reference: BenchRow) -> dict[str, Any]:
        """The row of the JSON report; ``reference`` is plain AR with one-token passes."""
        median, base = statistics.median(self.seconds), statistics.median(reference.seconds)
        rounds = sum(seconds for part, seconds in self.part_seconds.items() if part != "prefill")
        each = {part: seconds / max(1, self.forward_passes) for part, seconds in self.part_seconds.items()}
        return {
            "decoder": self.decoder,
            "lossless": self.lossless,
            "tokens": self.tokens,
            "forward_passes": self.forward_passes,
            "tokens_per_pass": self.tokens / max(1, self.row_passes),
            "seconds": self.seconds,
            "seconds_median": median,
            "seconds_spread": spread(self.seconds),
            "speedup": base / median,
            "speedup_interval": paired_interval(reference.seconds, self.seconds),
            "pictures_per_minute": 60 * self.pictures / sum(self.seconds),
            "seconds_per_pass": self.pass_seconds,
            "pass_cost_ratio": self.pass_seconds / reference.pass_seconds if reference.pass_seconds else 0.0,
            "outside_forward_share": 1 - self.part_seconds.get("forward", 0.0) / rounds if rounds else 0.0,
            "round_seconds_by_part": {part: seconds for part, seconds in each.items() if part != "prefill"},
            "identical_to_ar_at_w": self.identical,
            "near_ties": self.near_ties,
            "expected_changed_tokens": self.changed / max(1, self.pictures),
            "pass_tokens": self.pass_tokens,
            "peak_memory": self.memory,
        }


def spread(values: Sequence[float]) -> list[float]:
    """The quartiles that half of the values lie between."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def paired_interval(base: Sequence[float], other: Sequence[float]) -> list[float] | None:
    """95 % interval of the ratio base / other of paired readings (Student's t on log ratios); ``None`` below 4 pairs."""
    ratios = [math.log(a / b) for a, b in zip(base, other, strict=False) if a > 0 and b > 0]
    if len(ratios) < 4:
        return None
    n, z = len(ratios) - 1, 1.959964
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)  # Cornish-Fisher: within 1 % from n = 3 on
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    mean, half = statistics.fmean(ratios), t * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return [math.exp(mean - half), math.exp(mean + half)]


def peak_memory() -> int:
    """Peak memory in bytes: of the device since the last reading when there is one, else of the process so far."""
    if torch.cuda.is_available():
        peak = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_bench(
    pipe: Any,
    strategies: Sequence[DecodingStrategy],
    inputs: Sequence[Any],
    batch: int = 1,
    repeats: int = 1,
    seed: int = 0,
    check: bool = True,
    queue: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    **sampling: Any,
) -> dict[str, Any]:
    """Time every strategy, and plain AR, on the same inputs and seeds.

    The strategies take turns call by call, so that a drift of the machine hits all of them alike. Seconds are those of a
    decode call (prefill and loop; no text encoder, no picture decoder), one figure per call.

    Args:
        pipe: an image pipeline.
        strategies: what to compare; plain AR (``ar``) is added in front when it is missing.
        inputs: prompts, or class labels; ``batch`` of them form one call.
        batch: rows per pass.
        repeats: how often the whole set is run.
        seed: seed of the first call; call k uses ``seed + k``.
        check: also run plain AR at each strategy's pass shape (``ar@W``) and compare the tokens.
        queue: make one call of all inputs, whose freed rows are refilled.
        progress: called with a line about each call.
        sampling: guidance_scale, temperature, top_k, top_p.

    Raises:
        InputError: when there are fewer inputs than rows in a batch.
    """
    if batch < 1 or len(inputs) < batch or repeats < 1:
        raise InputError(f"{len(inputs)} prompts cannot fill a batch of {batch}, or repeats ({repeats}) is below 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in 0..2^63-1, not {seed}")
    chosen = list(strategies)
    if not any(str(s) == "ar" for s in chosen):
        chosen.insert(0, Autoregressive())
    rows = {str(s): BenchRow(str(s), s.lossless) for s in chosen}
    whole = len(inputs) if queue else batch
    calls = [list(inputs[i : i + whole]) for i in range(0, len(inputs) - whole + 1, whole)]

    def run(number: int, strategy: DecodingStrategy, **options: Any) -> Any:
        given = {**as_inputs(calls[number]), "batch_size": batch, "progress": False, **sampling, **options}
        return pipe(**given, decoder=strategy, generator=torch.Generator().manual_seed(seed + number), output_type="latent")

    for strategy in chosen:  # warm-up: buffers, threads, kernels
        run(0, strategy)
    config: Any = None
    for repeat in range(repeats):
        for number in range(len(calls)):
            results = {str(strategy): run(number, strategy) for strategy in chosen}
            for name, result in results.items():
                config = result.law_config
                rows[name].add(result.stats)
            if check and repeat == 0:
                exact = {str(s): results[str(s)] for s in chosen if s.seed_exact}
                _check(rows, exact, partial(run, number))
            progress(f"call {number + 1} of {len(calls)}, repeat {repeat + 1} of {repeats}")
    return {
        "dtype": dtype_name(pipe),
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "queue": queue,
        "prompts": len(calls) * whole,
        "guidance_scale": config.guidance_scale,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "rows": [row.as_dict(rows["ar"]) for row in rows.values()],
    }


def _check(rows: dict[str, BenchRow], results: dict[str, Any], run: Callable[[DecodingStrategy], Any]) -> None:
    """Hold the tokens of one call against plain AR's at the same pass shape."""
    references: dict[int, torch.Tensor] = {}
    for name, result in results.items():
        shape = result.stats.pass_tokens
        if shape not in references:
            references[shape] = run(Autoregressive(pass_tokens=shape)).tokens
        same = torch.equal(references[shape], result.tokens)
        rows[name].identical = same if rows[name].identical is None else rows[name].identical and same
