"""Measured costs of a model on a kind of device, and the window they make the fastest.

A profile is a small JSON file: seconds per round for every (batch, pass_tokens), and the passes that single pictures take
with every window. It is stored, not measured anew by each call, so that the same call gives the same picture tomorrow
(``pass_tokens`` belongs to a sample). Some come with the package (``arsd/profiles``); ``arsd profile`` makes one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from arsd.errors import InputError

SHIPPED = Path(__file__).resolve().parent / "profiles"
WORTH = 0.97  # a window must take less than this share of plain AR's time, or its overhead is not worth a guess


def user_folder() -> Path:
    """Where ``arsd profile`` writes: ``$ARSD_PROFILES``, else ``~/.cache/arsd/profiles``."""
    return Path(os.environ.get("ARSD_PROFILES") or Path.home() / ".cache" / "arsd" / "profiles")


@dataclass(frozen=True)
class Profile:
    """What was measured of one model on one kind of device.

    Args:
        model: name of the model, for people.
        model_hash: hash of its weights.
        device_kind: :func:`arsd.devices.device_kind`.
        dtype: such as ``float32``.
        num_tokens: N, tokens of a picture.
        costs: batch -> pass_tokens -> seconds of a whole round; pass_tokens 1 is plain AR.
        passes: window -> passes that each of some pictures took.
        made_with: versions and sampling options, for people.
    """

    model: str
    model_hash: str
    device_kind: str
    dtype: str
    num_tokens: int
    costs: dict[int, dict[int, float]]
    passes: dict[int, list[int]]
    made_with: dict[str, Any]

    def seconds(self, batch: int, window: int) -> float:
        """Expected seconds of a call of ``batch`` pictures whose rows are not refilled: the slowest row decides."""
        if window == 1:
            return self.num_tokens * self._round(batch, 1)
        passes = self.passes[window]
        calls = [max(passes[(first + i) % len(passes)] for i in range(batch)) for first in range(0, len(passes), batch)]
        return sum(calls) / len(calls) * self._round(batch, window)

    def window(self, batch: int) -> int:
        """The fastest window for ``batch`` rows; 1 (plain AR) where none is clearly faster."""
        best = min(sorted(self.passes), key=lambda window: self.seconds(batch, window))
        return best if self.seconds(batch, best) < WORTH * self.seconds(batch, 1) else 1

    def _round(self, batch: int, window: int) -> float:
        """Seconds of a round: interpolated between the batches measured, in proportion to the rows beyond them."""
        known = sorted(self.costs)
        if batch in self.costs:
            return self.costs[batch][window]
        if batch > known[-1]:
            return self.costs[known[-1]][window] * batch / known[-1]
        if batch < known[0]:
            return self.costs[known[0]][window]
        low, high = next((a, b) for a, b in pairwise(known) if a < batch < b)
        share = (batch - low) / (high - low)
        return (1 - share) * self.costs[low][window] + share * self.costs[high][window]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.part")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(scratch, path)

    @property
    def file_name(self) -> str:
        """A name that tells profiles apart."""
        words = f"{self.model}.{self.model_hash[:12]}.{self.device_kind}.{self.dtype}".split()
        return "-".join(words).replace("/", "_") + ".json"


def read_profile(path: Path) -> Profile:
    """Read a file that :meth:`Profile.save` wrote.

    Raises:
        InputError: when it is damaged.
    """
    try:
        values = json.loads(path.read_text())
        values["costs"] = {int(b): {int(t): float(s) for t, s in row.items()} for b, row in values["costs"].items()}
        values["passes"] = {int(w): [int(p) for p in row] for w, row in values["passes"].items()}
        profile = Profile(**values)
        for batch in profile.costs:
            profile.window(batch)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"the profile {path} is damaged ({error}): make it again with arsd profile") from None
    return profile


@lru_cache(maxsize=8)
def _profiles_in(folder: Path) -> tuple[Profile, ...]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read_profile(path))
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
    return tuple(found)


def known_profiles(folders: Sequence[Path] | None = None) -> list[Profile]:
    """The user's profiles, then the shipped ones. Read once per process: a call does not change while it runs."""
    return [profile for folder in folders or (user_folder(), SHIPPED) for profile in _profiles_in(folder)]


def find_profile(model_hash: str | None, kind: str, dtype: str, profiles: Iterable[Profile] | None = None) -> Profile | None:
    """The profile of a model on a kind of device; the nearest one where that was not measured.

    Args:
        model_hash: of the weights; ``None`` (a model put together in memory) has no profile.
        kind: :func:`arsd.devices.device_kind`.
        dtype: such as ``float32``.
        profiles: where to look; ``None``: :func:`known_profiles`.

    Returns:
        The exact one; else one of the same dtype on a device of the same type; else ``None``.
    """
    if model_hash is None:
        return None
    same = [p for p in (known_profiles() if profiles is None else profiles) if p.model_hash == model_hash]
    on_cpu = kind.startswith("cpu")
    near = [p for p in same if p.dtype == dtype and p.device_kind.startswith("cpu") == on_cpu]
    return next((p for p in near if p.device_kind == kind), near[0] if near else None)
