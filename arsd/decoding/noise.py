"""Counter-based noise: every random number is a pure function of (seed, image, position, purpose, iteration, token).

The bits come from SplitMix64 (Steele, Lea, Flood 2014) in wrapping 64-bit integers, so they are the same on every device;
the maps to uniforms and Gumbel variables run in float64 on the open interval (0, 1). Nothing here, and nothing that uses
it, touches torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a random number is for. Two purposes never share noise (a residual drawn with the draft's noise is biased)."""

    TOKEN = 0
    ACCEPT = 1
    RESIDUAL = 2
    REDRAFT = 3
    INITIAL = 4


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = _shift(z, 30).bitwise_xor_(z).mul_(_MIX_1)
    z = _shift(z, 27).bitwise_xor_(z).mul_(_MIX_2)
    return _shift(z, 31).bitwise_xor_(z)


def _absorb(key: Tensor, value: Tensor | int) -> Tensor:
    return _mix((key + _GAMMA) ^ _mix(torch.as_tensor(value, device=key.device) * _MIX_1 + _GAMMA))


def _numbered(key: Tensor, number: Tensor | int) -> Tensor:
    return _mix(key + ((number + 1) * _GAMMA if isinstance(number, Tensor) else _signed((number + 1) * _GAMMA)))


def uniform_from_bits(bits: Tensor) -> Tensor:
    """64 random bits to a float64 in the open interval (0, 1), in steps of 2^-52."""
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


