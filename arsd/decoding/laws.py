"""From logits to the law that a token is drawn from: guidance, grammar, temperature, top-k, top-p, in this order.

Every law is a pure function of the logits and the *absolute* position, so that a whole window is processed at once and a
token's law does not depend on which pass computed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from arsd.errors import InputError

LARGEST = 1e9  # of guidance and temperature: beyond it scores leave the range of float32


@dataclass(frozen=True)
class LawConfig:
    """Sampling options of one call.

    Args:
        guidance_scale: s of ``u + s (c - u)``; 1 means no guidance (and no second stream).
        guidance_interval: k > -1 guides the positions 0..k + 1 only, as LlamaGen's ``cfg_interval`` does: the first token
            always, and then those that its decoding steps 0..k give.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set with this mass; 1 keeps all.
        image_guidance_scale: r of ``u + r (i - u) + s (c - i)``, where a prompt holds pictures and a third stream i reads
            them without the text (Chameleon, arXiv 2405.09818; InstructPix2Pix, arXiv 2211.09800, equation 3).
    """

    guidance_scale: float = 1.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    image_guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: for an option out of range.
        """
        for name in ("guidance_scale", "image_guidance_scale", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"{name} must be a number, not {value!r}")
        for name in ("guidance_scale", "image_guidance_scale"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise InputError(f"{name} must be >= 0, not {getattr(self, name)}")
        if not self.temperature >= 0:
            raise InputError(f"temperature must be >= 0, not {self.temperature}")
        if self.temperature != 0 and not 1 / LARGEST <= self.temperature <= LARGEST:
            raise InputError(f"temperature must be 0 or in {1 / LARGEST:g}..{LARGEST:g}, not {self.temperature}")
        interval = self.guidance_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or not -1 <= interval < 2**31:
            raise InputError(f"guidance_interval must be a whole number >= -1 (-1 guides everywhere), not {interval!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InputError(f"top_k must be a whole number >= 0 (0 keeps every token), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], not {self.top_p}")


class Grammar:
    """What each position may hold: one forced token, or a set of allowed ids. A pure function of the position.

    Args:
        num_tokens: tokens of a whole sequence, N.
        vocab: size of the vocabulary, V.
        forced: ``{position: token}``.
        allowed: groups of allowed ids, as boolean tables [G, V]; ``None`` allows every id everywhere.
        group: the group of each position [N]; ``None`` puts all positions in group 0.
    """

    def __init__(
        self,
        num_tokens: int,
        vocab: int,
        forced: dict[int, int] | None = None,
        allowed: Tensor | None = None,
        group: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_tokens, self.vocab = num_tokens, vocab
        table = torch.full((num_tokens,), -1, dtype=torch.int64)
        for position, token in (forced or {}).items():
            if not 0 <= position < num_tokens or not 0 <= token < vocab:
                raise InputError(f"forced token {token} at {position} is outside {num_tokens} positions of {vocab} ids")
            table[position] = token
        self.any_forced = bool(forced)
        self.forced = table.to(device)
        self.allowed = None if allowed is None else allowed.to(device)
        if allowed is not None and not bool(allowed.any(-1).all()):
            raise InputError("a grammar group allows no token at all")
        self.group = torch.tensor(list(group) if group is not None else [0] * num_tokens, device=device)
        if allowed is None:
            self._choices = torch.arange(vocab, device=device)[None]
            self._counts = torch.tensor([vocab], device=device)
        else:
            self._counts = allowed.sum(-1).to(device)
            self._choices = torch.argsort(~allowed, dim=-1, stable=True).to(device)

    def forced_at(self, positions: Tensor) -> Tensor:
        """The forced token of each position, -1 where there is none (positions past the end read the last)."""
        return self.forced[positions.clamp_max(self.num_tokens - 1)]

    def num_choices(self, positions: Tensor) -> Tensor:
        """How many ids each position allows."""
        return self._counts[self.group[positions.clamp_max(self.num_tokens - 1)]]

    def choice(self, positions: Tensor, index: Tensor) -> Tensor:
        """The ``index``-th allowed id of each position."""
        return self._choices[self.group[positions.clamp_max(self.num_tokens - 1)], index]

    def uniform_law(self, positions: Tensor) -> Tensor:
        """Uniform law over the allowed ids [..., V]."""
        if self.allowed is None:
            return torch.full((*positions.shape, self.vocab), 1.0 / self.vocab, device=positions.device, dtype=torch.float64)
        table = self.allowed[self.group[positions.clamp_max(self.num_tokens - 1)]].double()
        return table / table.sum(-1, keepdim=True)

    def apply(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Scores [B, W, V] with -inf at forbidden ids, and 0 at a forced one."""
        if self.allowed is not None:
            group = self.group[positions.clamp_max(self.num_tokens - 1)]
            scores = scores.masked_fill(~self.allowed[group], -torch.inf)
        if self.any_forced:
            forced = self.forced_at(positions)[..., None]
            ids = torch.arange(self.vocab, device=scores.device)
            point = torch.where(ids == forced, 0.0, -torch.inf).to(scores.dtype)
            scores = torch.where(forced >= 0, point, scores)
        return scores


class Law:
    """The target law p of every slot, as unnormalised log-weights ``scores`` [B, W, V], -inf off its support.

    ``unfiltered`` [B, W, V] are the same before top-k and top-p; ``ungreedy`` [B, W, V] those of which a greedy law is the
    best one.
    """

    def __init__(self, scores: Tensor, unfiltered: Tensor | None = None, ungreedy: Tensor | None = None) -> None:
        self.scores, self.ungreedy = scores, ungreedy
        self.unfiltered = scores if unfiltered is None else unfiltered

    @property
    def before_greedy(self) -> Tensor:
        """Log-weights [B, W, V] before a greedy law was made of them."""
        return self.scores if self.ungreedy is None else self.ungreedy

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities [B, W, V]."""
        return torch.log_softmax(self.scores, dim=-1)

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities [B, W, V]."""
        return torch.softmax(self.scores, dim=-1)

    def finite(self) -> Tensor:
        """Whether each slot [B, W] has a law at all: no NaN, no +inf, some support."""
        return torch.isfinite(self.scores.amax(-1))


class Laws:
    """The processors of one call.

    Args:
        config: sampling options.
        grammar: what each position may hold.
    """

    def __init__(self, config: LawConfig, grammar: Grammar) -> None:
        self.config, self.grammar = config, grammar

    def __call__(self, logits: Tensor, positions: Tensor) -> Law:
        """The law of every slot.

        Args:
            logits: [S, B, W, V]; stream 0 is conditional, the last one (if there are more) unconditional, and one between
                them has the pictures of the prompt only.
            positions: absolute image positions [B, W].
        """
        config = self.config
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = self.grammar.apply(self._guide(logits, positions), positions)
        ungreedy = None
        if config.temperature == 0:
            ungreedy = scores
            best = scores.argmax(-1, keepdim=True)
            broken = ~torch.isfinite(scores.amax(-1, keepdim=True))  # NaN, +inf or no support must not pass for a law
            scores = torch.full_like(scores, -torch.inf).scatter_(-1, best, 0.0).masked_fill_(broken, torch.nan)
        elif config.temperature != 1:
            scores = scores / config.temperature
        unfiltered = scores
        if 0 < config.top_k < scores.shape[-1]:
            smallest = scores.topk(config.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            scores = scores.masked_fill(scores < smallest, -torch.inf)
        if config.top_p < 1:
            scores = _top_p(scores, config.top_p)
        return Law(scores, unfiltered, ungreedy)

    def _guide(self, logits: Tensor, positions: Tensor) -> Tensor:
        if logits.shape[0] == 1:
            return logits[0]
        conditional, unconditional = logits[0], logits[-1]
        if logits.shape[0] == 3:
            to_image = self.config.image_guidance_scale * (logits[1] - unconditional)
            guided = unconditional + to_image + self.config.guidance_scale * (conditional - logits[1])
        else:
            guided = unconditional + self.config.guidance_scale * (conditional - unconditional)
        if self.config.guidance_interval < 0:
            return guided
        return torch.where((positions <= self.config.guidance_interval + 1)[..., None], guided, conditional)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    ordered, index = scores.sort(dim=-1, descending=True)
    probs = torch.softmax(ordered, dim=-1)
    drop = probs.cumsum(-1) - probs >= top_p
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)
