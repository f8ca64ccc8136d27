"""What makes two timings comparable: turns, pairs, spread, memory."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from arsd import bench


def now(device: torch.device) -> float:
    """Seconds, after everything that the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, high = bench.spread(seconds)
    return statistics.median(seconds), low, high


def paired_ratio(rival: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """How many times ours the rival's seconds are, with the 95 % interval of the mean log ratio of neighbours in time."""
    mean = statistics.fmean(math.log(a / b) for a, b in zip(rival, ours, strict=True))
    low, high = bench.paired_interval(rival, ours) or (0.0, math.inf)
    return math.exp(mean), low, high


def in_turns(
    contenders: dict[str, Callable[[int], Any]], repeats: int, quiet: float = 1.0, patience: int = 50
) -> dict[str, list[Any]]:
    """``contender(k)`` for k = 0 ... repeats - 1, the order rotated each time; a round before that warms up and is dropped.

    Args:
        contenders: what takes turns.
        repeats: rounds that count.
        quiet: a call counts only if other processes took less than this share of the cores, and is made again otherwise.
            Two threads that wait for each other lose more time to a third one than it takes.
        patience: calls that may be made again, in all.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:
        contenders[name](0)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            others, result = Others(), contenders[name](repeat)
            while others.share() > quiet and patience:
                patience -= 1
                time.sleep(2)
                others, result = Others(), contenders[name](repeat)
            results[name].append(result)
    return results


class Others:
    """What other processes take of the cores, from the moment this is made (Linux; 0 elsewhere)."""

    def __init__(self) -> None:
        self.busy, self.own, self.start = _busy(), time.process_time(), time.perf_counter()

    def share(self) -> float:
        """The share of all cores that was busy and not with this process."""
        busy, own = _busy() - self.busy, time.process_time() - self.own
        return max(0.0, busy - own) / (time.perf_counter() - self.start) / (os.cpu_count() or 1)


def _busy() -> float:
    """Seconds that all cores together have worked since they were started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(field) for field in fields[:8]]  # user nice system idle iowait irq softirq steal
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


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
