"""Plain AR and another strategy with one seed, one after the other: side by side, neither would have its true time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from arsd.app.cards import plain_of, race_card
from arsd.app.drawing import Drawer, Drawn
from arsd.app.knobs import Asked
from arsd.app.service import Run, Service
from arsd.devices import dtype_name
from arsd.verification import VERIFIED


@dataclass(frozen=True)
class Race:
    """What can be seen of a race at one moment.

    Args:
        stage: ``preparing``, ``ar``, ``decoder``, ``over``.
        plain: plain AR's side, once it has begun.
        fast: the other side, once it has begun.
        verdict: how the two compare, when both are whole; or why not.
        same: whether the tokens are the same, when both are whole.
        card: everything, when it is over.
        pngs: both pictures with their records, when both are whole.
    """

    stage: str
    plain: Drawn | None = None
    fast: Drawn | None = None
    verdict: str = ""
    same: bool | None = None
    card: dict[str, Any] | None = None
    pngs: tuple[bytes, bytes] | None = None


def race(service: Service, run: Run, asked: Asked) -> Iterator[Race]:
    """Race ``asked`` against plain AR; the last item has a verdict."""

    def work(hear: Callable[[Race], None]) -> None:
        now = Race("preparing")
        hear(now)
        sides = [Drawer(service, run, one) for one in (plain_of(asked), asked)]
        for side in sides:
            if not run.over():
                side.warm_up()
        if run.over():
            words = f"cut short ({run.reason}) before anything was drawn"
            hear(Race("over", verdict=words, card={"race": {}, "verdict": words}))
            return
        plain = sides[0](lambda seen: hear(replace(now, stage="ar", plain=seen)))
        fast = None
        if plain.finished:
            fast = sides[1](lambda seen: hear(replace(now, stage="decoder", plain=plain, fast=seen)))
        hear(over(service, asked, plain, fast))

    return service.stream(run, work)


def over(service: Service, asked: Asked, plain: Drawn, fast: Drawn | None) -> Race:
    """The end of a race."""
    if fast is None or not fast.finished:
        why = (fast or plain).stopped
        verdict = f"cut short ({why}): there is nothing to compare"
        return Race("over", plain, fast, verdict, None, race_card(service, asked, plain, fast, verdict))
    assert plain.output is not None and fast.output is not None
    tokens, others = plain.output.tokens[0], fast.output.tokens[0]
    apart = torch.nonzero(tokens != others)[:, 0].tolist()
    verdict = _words(service, asked, fast, apart, len(tokens))
    card = race_card(service, asked, plain, fast, verdict)
    return Race("over", plain, fast, verdict, not apart, card, (plain.pngs[0], fast.pngs[0]))


def _words(service: Service, asked: Asked, fast: Drawn, apart: list[int], total: int) -> str:
    """How the tokens of two pictures compare, and what that means for a strategy."""
    if not apart:
        return f"identical: all {total} tokens are the same"
    words = f"differs in {len(apart)} of {total} tokens, from token {apart[0] + 1} on"
    decoder = asked.decoder
    if not decoder.lossless:
        assert fast.output is not None
        spent = fast.output.stats.expected_changed_tokens[0]
        return f"{words}: another picture, of a law moved by {spent:.1f} expected changed tokens (the rule's own account)"
    if not decoder.seed_exact:
        return f"{words}: another picture, of the same law, as this coupling promises"
    assert fast.output is not None
    kind = dtype_name(service.pipe)
    found = service.pipe.verify(_opened(fast.pngs[0]))
    shape = f"passes of {fast.output.stats.pass_tokens} tokens"
    if found.result == VERIFIED:
        return f"{words}: {kind} rounds one-token passes otherwise; in {shape} it is plain AR's, verified"
    return f"{words}, and in {shape} it is not verified: {found.reason}"


def _opened(png: bytes) -> Any:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(png))
    image.load()
    return image
