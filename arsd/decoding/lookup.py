"""Guesses copied from where the last few tokens stood before: prompt lookup decoding."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.model_strategies import check_length
from arsd.decoding.options import whole
from arsd.decoding.registry import register_drafter
from arsd.decoding.rules import SeedExact
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.types import Draft, FixedWindow, Parts, Seen, Step, Verdict
from arsd.errors import StrategyError


@register_drafter("prompt-lookup")
class LookupDrafter:
    """What followed the latest earlier occurrence of the last tokens (Saxena's prompt lookup decoding, 2023).

    The last ``longest`` tokens are looked for in the prompt and in all that is committed, then fewer of them, down to
    ``shortest``; the latest occurrence of the most tokens counts. CopySpec (arXiv 2502.08923) is longest = shortest = 3.
    Where a copy comes to the end of what is known it goes on with its own first tokens, as a text of that period would. A
    row without an occurrence repeats its last token.

    Args:
        setting: of the call; reads ``prompt``, ``given`` and ``window``.
        longest: tokens to look for at first.
        shortest: the fewest that count as an occurrence.

    Raises:
        StrategyError: for lengths that make no sense.
    """

    needs_law = False

    def __init__(self, setting: Setting, longest: int = 3, shortest: int = 1) -> None:
        check_lengths(longest, shortest)
        self.longest, self.shortest, self.vocab = longest, shortest, setting.grammar.vocab
        self.prompt, self.given = setting.prompt, setting.given
        self.origin = longest + (0 if self.prompt is None else self.prompt.shape[1])  # column of token 0
        size = self.origin + setting.num_tokens + setting.window + 1  # the last column takes what is not committed
        self.text = torch.full((setting.batch, size), -1, dtype=torch.int64, device=setting.device)
        self.columns = torch.arange(size, device=setting.device)
        self.join(list(range(setting.batch)), list(range(setting.batch)))

    def propose(self, step: Step) -> Draft:
        """The copies; all rows and places at once."""
        known = self.origin + step.positions[:, :1]  # columns below it are known
        matched = torch.zeros_like(self.text[:, self.longest :])  # how many of the last tokens end before each column
        alive = torch.ones_like(matched, dtype=torch.bool)
        for back in range(1, self.longest + 1):
            last = self.text.gather(1, known - back)
            alive &= (self.text[:, self.longest - back : -back] == last) & (last >= 0)
            matched += alive
        columns = self.columns[self.longest :]
        rank = torch.where((columns < known) & (matched >= self.shortest), matched * len(self.columns) + columns, -1)
        best, place = rank.max(1, keepdim=True)
        source = torch.where(best < 0, known - 1, place + self.longest)
        ahead = torch.arange(step.positions.shape[1] - 1, device=known.device) % (known - source)
        return Draft(self.text.gather(1, source + ahead).clamp(0, self.vocab - 1))

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Keep what was committed."""
        self.hear(Seen.of(step, law, verdict))

    def hear(self, seen: Seen) -> None:
        """Keep what was committed in several rounds."""
        place = torch.where(seen.taken, self.origin + seen.positions, self.text.shape[1] - 1)
        self.text.scatter_(1, place, seen.tokens)

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """The rows begin with other prompts and given tokens."""
        self.text[rows] = -1
        if self.prompt is not None:
            self.text[rows, self.longest : self.origin] = self.prompt[pictures]
        if self.given is not None:
            self.text[rows, self.origin : self.origin + self.given.shape[1]] = self.given[pictures]


def check_lengths(longest: int, shortest: int) -> None:
    """Raise StrategyError for lengths that make no sense."""
    if whole("shortest", shortest, 1) > whole("longest", longest, 1):
        raise StrategyError(f"shortest ({shortest}) must be at most longest ({longest})")


class PromptLookup(DecodingStrategy):
    """Copies from the prompt and the text so far (:class:`LookupDrafter`); lossless, seed-exact, and next to free.

    It pays where a text quotes its prompt or itself: edits, summaries, code, transcripts, answers in a fixed format.

    Args:
        draft_length: guesses per pass.
        longest: tokens to look for at first.
        shortest: the fewest that count as an occurrence.
        pass_tokens: tokens per pass, at least ``draft_length + 1``; ``None`` means that.

    Raises:
        StrategyError: for values that do not fit.
    """

    name = "prompt-lookup"

    @register_to_config
    def __init__(self, draft_length: int = 8, longest: int = 3, shortest: int = 1, pass_tokens: int | None = None) -> None:
        check_length(draft_length, pass_tokens)
        check_lengths(longest, shortest)

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        window, rule = self.config["draft_length"] + 1, SeedExact()
        options = self.config["longest"], self.config["shortest"]
        drafter = LookupDrafter(replace(setting, window=window, rule=rule), *options)
        return Parts(drafter, rule, FixedWindow(window), self.config["pass_tokens"] or window)


STRATEGIES[PromptLookup.name] = PromptLookup