class Noise(Protocol):
    """The random choices of decoding. A test replaces it by a choice tape that enumerates every outcome."""

    def prepare(self, starts: Sequence[int], window: int, vocab: int, dtype: torch.dtype) -> None:
        """Make :meth:`token_gumbel` ready for positions [start, start + window) of every row."""
        ...

    def token_gumbel(self, positions: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """The canonical Gumbel noise [B, W, vocab] of absolute positions [B, W]."""
        ...

    def bernoulli(
        self,
        probability: Tensor,
        purpose: Purpose,
        positions: Tensor,
        iteration: Tensor,
        active: Tensor,
        number: Tensor | int = 0,
    ) -> Tensor:
        """True with the given probability [B, W]; slots that are not active may hold anything.

        ``number`` [W] tells choices apart that are made for one position in one pass: siblings of a tree.
        """
        ...

    def categorical(
        self,
        weights: Tensor,
        purpose: Purpose,
        positions: Tensor,
        iteration: Tensor,
        active: Tensor,
        number: Tensor | int = 0,
    ) -> Tensor:
        """Ids [B, W] drawn in proportion to non-negative weights [B, W, V]; ``number`` as in :meth:`bernoulli`."""
        ...

    def integers(self, counts: Tensor, purpose: Purpose, positions: Tensor) -> Tensor:
        """Integers in [0, counts) for counts [B, W]."""
        ...

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """Give ``rows`` the random numbers of other pictures."""
        ...


class CounterNoise:
    """The production :class:`Noise`.

    Args:
        seeds: one 64-bit seed per picture.
        images: index of each picture in its call; two pictures with one seed differ by it.
        device: where the numbers are made; the bits do not depend on it.
        batch: rows; at first row b holds picture b. ``None``: as many as pictures.
    """

    AHEAD = 32  # positions of Gumbel noise made at a time

    def __init__(
        self,
        seeds: Sequence[int],
        images: Sequence[int],
        device: torch.device | str = "cpu",
        batch: int | None = None,
    ) -> None:
        key = torch.tensor([_signed(s) for s in seeds], dtype=torch.int64, device=device)
        self._keys = _absorb(_absorb(key, 0), torch.tensor(list(images), dtype=torch.int64, device=device))
        self._key = self._keys[:batch].clone()  # of the picture that each row holds
        self._ring: Tensor | None = None
        self._filled = [0] * len(self._key)
        self._starts = [0] * len(self._key)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`Noise`."""
        self._key[rows] = self._keys[pictures]
        for b in rows:
            self._filled[b] = self._starts[b] = 0

    def bits(self, purpose: Purpose, positions: Tensor, iteration: Tensor | int, tokens: Tensor | int = 0) -> Tensor:
        """64 random bits per position [B, W], or [B, W, n] when ``tokens`` is a vector of n token ids."""
        key = self._slot_key(purpose, positions, iteration)
        return _numbered(key[..., None] if isinstance(tokens, Tensor) else key, tokens)

    def _slot_key(self, purpose: Purpose, positions: Tensor, iteration: Tensor | int) -> Tensor:
        key = _absorb(self._key, int(purpose))[:, None]
        steps = iteration[:, None] if isinstance(iteration, Tensor) else iteration
        return _absorb(_absorb(key, positions), steps)

    def uniform(self, purpose: Purpose, positions: Tensor, iteration: Tensor | int, number: Tensor | int = 0) -> Tensor:
        """float64 uniforms [B, W] on (0, 1); ``number`` (or one for each slot [W]) stands in the place of the token."""
        return uniform_from_bits(_numbered(self._slot_key(purpose, positions, iteration), number))

    def prepare(self, starts: Sequence[int], window: int, vocab: int, dtype: torch.dtype) -> None:
        """Make the Gumbel noise of positions [start, start + window) ready for every row (known on the host: no sync).

        The noise sits in a ring of ``window + AHEAD`` positions per row and is made ``AHEAD`` positions at a time, because
        every position is read once per round but need be made only once. A row that goes back starts the ring anew.
        """
        size = window + self.AHEAD
        fits = self._ring is not None and self._ring.shape[1:] == (size, vocab) and self._ring.dtype == dtype
        if not fits or any(now < before for now, before in zip(starts, self._starts, strict=True)):
            self._ring = torch.empty(len(self._filled), size, vocab, dtype=dtype, device=self._key.device)
            self._filled = list(starts)
        self._starts = list(starts)
        rows = [b for b, start in enumerate(starts) if start + window > self._filled[b]]
        while rows:
            self._fill(rows, vocab)
            rows = [b for b in rows if starts[b] + window > self._filled[b]]

    def _fill(self, rows: list[int], vocab: int) -> None:
        assert self._ring is not None
        device = self._key.device
        index = torch.tensor(rows, device=device)
        first = torch.tensor([self._filled[b] for b in rows], device=device)
        positions = first[:, None] + torch.arange(self.AHEAD, device=device)
        part = CounterNoise.__new__(CounterNoise)
        part._key = self._key[index]
        bits = part.bits(Purpose.TOKEN, positions, 0, torch.arange(vocab, device=device))
        gumbel = -torch.log(-torch.log(uniform_from_bits(bits)))
        self._ring[index[:, None], positions % self._ring.shape[1]] = gumbel.to(self._ring.dtype)
        for b in rows:
            self._filled[b] += self.AHEAD

    def token_gumbel(self, positions: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
        """See :class:`Noise`; :meth:`prepare` must have been called for these positions."""
        assert self._ring is not None and self._ring.dtype == dtype and self._ring.shape[2] == vocab
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        return self._ring[rows, positions % self._ring.shape[1]]

    def bernoulli(
        self,
        probability: Tensor,
        purpose: Purpose,
        positions: Tensor,
        iteration: Tensor,
        active: Tensor,
        number: Tensor | int = 0,
    ) -> Tensor:
        """See :class:`Noise`."""
        return self.uniform(purpose, positions, iteration, number) < probability

    def categorical(
        self,
        weights: Tensor,
        purpose: Purpose,
        positions: Tensor,
        iteration: Tensor,
        active: Tensor,
        number: Tensor | int = 0,
    ) -> Tensor:
        """See :class:`Noise`: inversion of the cumulative weights with one uniform per slot."""
        cumulative = weights.double().cumsum(-1)
        threshold = self.uniform(purpose, positions, iteration, number) * cumulative[..., -1]
        ids = torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0]
        return ids.clamp_max(weights.shape[-1] - 1)

    def integers(self, counts: Tensor, purpose: Purpose, positions: Tensor) -> Tensor:
        """See :class:`Noise`."""
        drawn = (self.uniform(purpose, positions, 0) * counts).long()
        return torch.minimum(drawn, counts - 1)
