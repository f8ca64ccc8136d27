"""What every training stage shares: a time-based schedule, an optimiser, atomic checkpoints, a log of the curve."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsd.errors import DataError


@dataclass
class Clock:
    """Minutes of training, counted over all resumed runs; the learning rate follows the share that is used up."""

    minutes: float
    spent: float = 0.0
    _mark: float = field(default_factory=time.perf_counter)

    def tick(self) -> float:
        """Add the time since the last tick; returns the share of the budget used, at most 1."""
        now = time.perf_counter()
        self.spent += (now - self._mark) / 60
        self._mark = now
        return min(1.0, self.spent / self.minutes)


def learning_rate_factor(step: int, share: float, warmup: int = 100, floor: float = 0.01) -> float:
    """Linear warm-up over ``warmup`` steps, cosine to ``floor`` over the time budget."""
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


class Average:
    """Exponential moving average of a module's parameters, with a warm start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current parameters."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.values[key].lerp_(value, weight)
            else:
                self.values[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Values and count."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.values, self.updates = state["values"], state["updates"]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024) for matrices and convolutions, in their own dtype.

    ``torch.optim.Muon`` iterates in bfloat16, which is two orders of magnitude slower on a CPU without AVX-512 BF16.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` next to ``path``, then rename, so that a stop in the middle loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    os.replace(scratch, path)


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """The state in ``path``, with its ``model`` entry already loaded into ``model``.

    Raises:
        DataError: when it was written by another configuration, or is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError ... for a damaged file
        why = f"({type(error).__name__}): it is damaged or belongs to another configuration; use a new --out"
        raise DataError(f"cannot resume {path} {why}") from error
    return state


def log_line(folder: Path, **values: Any) -> None:
    """Append one JSON line to ``log.jsonl`` and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
    with (folder / "log.jsonl").open("a") as stream:
        stream.write(line + "\n")
    print(line, flush=True)


class Run:
    """One resumable training run: model, optimizers, moving average, clock, log of the curve.

    An existing ``checkpoint.pt`` in ``folder`` is resumed. Use::

        while run.begin_step():
            run.finish_step(loss)
            if run.due(...):
                run.save(...)

    Args:
        folder: where checkpoint and ``log.jsonl`` go.
        model: what is trained.
        optimizers: over its parameters.
        lr: peak learning rate of all of them.
        minutes: whole time budget, over all resumed runs.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], lr: float, minutes: float
    ) -> None:
        self.folder, self.model, self.optimizers, self.lr = folder, model, optimizers, lr
        self.average, self.clock, self.step = Average(model, 0.998), Clock(minutes), 0
        self.params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.restored: dict[str, Any] = {}
        if (folder / "checkpoint.pt").is_file():
            self._resume()
        self._share, self._saved, self._mark = self.clock.tick(), self.clock.spent, time.perf_counter()
        self._curve: list[float] = []

    def _resume(self) -> None:
        state = self.restored = load_checkpoint(self.folder / "checkpoint.pt", self.model)
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.clock.spent = state["step"], state["spent"]

    def begin_step(self) -> bool:
        """Set the learning rate; ``False`` when the budget is spent."""
        if self._share >= 1:
            return False
        self._share = self.clock.tick()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * learning_rate_factor(self.step, self._share)
        return True

    def finish_step(self, loss: Tensor, *others: Tensor, **figures: Any) -> None:
        """Descend on the sum of ``loss`` and ``others``; log the mean ``loss`` of every 20 steps, with ``figures``."""
        self.model.zero_grad(set_to_none=True)
        sum(others, start=loss).backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update()
        self.step += 1
        self._curve.append(float(loss.detach()))
        if self.step % 20 == 0:
            rate = 20 / (time.perf_counter() - self._mark)
            mean = sum(self._curve) / len(self._curve)
            self.log(loss=mean, minutes=self.clock.spent, steps_per_second=rate, **figures)
            self._curve, self._mark = [], time.perf_counter()

    def log(self, **figures: Any) -> None:
        """One line in ``log.jsonl``."""
        log_line(self.folder, step=self.step, **figures)

    def due(self, minutes: float) -> bool:
        """Whether ``minutes`` have passed since the last checkpoint, or the budget is spent."""
        return self._share >= 1 or self.clock.spent - self._saved >= minutes

    def save(self, **extra: Any) -> None:
        """Write the checkpoint; ``extra`` comes back in ``restored``."""
        self._saved = self.clock.spent
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "step": self.step}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        save_atomically(
            {**state, "optimizers": optimizers, "spent": self.clock.spent, **extra}, self.folder / "checkpoint.pt"
        )
