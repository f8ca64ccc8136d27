"""Self-speculation: the target's own weights without some of its sublayers guess, and the whole model verifies."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module
from torch import Tensor

from arsd.decoding.chain import ChainDrafter
from arsd.decoding.model_strategies import check_length
from arsd.decoding.options import number
from arsd.decoding.registry import register_drafter
from arsd.decoding.rules import SeedExact
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.types import FixedWindow, Parts, Target
from arsd.errors import StrategyError
from arsd.models.layer_skip import Sublayer, num_layers, skipping

ROUNDS = 4  # that a choice of sublayers is tried for at a time
ENOUGH = 0.9  # share of accepted guesses with which the search rests
_SUBLAYER = re.compile(r"(\d{1,4})([am])")


class SkipSearch:
    """Which sublayers to skip, found on the text that is being decoded (SWIFT, arXiv 2410.06916, section 4.2).

    The best choice so far and a new one, which differs from it in a few random swaps, take turns of :data:`ROUNDS` rounds.
    The new one stays when the share of its guesses that was accepted is at least that of the best one in all its rounds.
    Nothing new is tried after a turn of the best one with :data:`ENOUGH` accepted. It depends on the text alone: no clock.

    Args:
        candidates: sublayers that may be skipped.
        start: those that are skipped at first; their number stays.

    Attributes:
        found: the best choice so far.
        trying: the choice to draft with now.
    """

    def __init__(self, candidates: Sequence[Sublayer], start: Sequence[Sublayer]) -> None:
        self.candidates, self.found = list(candidates), tuple(sorted(start))
        self.trying = self.found
        self.random = random.Random(0)
        self.total = self.turn = (0, 0)  # accepted and judged guesses: of the best choice so far, of this turn
        self.rounds = 0

    def heard(self, accepted: int, judged: int) -> None:
        """What a round made of the guesses of :attr:`trying`, over all rows."""
        self.turn = self.turn[0] + accepted, self.turn[1] + judged
        self.rounds += 1
        if self.rounds < ROUNDS:
            return
        (taken, of), best = self.turn, self.total
        if self.trying == self.found:
            self.total = best[0] + taken, best[1] + of
            self.trying = self.found if taken >= ENOUGH * of else self._swapped()
        else:
            if taken * best[1] >= best[0] * of:
                self.found, self.total = self.trying, self.turn
            self.trying = self.found
        self.turn, self.rounds = (0, 0), 0

    def _swapped(self) -> tuple[Sublayer, ...]:
        others = [x for x in self.candidates if x not in self.found]
        most = min(len(others), max(1, len(self.found) // 4), len(self.found))
        if not most:
            return self.found
        swaps = self.random.randint(1, most)
        out, into = self.random.sample(self.found, swaps), self.random.sample(others, swaps)
        return tuple(sorted({*self.found, *into} - {*out}))


class LayerSkipDraft:
    """The target without some sublayers, as the :class:`arsd.decoding.types.DraftModel` of a call.

    It shares the target's cache: what it writes lies behind the committed entries, and the verifying pass overwrites all of
    it. Of what is committed it reads the last token only, since the entries of the others are the whole model's own.

    Args:
        skip: share of the attention and MLP sublayers that is skipped.
        search: look for a better choice as decoding goes on.
        layers: the sublayers to begin with, as :func:`sublayers_of` reads them; ``None`` spreads them evenly.
    """

    def __init__(self, skip: float = 0.45, search: bool = True, layers: str | None = None) -> None:
        self.skip, self.searching, self.layers = skip, search, layers
        self.drafted, self.before = 0, list[int]()

    @property
    def found(self) -> str:
        """The best choice of sublayers so far, as the option ``layers`` takes it."""
        return ".".join(map(str, self.search.found))

    def begin(self, target: Target) -> None:
        """See :class:`arsd.decoding.types.DraftModel`.

        Raises:
            StrategyError: for a target that is no whole model, or whose layers cannot be skipped.
        """
        if not hasattr(target, "model") or not hasattr(target, "cache"):
            raise StrategyError("layer-skip drafts with layers of a transformers model: use it with generate_fn")
        self.target: Any = target
        count = num_layers(target.model)
        start = spread(count, self.skip) if self.layers is None else sublayers_of(self.layers, count)
        self.search = SkipSearch([Sublayer(n, kind) for n in range(1, count - 1) for kind in "am"], start)
        self._use(start)

    def _use(self, sublayers: Sequence[Sublayer]) -> None:
        self.used, self.view = tuple(sublayers), copy.copy(self.target)
        self.view.model = skipping(self.target.model, sublayers)
        self.view.text = self.view.observer = None

    def catch_up(self, tokens: Tensor, read: list[int], columns: list[int]) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        self.starts = [n + c for n, c in zip(read, columns, strict=True)]
        if self.searching and self.drafted:
            self._hear()
        self.before, self.drafted = self.starts, 0
        self.lengths = self.target.cache.lengths[: len(tokens)] - self.target.unread
        last = torch.tensor(columns, device=tokens.device)[:, None]  # -1 in a row that has ended
        return self._pass(tokens.gather(1, last.clamp_min(0)))

    def extend(self, tokens: Tensor) -> Tensor:
        """See :class:`arsd.decoding.types.DraftModel`."""
        self.lengths, self.starts = self.lengths + 1, [n + 1 for n in self.starts]
        return self._pass(tokens[:, None])

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """See :class:`arsd.decoding.types.DraftModel`."""
        self.drafted = 0  # how the last guesses of these rows fared is not known

    def _pass(self, tokens: Tensor) -> Tensor:
        """Logits [S, B, V] behind one token of every row [B, 1]; the cache is left as long as it was."""
        cache = self.target.cache
        committed = cache.lengths
        self.view.rollback(self.lengths)
        logits = self.view.forward(tokens, self.lengths, self.starts)
        cache.rollback(committed)
        self.drafted += 1
        return logits[:, :, -1]

    def _hear(self) -> None:
        """How many of the last guesses were accepted, in rows that have moved since; perhaps another choice."""
        moved = [n - m - 1 for m, n in zip(self.before, self.starts, strict=True) if n > m]
        if any(n > self.drafted for n in moved):  # other drafters came between
            return
        self.search.heard(sum(moved), sum(min(n + 1, self.drafted) for n in moved))
        if self.search.trying != self.used:
            self._use(self.search.trying)


def spread(layers: int, skip: float) -> list[Sublayer]:
    """Evenly spread sublayers, one half of them attentions; the first and the last layer stay whole."""
    count = min(round(2 * layers * skip), 2 * (layers - 2))
    halves = (("a", count - count // 2), ("m", count // 2))
    return [Sublayer(1 + (2 * i + 1) * (layers - 2) // (2 * n), kind) for kind, n in halves for i in range(n)]


def sublayers_of(text: str, layers: int | None = None) -> list[Sublayer]:
    """``3a.4m`` as the attention of layer 3 and the MLP of layer 4 (the first layer is 0).

    Args:
        text: the sublayers, with dots between them.
        layers: of the model; ``None`` when there is none yet.

    Raises:
        StrategyError: for anything else, and for sublayers that must stay.
    """
    found = [_SUBLAYER.fullmatch(word) for word in text.split(".")]
    if not all(found):
        raise StrategyError(f"{text!r} are no sublayers: write 3a.4m for the attention of layer 3 and the MLP of layer 4")
    sublayers = sorted({Sublayer(int(match[1]), match[2]) for match in found if match})
    last = sublayers[-1].layer if layers is None else layers - 2
    for sublayer in sublayers:
        if not 1 <= sublayer.layer <= last:
            raise StrategyError(f"sublayer {sublayer} must stay: layers 1 to {last} may be skipped")
    return sublayers


@register_drafter("layer-skip")
def chain_of_skipped_layers(
    setting: Setting, skip: float = 0.45, search: bool = True, layers: str | None = None
) -> ChainDrafter:
    """A chain of guesses of the target without some sublayers, that fills the window (:class:`LayerSkipDraft`)."""
    check_skip(skip, search, layers)
    return ChainDrafter(replace(setting, draft_model=lambda window: LayerSkipDraft(skip, search, layers)))


chain_of_skipped_layers.needs_law = True  # type: ignore[attr-defined]


def check_skip(skip: float, search: bool, layers: str | None) -> None:
    """Raise StrategyError for options that make no sense."""
    if number("skip", skip, 0) >= 1:
        raise StrategyError(f"skip must be a share of the sublayers below 1, not {skip!r}")
    if not isinstance(search, bool):
        raise StrategyError(f"search must be true or false, not {search!r}")
    if layers is not None:
        sublayers_of(str(layers))


class LayerSkip(DecodingStrategy):
    """The target without some attention and MLP sublayers drafts a chain (SWIFT, arXiv 2410.06916); lossless, seed-exact.

    Nothing is trained and no weight is stored twice: the draft has the target's parameters and its cache. Which sublayers
    are skipped is found as decoding goes on (:class:`SkipSearch`). A guess costs ``1 - skip`` of a one-token pass, so it
    takes deep models, whose layers do little each.

    Args:
        draft_length: guesses per pass.
        skip: share of the attention and MLP sublayers that is skipped; those of the first and the last layer stay.
        search: look for a better choice of sublayers as decoding goes on.
        layers: the sublayers to begin with in the place of an even spread, such as ``3a.4m`` (attention of layer 3, MLP of
            layer 4; the first layer is 0), or a sequence of such words. ``skip`` does not matter then.
        pass_tokens: tokens per pass, at least ``draft_length + 1``; ``None`` means that.

    Raises:
        StrategyError: for values that do not fit.
    """

    name = "layer-skip"

    @register_to_config
    def __init__(
        self,
        draft_length: int = 4,
        skip: float = 0.45,
        search: bool = True,
        layers: str | Sequence[str] | None = None,
        pass_tokens: int | None = None,
    ) -> None:
        check_length(draft_length, pass_tokens)
        if layers is not None and not isinstance(layers, str):
            layers = ".".join(map(str, layers))
            self.register_to_config(layers=layers)
        check_skip(skip, search, layers)

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        window, rule = self.config["draft_length"] + 1, SeedExact()
        options = {name: self.config[name] for name in ("skip", "search", "layers")}
        drafter = chain_of_skipped_layers(replace(setting, window=window, rule=rule), **options)
        return Parts(drafter, rule, FixedWindow(window), self.config["pass_tokens"] or window)


STRATEGIES[LayerSkip.name] = LayerSkip
