"""What makes two timings comparable: turns, pairs, spread, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Seconds, after everything that the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(seconds) < 2:
        return (seconds[0],) * 3
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return middle, low, high


def paired_ratio(rival: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """How many times ours the rival's seconds are, with the 95 % interval of the mean log ratio of neighbours in time."""
    logs = [math.log(a / b) for a, b in zip(rival, ours, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    from scipy.stats import t

    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def in_turns(contenders: dict[str, Callable[[int], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[Any]]:
    """``contender(k)`` for k = 0 ... repeats - 1, the order rotated each time; ``warm_up`` calls before that are dropped."""
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    names = list(contenders)
    for repeat in range(-warm_up, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            result = contenders[name](max(repeat, 0))
            if repeat >= 0:
                results[name].append(result)
    return results


def memory_of(call: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of a call in MiB beyond what was taken before it: of the device, or of a Linux process; else ``None``.

    What an earlier call has freed but the allocator of the CPU has kept is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _resident("VmRSS")
        call()
        return (_resident("VmHWM") - before) / 2**10
    except (OSError, KeyError):
        return None


def _resident(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[field].split()[0])
