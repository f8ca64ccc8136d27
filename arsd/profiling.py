"""Measuring a :class:`arsd.profile.Profile`: the production loop, timed round by round in every pass shape."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from arsd.bench import as_inputs
from arsd.decoding import SJD, Autoregressive, DecodingStrategy
from arsd.devices import device_kind, dtype_name
from arsd.errors import InputError
from arsd.profile import Profile

BATCHES = (1, 2, 4, 8, 16)
WINDOWS = (4, 8, 12, 16, 24, 32, 48, 64)
ROUNDS = 12  # of one reading


def make_profile(
    pipe: Any,
    name: str,
    inputs: Sequence[Any],
    batches: Sequence[int] = BATCHES,
    windows: Sequence[int] = WINDOWS,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measure a model on this machine.

    Args:
        pipe: the pipeline, loaded from a folder.
        name: of the model, for people.
        inputs: prompts (or class labels) whose passes are counted, at the model's own sampling options.
        batches: rows per pass.
        windows: candidates; plain AR (1) is always measured too.
        repeats: readings per shape, interleaved; the median counts.
        progress: called with a line about each step.

    Raises:
        InputError: when the model has no folder, or a list is empty or holds no positive numbers.
    """
    if pipe.model_hash is None:
        raise InputError("only a model that was loaded from a folder can have a profile: save_pretrained it first")
    if not inputs or not batches or not windows or min(*batches, 1) < 1 or min(*windows, 2) < 2 or repeats < 1:
        raise InputError("a profile needs inputs, batches >= 1, windows >= 2 and at least one repeat")
    shapes = [(batch, window) for batch in batches for window in (1, *windows)]
    readings: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for repeat in range(-1, repeats):  # the first is a warm-up
        for batch, window in shapes:
            seconds = round_seconds(pipe, inputs, batch, window)
            if repeat >= 0:
                readings[batch, window].append(seconds)
        progress(f"costs: {repeat + 2} of {repeats + 1}")
    passes = {}
    for window in windows:
        progress(f"passes with window {window}")
        passes[window] = passes_of(pipe, inputs, window)
    costs = {batch: {window: statistics.median(readings[batch, window]) for window in (1, *windows)} for batch in batches}
    made_with = {"torch": torch.__version__, "pictures": len(inputs), "repeats": repeats}
    made_with |= {"decoder": str(with_window(pipe.decoder, 2)).replace("window=2", "window=...")}
    total = pipe.make_grammar().num_tokens
    kind, dtype = device_kind(pipe.device), dtype_name(pipe)
    return Profile(name, pipe.model_hash, kind, dtype, total, costs, passes, made_with)


def with_window(decoder: DecodingStrategy, window: int) -> SJD:
    """SJD with a window, that begins its guesses as the pipeline's own strategy does."""
    return SJD(window=window, init=decoder.config["init"] if isinstance(decoder, SJD) else "uniform")


def round_seconds(pipe: Any, inputs: Sequence[Any], batch: int, window: int, rounds: int = ROUNDS) -> float:
    """Seconds of one round, everything included but the prefill; the decoding is broken off after ``rounds``."""
    strategy = Autoregressive() if window == 1 else with_window(pipe.decoder, window)

    def stop(pipe: Any, step: int, done: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= rounds
        return {}

    chosen = [inputs[i % len(inputs)] for i in range(batch)]
    options = {"decoder": strategy, "output_type": "latent", "progress": False, "callback_on_step_end": stop}
    generator = torch.Generator().manual_seed(0)
    stats = pipe(**as_inputs(chosen), generator=generator, callback_on_step_end_tensor_inputs=(), **options).stats
    return float(stats.total_seconds - stats.seconds["prefill"]) / int(stats.forward_passes)


def passes_of(pipe: Any, inputs: Sequence[Any], window: int, batch: int = 4) -> list[int]:
    """Passes that each picture takes with a window (they hardly depend on the batch)."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(inputs))]
    options = {"decoder": with_window(pipe.decoder, window), "output_type": "latent", "progress": False}
    options["batch_size"] = batch
    return list(pipe(**as_inputs(inputs), generator=generators, **options).stats.row_passes)
