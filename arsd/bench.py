"""Decoding strategies against plain AR in one run: the same engine, cache, dtype and prompts, interleaved."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from arsd.decoding import Autoregressive, DecodingStrategy
from arsd.errors import InputError


@dataclass
class BenchRow:
    """Figures of one strategy over all prompts and repeats."""

    decoder: str
    lossless: bool
    tokens: int = 0
    forward_passes: int = 0
    row_passes: int = 0
    pass_tokens: int = 1
    seconds: list[float] = field(default_factory=list)
    forward_seconds: float = 0.0
    round_seconds: float = 0.0
    decode_passes: int = 0
    near_ties: int = 0
    identical: bool | None = None

    def as_dict(self, reference: BenchRow) -> dict[str, Any]:
        """The row of the JSON report; ``reference`` is plain AR with one-token passes."""
        median, base = statistics.median(self.seconds), statistics.median(reference.seconds)
        cost = self.forward_seconds / max(1, self.decode_passes)
        return {
            "decoder": self.decoder,
            "lossless": self.lossless,
            "tokens": self.tokens,
            "forward_passes": self.forward_passes,
            "tokens_per_pass": self.tokens / max(1, self.row_passes),
            "seconds": self.seconds,
            "seconds_median": median,
            "speedup": base / median,
            "seconds_per_pass": cost,
            "pass_cost_ratio": cost / (reference.forward_seconds / max(1, reference.decode_passes)),
            "outside_forward_share": 1 - self.forward_seconds / self.round_seconds if self.round_seconds else 0.0,
            "identical_to_ar_at_w": self.identical,
            "near_ties": self.near_ties,
            "pass_tokens": self.pass_tokens,
            "peak_memory": peak_memory(),
        }


def peak_memory() -> int:
    """Peak memory in bytes: of the device when there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_bench(
    pipe: Any,
    strategies: Sequence[DecodingStrategy],
    prompts: Sequence[str],
    batch: int = 1,
    repeats: int = 1,
    seed: int = 0,
    check: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    **sampling: Any,
) -> dict[str, Any]:
    """Time every strategy, and plain AR, on the same prompts and seeds.

    The strategies take turns prompt by prompt, so that a drift of the machine hits all of them alike. Seconds are those of a
    decode call (prefill and loop; no text encoder, no picture decoder), one figure per call.

    Args:
        pipe: an image pipeline.
        strategies: what to compare; plain AR (``ar``) is added in front when it is missing.
        prompts: prompts; ``batch`` of them form one call.
        batch: rows per call.
        repeats: how often the whole set is run.
        seed: seed of the first call; call k uses ``seed + k``.
        check: also run plain AR at each strategy's pass shape (``ar@W``) and compare the tokens.
        progress: called with a line about each call.
        sampling: guidance_scale, temperature, top_k, top_p.

    Raises:
        InputError: when there are fewer prompts than rows in a batch.
    """
    if batch < 1 or len(prompts) < batch or repeats < 1:
        raise InputError(f"{len(prompts)} prompts cannot fill a batch of {batch}, or repeats ({repeats}) is below 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in 0..2^63-1, not {seed}")
    chosen = list(strategies)
    if not any(str(s) == "ar" for s in chosen):
        chosen.insert(0, Autoregressive())
    rows = {str(s): BenchRow(str(s), s.lossless) for s in chosen}
    calls = [list(prompts[i : i + batch]) for i in range(0, len(prompts) - batch + 1, batch)]
    for strategy in chosen:  # warm-up: buffers, threads, kernels
        pipe(calls[0], decoder=strategy, generator=torch.Generator().manual_seed(seed), progress=False, **sampling)
    config: Any = None
    for repeat in range(repeats):
        for number, call in enumerate(calls):
            references: dict[int, torch.Tensor] = {}
            for strategy in chosen:
                generator = torch.Generator().manual_seed(seed + number)
                result = pipe(call, decoder=strategy, generator=generator, output_type="latent", progress=False, **sampling)
                config = result.law_config
                row = rows[str(strategy)]
                _add(row, result.stats)
                if check and repeat == 0 and strategy.seed_exact:
                    shape = result.stats.pass_tokens
                    if shape not in references:
                        generator = torch.Generator().manual_seed(seed + number)
                        plain = Autoregressive(pass_tokens=shape)
                        again = pipe(
                            call, decoder=plain, generator=generator, output_type="latent", progress=False, **sampling
                        )
                        references[shape] = again.tokens
                    same = torch.equal(references[shape], result.tokens)
                    row.identical = same if row.identical is None else row.identical and same
            progress(f"call {number + 1} of {len(calls)}, repeat {repeat + 1} of {repeats}")
    reference = rows["ar"]
    return {
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "prompts": len(calls) * batch,
        "guidance_scale": config.guidance_scale,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "rows": [row.as_dict(reference) for row in rows.values()],
    }


def _add(row: BenchRow, stats: Any) -> None:
    row.tokens += sum(stats.tokens)
    row.forward_passes += stats.forward_passes
    row.row_passes += sum(stats.row_passes)
    row.pass_tokens = stats.pass_tokens
    row.seconds.append(stats.total_seconds)
    row.forward_seconds += stats.seconds["forward"]
    row.round_seconds += stats.total_seconds - stats.seconds["prefill"]
    row.decode_passes += stats.forward_passes
    row.near_ties += sum(stats.near_ties)
