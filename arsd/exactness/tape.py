"""The exact law of the production sampler: every random choice is a branch, and every branch is taken.

:class:`ChoiceTape` stands in for the noise of a real ``decode`` call. Each of its rows follows prescribed choices, then
takes the first possible option of every further choice. :func:`push_forward` decodes a batch of tapes, makes a new tape for
every option that was passed over, and goes on until none is left: the weights of all paths then add up to 1, and the weights
of the paths that end in a sequence add up to the probability with which the sampler emits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import DecodeResult
from arsd.exactness.tables import Build, World

Each = Callable[[DecodeResult, Tensor], None]
NEVER = 1e-14  # an option below it is rounding, not a choice (a pruned one shows in the mass)
CHUNK = 60_000


class NotEnumerable(Exception):
    """A sampler whose random choices cannot all be taken: use the chi-square of samples instead."""


class ChoiceTape:
    """The :class:`arsd.decoding.noise.Noise` of B rows that each follow their own choices.

    Every call takes one column per slot. A column is a branch of a row where the slot is active and more than one option has
    a chance.

    Args:
        digits: [B, C] prescribed choices.
        depth: [B] how many columns of a row are prescribed.

    Attributes:
        live: [B] rows that are not finished, set before each pass for a method that also draws in finished ones. How many
            passes a finished row still sees depends on its batch, so a branch there would count a path twice.
    """

    def __init__(self, digits: Tensor, depth: Tensor) -> None:
        self.digits, self.depth, self.column = digits, depth, 0
        self.weight = torch.ones(len(digits), dtype=torch.float64)
        self.live: Tensor | None = None
        self.chosen: list[Tensor] = []  # [B, slots] of each call
        self.passed: list[Tensor] = []  # rows of (row, column, option) not taken

    def _choose(self, weights: Tensor, active: Tensor) -> Tensor:
        active = active if self.live is None else active & self.live[:, None]
        slots, columns = weights.shape[1], self.column + torch.arange(weights.shape[1])
        probs = weights.double() / weights.double().sum(-1, keepdim=True)
        possible = probs > NEVER
        free = (columns >= self.depth[:, None]) | ~active
        ids = possible.int().argmax(-1)
        known = self.digits[:, self.column : self.column + slots].long()
        ids[:, : known.shape[1]] = torch.where(free[:, : known.shape[1]], ids[:, : known.shape[1]], known)
        taken = probs.gather(-1, ids[..., None])[..., 0]
        self.weight = self.weight * torch.where(active, taken, 1.0).prod(1)
        other = possible.scatter(-1, ids[..., None], False) & (active & free)[..., None]
        self.passed.append(other.nonzero() + torch.tensor([0, self.column, 0]))
        self.chosen.append(ids.to(torch.int8))
        self.column += slots
        return ids

    def siblings(self) -> tuple[Tensor, Tensor]:
        """Digits and depths of the tapes for all options passed over."""
        chosen, passed = torch.cat(self.chosen, dim=1), torch.cat(self.passed)
        row, column, option = passed.unbind(1)
        return chosen[row].scatter(1, column[:, None], option[:, None].to(torch.int8)), column + 1

    def bernoulli(
        self,
        probability: Tensor,
        purpose: int,
        positions: Tensor,
        iteration: Tensor,
        active: Tensor,
        number: Tensor | int = 0,
    ) -> Tensor:
        """A branch with two options per active slot [B, W]."""
        p = probability.nan_to_num(0.0).clamp(0, 1)  # as a uniform below 1.5 is, and below NaN is not
        return self._choose(torch.stack([1 - p, p], dim=-1), active).bool()

    def categorical(
        self,
        weights: Tensor,
        purpose: int,
        positions: Tensor,
        iteration: Tensor,
        active: Tensor,
        number: Tensor | int = 0,
    ) -> Tensor:
        """A branch per active slot [B, W] with an option for every id of positive weight."""
        return self._choose(weights, active)

    def integers(self, counts: Tensor, purpose: int, positions: Tensor) -> Tensor:
        """A branch per slot [B, W] with ``counts`` equal options."""
        most = int(counts.max()) if counts.numel() else 1  # a window of one slot has no guess to draw
        weights = (torch.arange(most) < counts[..., None]).double()
        return self._choose(weights, torch.ones_like(counts, dtype=torch.bool))

    def prepare(self, starts: Sequence[int], window: int, vocab: int, dtype: torch.dtype) -> None:
        """The first thing that is done for Gumbel noise; raises :class:`NotEnumerable`."""
        raise NotEnumerable("Gumbel noise has infinitely many outcomes")

    def token_gumbel(self, positions: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """Raises :class:`NotEnumerable`."""
        raise NotEnumerable("Gumbel noise has infinitely many outcomes")


def every_path(
    world: World, build: Build, limit: int | None = None, **request: Any
) -> Iterator[tuple[DecodeResult, Tensor]]:
    """All paths of the sampler made of the parts of ``build``, in batches: what was decoded, and the weights of the rows.

    Args:
        world: the task.
        build: makes the parts of the loop.
        limit: give up after this many paths.
        request: more of :class:`arsd.decoding.DecodeRequest`.

    Raises:
        NotEnumerable: when the parts use Gumbel noise, or there are more paths than ``limit``.
    """
    paths = 0
    waiting = [(torch.zeros(1, 0, dtype=torch.int8), torch.zeros(1, dtype=torch.int64))]
    while waiting:
        digits, depth = waiting.pop()
        if len(depth) > CHUNK:
            waiting.append((digits[CHUNK:], depth[CHUNK:]))
            digits, depth = digits[:CHUNK], depth[:CHUNK]
        paths += len(depth)
        if limit is not None and paths > limit:
            raise NotEnumerable(f"more than {limit:,} paths")
        tape = ChoiceTape(digits, depth)
        result = world.decode(len(depth), build, tape, **request)
        yield result, tape.weight
        more = tape.siblings()
        if len(more[1]):
            waiting.append(more)


def push_forward(
    world: World, build: Build, limit: int | None = None, each: Each | None = None, **request: Any
) -> tuple[Tensor, int]:
    """The exact law [V ** N] of the sampler, and the number of paths; arguments and errors of :func:`every_path`.

    ``each`` is called with the results of many paths and their weights, for expectations and for what holds on every path.
    """
    law, paths = torch.zeros(world.vocab**world.num_tokens, dtype=torch.float64), 0
    for result, weight in every_path(world, build, limit, **request):
        law.index_add_(0, world.number(result.tokens), weight)
        paths += len(weight)
        if each is not None:
            each(result, weight)
    return law, paths
