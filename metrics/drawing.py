"""Pictures of one strategy for a list of prompts, one file each: a run that can be stopped and gone on with, bit for bit.

Every picture has a seed of its own, made of its number, and every pass has the same shape whether it is filled or not, so
a picture comes out the same whichever others are drawn with it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arsd.decoding import DecodingStrategy
from arsd.devices import device_kind, dtype_name
from arsd.errors import DataError, InputError
from arsd.provenance import read_record, save_png, unpack_tokens, weights_hash
from arsd.run_folders import claim_folder

STREAM = 10**9  # seeds of one stream, so that no two streams overlap


@dataclass(frozen=True)
class DrawPlan:
    """What all strategies of a comparison draw alike.

    Args:
        inputs: the prompt (or class label) of each picture.
        seed: picture i of a seed-exact strategy has the seed ``seed + i``; see :func:`stream_of` for the others.
        batch: rows of every pass.
        sampling: guidance_scale, temperature, top_k, top_p where they are not the model's own.
    """

    inputs: tuple[str | int, ...]
    seed: int = 0
    batch: int = 8
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("there is no prompt to draw")
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, not {self.batch}")
        if not 0 <= self.seed < STREAM - len(self.inputs):
            raise InputError(f"seed must lie in 0..{STREAM - len(self.inputs) - 1}, not {self.seed}")

    @property
    def inputs_hash(self) -> str:
        """SHA-256 of the prompts in their order."""
        return hashlib.sha256("\n".join(map(str, self.inputs)).encode()).hexdigest()


def stream_of(strategy: DecodingStrategy) -> int:
    """Which seeds a strategy has: 0 where it promises plain AR's own pictures, else a number made of its name.

    So that a comparison with plain AR is one of independent samples wherever it is not one of equal tokens.
    """
    return 0 if strategy.seed_exact else 1 + zlib.crc32(str(strategy).encode()) % 10**6


@dataclass
class DrawnSet:
    """The pictures of a folder that :func:`draw` wrote.

    Args:
        folder: where they are.
        settings: what they are (the folder's ``run.json``).
        inputs: prompt or class label of each picture.
        tokens: [N, T].
        passes: [N] forward passes that each picture took part in.
        changed: [N] expected changed tokens.
        near_ties: [N].
        hashes: [N] SHA-256 of the tokens.
        seconds: of decode calls, per picture (the median of the calls).
        pass_tokens: tokens per row in every pass.
    """

    folder: Path
    settings: dict[str, Any]
    inputs: list[str | int]
    tokens: Tensor
    passes: np.ndarray
    changed: np.ndarray
    near_ties: np.ndarray
    hashes: list[str]
    seconds: float
    pass_tokens: int

    @property
    def tokens_per_pass(self) -> float:
        """Over all pictures."""
        return self.tokens.numel() / float(self.passes.sum())

    @classmethod
    def read(cls, folder: str | Path) -> DrawnSet:
        """Read every record.

        Raises:
            DataError: when the folder is none that :func:`draw` wrote, or is not complete.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            count = int(settings["pictures"])
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{folder} was not drawn by arsd evaluate (no run.json)") from None
        missing = [i for i in range(count) if not picture_path(folder, i).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {len(missing)} of {count} pictures: run the same command again")
        records = [read_record(picture_path(folder, i))[1] for i in range(count)]
        return cls(
            folder,
            settings,
            [record["prompt"] if "prompt" in record else record["class_label"] for record in records],
            torch.from_numpy(np.stack([unpack_tokens(record["tokens"]) for record in records])),
            np.array([record["forward_passes"] for record in records]),
            np.array([record["expected_changed_tokens"] for record in records]),
            np.array([record["near_ties"] for record in records]),
            [record["tokens_sha256"] for record in records],
            _seconds(folder),
            int(records[0]["pass_tokens"]),
        )


def picture_path(folder: Path, index: int) -> Path:
    """The file of a picture."""
    return folder / f"{index:06d}.png"


def draw(
    pipe: Any,
    strategy: DecodingStrategy,
    plan: DrawPlan,
    folder: str | Path,
    wanted: Sequence[int] | None = None,
    on_picture: Callable[[], None] = lambda: None,
    stream: int | None = None,
) -> None:
    """Draw those of the ``wanted`` pictures that are not there yet; each is written as soon as it is finished.

    Args:
        pipe: the pipeline.
        strategy: how to decode.
        plan: what to draw.
        folder: where to; it belongs to one model, strategy and plan.
        wanted: numbers of pictures; ``None`` means all.
        on_picture: called after each one.
        stream: which seeds to take, instead of :func:`stream_of`.

    Raises:
        DataError: when the folder belongs to other settings, or a picture cannot be written. What is there stays.
    """
    folder = Path(folder)
    stream = stream_of(strategy) if stream is None else stream
    claim_folder(folder, _settings(pipe, strategy, plan, stream), ["*.png"])
    for scratch in folder.glob(".*.part"):  # what a killed run was about to write
        scratch.unlink()
    missing = [i for i in (range(len(plan.inputs)) if wanted is None else wanted) if not picture_path(folder, i).exists()]
    if not missing:
        return
    rows = missing + [missing[0]] * max(0, plan.batch - len(missing))  # every pass has its full shape
    given = [plan.inputs[i] for i in rows]
    labels = isinstance(given[0], int)
    seeds = [torch.Generator().manual_seed(STREAM * stream + plan.seed + i) for i in rows]

    def finished(number: int, output: Any) -> None:
        if number >= len(missing):
            return
        record = {**pipe.record(output, 0), "seed": STREAM * stream + plan.seed + rows[number]}
        save_png(pipe.pictures_of(output)[0], picture_path(folder, rows[number]), record)
        on_picture()

    options = {"batch_size": plan.batch, "decoder": strategy, "output_type": "latent", "progress": False, **plan.sampling}
    inputs = {"class_labels" if labels else "prompt": given}
    stats = pipe(**inputs, generator=seeds, on_picture=finished, **options).stats
    line = {"pictures": len(rows), "seconds": stats.total_seconds, "forward_passes": stats.forward_passes}
    with (folder / "calls.jsonl").open("a", encoding="utf-8") as stream_out:
        stream_out.write(json.dumps({**line, "parts": stats.seconds}) + "\n")


def _settings(pipe: Any, strategy: DecodingStrategy, plan: DrawPlan, stream: int) -> dict[str, Any]:
    """Everything that the pictures of a folder depend on."""
    drafter = getattr(pipe, "drafter", None)
    return {
        "model": Path(str(pipe.config.get("_name_or_path") or "")).name or type(pipe).__name__,
        "model_hash": pipe.model_hash,
        "drafter_hash": None if drafter is None or strategy.seed_exact else weights_hash(drafter),
        "decoder": str(strategy),
        "lossless": strategy.lossless,
        "seed_exact": strategy.seed_exact,
        "pictures": len(plan.inputs),
        "inputs_sha256": plan.inputs_hash,
        "seed": plan.seed,
        "stream": stream,
        "batch": plan.batch,
        "sampling": plan.sampling,
        "dtype": dtype_name(pipe),
        "device_kind": device_kind(pipe.device),
        "torch": torch.__version__,
    }


def _seconds(folder: Path) -> float:
    """Decode seconds per picture: the median of all calls, which a busy moment does not move; NaN when none is on record."""
    try:
        calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return float("nan")
    return statistics.median(call["seconds"] / call["pictures"] for call in calls) if calls else float("nan")
