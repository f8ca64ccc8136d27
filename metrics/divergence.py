"""How far a decoder's law is from plain AR's, measured on given prefixes: no sampling noise but that of the prefixes.

Teacher forcing gives plain AR's law at every position of a picture in a few passes. Two exact figures come of it:

- *excess surprise*, -log p(x) - H(p), of tokens under plain AR's law. Whatever the prompts are, it has mean zero at every
  position of a sample of that law, and of no sample of a hotter or colder one.
- the total variation between a strategy's law and plain AR's at each position of a given picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arsd.bench import as_inputs
from arsd.decoding import DecodingStrategy, Setting
from arsd.decoding.replay import Steered, TeacherForcing
from arsd.decoding.types import Parts
from arsd.errors import InputError, StrategyError

MOST = 20.0  # nats: surprise of a token that plain AR cannot draw, under top-k for instance


@dataclass
class Forced:
    """What plain AR's law says of given pictures.

    Args:
        log_probs: [N, T] log-probability of each token (nats, float64), -inf outside the support.
        entropies: [N, T] entropy of its law (nats, float64).
    """

    log_probs: Tensor
    entropies: Tensor

    @property
    def impossible(self) -> Tensor:
        """[N] tokens of each picture that plain AR cannot draw there."""
        return (self.log_probs == -torch.inf).sum(1)

    @property
    def excess_surprise(self) -> Tensor:
        """[N] mean of -log p(x) - H(p) over the tokens of each picture, in nats; see the module."""
        return ((-self.log_probs).clamp_max(MOST) - self.entropies).mean(1)


def teacher_force(
    pipe: Any,
    inputs: Sequence[str | int],
    tokens: Tensor,
    batch: int = 8,
    pass_tokens: int = 32,
    **sampling: Any,
) -> Forced:
    """Plain AR's law on the prefixes of given pictures.

    Args:
        pipe: an image pipeline.
        inputs: prompt or class label of each picture.
        tokens: [N, T] image codes.
        batch: pictures at a time.
        pass_tokens: positions of a picture per pass.
        sampling: guidance_scale, temperature, top_k, top_p where they are not the model's own.

    Raises:
        InputError: when tokens and inputs do not fit each other or the model.
    """
    forcing = TeacherForcing(_checked(pipe, inputs, tokens))
    width = min(pass_tokens, tokens.shape[1])
    result = _run(pipe, _Built(lambda setting: forcing.parts(width)), inputs, batch, log_probs=True, **sampling)
    return Forced(result.log_probs.double(), result.entropies.double())


def forced_divergence(
    pipe: Any,
    strategy: DecodingStrategy,
    inputs: Sequence[str | int],
    tokens: Tensor,
    batch: int = 8,
    **sampling: Any,
) -> Tensor:
    """Total variation between a strategy's law and plain AR's, summed over the positions of given pictures.

    The strategy drafts and judges as always, but the pictures' own tokens are committed: strategies are compared on the
    same prefixes. What a rule states as an estimate or a bound (its ``local_tv``) is one here too.

    Args:
        pipe: an image pipeline.
        strategy: a strategy whose guesses form a chain.
        inputs: prompt or class label of each picture.
        tokens: [N, T] image codes, of plain AR as a rule.
        batch: pictures at a time.
        sampling: as for :func:`teacher_force`.

    Returns:
        [N] float64; divide by T for a token. 0 for lossless strategies.

    Raises:
        StrategyError: for a tree, whose rule has no law of single slots.
    """
    if strategy.config.get("tree") is not None:
        raise StrategyError(f"{strategy} guesses a tree: its law can be measured on chains only")
    recorded = _checked(pipe, inputs, tokens)

    def steered(setting: Setting) -> Parts:
        parts = strategy.build(setting)
        return Parts(parts.drafter, Steered(parts.rule, recorded), parts.controller, parts.pass_tokens)

    stats = _run(pipe, _Built(steered), inputs, batch, **sampling).stats
    return torch.tensor(stats.expected_changed_tokens, dtype=torch.float64)


class _Built(DecodingStrategy):
    """A strategy made of a function, for the calls of this module only."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def __str__(self) -> str:
        return "teacher forcing"

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        parts: Parts = self._make(setting)
        return parts


def _run(pipe: Any, strategy: DecodingStrategy, inputs: Sequence[str | int], batch: int, **options: Any) -> Any:
    """A pipeline call without pictures; nothing of it is left to chance but what the strategy guesses."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(inputs))]
    given = {**as_inputs(inputs), "batch_size": batch, "generator": seeds, "output_type": "latent", "progress": False}
    return pipe(**given, decoder=strategy, **options)


def _checked(pipe: Any, inputs: Sequence[str | int], tokens: Tensor) -> Tensor:
    grammar = pipe.make_grammar()
    if tokens.ndim != 2 or len(tokens) != len(inputs) or tokens.shape[1] != grammar.num_tokens:
        wanted = f"{len(inputs)} rows of {grammar.num_tokens}, one for each input"
        raise InputError(f"tokens must be {wanted}, not {tuple(tokens.shape)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= grammar.vocab:
        raise InputError(f"tokens must lie in 0..{grammar.vocab - 1}")
    return tokens.to(pipe._execution_device)
