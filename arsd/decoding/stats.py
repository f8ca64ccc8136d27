"""What a call did: passes, accepted lengths, seconds by part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

PARTS = ("prefill", "draft", "forward", "verify", "other")


@dataclass
class DecodeStats:
    """Figures of one decode call.

    Args:
        forward_passes: passes of the big model after the prefill (one pass serves the whole batch).
        prefill_passes: passes that only fed conditions.
        pass_tokens: tokens per row in every pass (in the longest, where a controller varies it).
        pass_shapes: tokens per row of a pass -> how many passes had it.
        rechecked: near-ties that were decided again, each in a pass of one token (a pass serves the whole batch).
        arms: rounds that each arm decoded, where a controller chooses among strategies.
        batch: rows in every pass.
        tokens: committed tokens of each picture.
        row_passes: passes that committed tokens of each picture.
        accepted_lengths: tokens committed per picture and pass -> how often.
        seconds: wall-clock seconds by part: prefill, draft, forward, verify, other.
        near_ties: committed arg-maxes of each picture decided by less than ``arsd.decoding.rules.NEAR_TIE``.
        expected_changed_tokens: total variation between a slot's law and p, summed over the slots reached, for each
            picture (of some rules an estimate or an upper bound: see their ``local_tv``); 0 when lossless. Its mean
            bounds how far the law of a picture has moved while it is below 1.
    """

    forward_passes: int = 0
    prefill_passes: int = 0
    pass_tokens: int = 1
    pass_shapes: Counter[int] = field(default_factory=Counter)
    rechecked: int = 0
    arms: dict[str, int] = field(default_factory=dict)
    batch: int = 1
    tokens: list[int] = field(default_factory=list)
    row_passes: list[int] = field(default_factory=list)
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    near_ties: list[int] = field(default_factory=list)
    expected_changed_tokens: list[float] = field(default_factory=list)

    def add_pass(self, committed: list[tuple[int, int]], width: int) -> None:
        """Count a pass of ``width`` tokens per row that committed tokens: (picture, how many)."""
        self.forward_passes += 1
        self.pass_shapes[width] += 1
        for picture, count in committed:
            self.row_passes[picture] += 1
            self.accepted_lengths[count] += 1

    def add_rechecks(self, rows: int) -> None:
        """Count a pass of one token in which ``rows`` near-ties were decided again; no pass when there are none."""
        if rows:
            self.forward_passes += 1
            self.pass_shapes[1] += 1
            self.rechecked += rows

    def of_picture(self, picture: int) -> DecodeStats:
        """What concerns one picture: the shape of its passes and how many it took part in."""
        passes = self.row_passes[picture]
        return DecodeStats(passes, pass_tokens=self.pass_tokens, batch=self.batch, row_passes=[passes])

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per picture and pass."""
        return sum(self.tokens) / max(1, sum(self.row_passes))

    @property
    def changed_per_token(self) -> float:
        """Expected changed tokens per committed token."""
        return sum(self.expected_changed_tokens) / max(1, sum(self.tokens))

    @property
    def total_seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())

    @property
    def outside_forward_share(self) -> float:
        """Share of a round that is not the forward pass (the prefill does not count)."""
        rounds = sum(self.seconds[part] for part in PARTS[1:])
        return 1 - self.seconds["forward"] / rounds if rounds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "forward_passes": self.forward_passes,
            "prefill_passes": self.prefill_passes,
            "pass_tokens": self.pass_tokens,
            "pass_shapes": {str(k): v for k, v in sorted(self.pass_shapes.items())},
            "rechecked": self.rechecked,
            "arms": self.arms,
            "batch": self.batch,
            "tokens": self.tokens,
            "row_passes": self.row_passes,
            "tokens_per_pass": self.tokens_per_pass,
            "accepted_lengths": {str(k): v for k, v in sorted(self.accepted_lengths.items())},
            "seconds": self.seconds,
            "outside_forward_share": self.outside_forward_share,
            "near_ties": self.near_ties,
            "expected_changed_tokens": self.expected_changed_tokens,
            "changed_per_token": self.changed_per_token,
        }


class Stopwatch:
    """Adds the time of ``with watch(part):`` to ``seconds``.

    On an accelerator the parts are separated by events, which do not wait for the device; ``close`` reads them.
    """

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds, self.cuda = seconds, device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time one part."""
        if self.cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((part, first, last))
            return
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def close(self) -> None:
        """Read pending events."""
        if self._events:
            torch.cuda.synchronize()
        for part, first, last in self._events:
            self.seconds[part] += first.elapsed_time(last) / 1000
        self._events.clear()
