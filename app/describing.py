"""A clip described in words, every token of which says who proposed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from arsd.app.cards import text_card
from arsd.app.markup import Piece
from arsd.app.progress import Pace
from arsd.app.service import Run, Service
from arsd.decoding import DecodingStrategy, Outcome
from arsd.decoding.types import Round
from arsd.errors import InputError
from arsd.pipelines.video_parts import Pieces

PROPOSERS = {
    "std": "the sparse pass",
    "sjd": "the last pass",
    "prompt-lookup": "the text so far",
    "token-recycling": "recent successors",
    "layer-skip": "the shortened model",
}


@dataclass(frozen=True)
class Told:
    """What can be seen of a description at one moment.

    Args:
        pieces: the text, token by token.
        committed: tokens of each pass.
        output: what the pipeline returned, once it has.
        stopped: why it ended early, or ``""``.
        card: everything, at the end.
    """

    pieces: list[Piece]
    committed: list[int]
    output: Any = field(default=None, repr=False)
    stopped: str = ""
    card: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return sum(self.committed)

    @property
    def counts(self) -> dict[str, int]:
        """Tokens by who proposed them."""
        found: dict[str, int] = {}
        for one in self.pieces:
            found[one.who] = found.get(one.who, 0) + 1
        return found

    @property
    def text(self) -> str:
        """What was said so far."""
        return "".join(one.text for one in self.pieces)


class _Listener:
    """Turns rounds into pieces of text."""

    def __init__(self, tokenizer: Any, decoder: DecodingStrategy) -> None:
        self.pieces: list[Piece] = []
        self.committed: list[int] = []
        self.decoder = decoder
        self._heard: list[str] = []
        self._put = Pieces(tokenizer, self._heard.append)
        self._put.put(torch.zeros(0))  # the prompt, of which nothing is said

    def hear(self, round: Round) -> None:
        """A pass was made."""
        name = (round.arm or str(self.decoder)).partition(":")[0]
        count = round.counts[0]
        for token, kind in zip(round.tokens[0, :count].tolist(), round.outcome[0, :count].tolist(), strict=True):
            self._heard.clear()
            self._put.put(torch.tensor([token]))
            outcome = Outcome(kind)
            accepted = outcome in (Outcome.ACCEPTED, Outcome.RELAXED)
            who = f"proposed by {PROPOSERS.get(name, name)}" if accepted else "the model's own"
            self.pieces.append(Piece("".join(self._heard), outcome, len(self.committed), who))
        self.committed.append(count)

    def end(self) -> None:
        """What is left of a character that was cut in two."""
        self._heard.clear()
        self._put.end()
        if self.pieces and self._heard:
            self.pieces[-1] = replace(self.pieces[-1], text=self.pieces[-1].text + "".join(self._heard))

    def seen(self) -> Told:
        """What can be seen now."""
        return Told(list(self.pieces), list(self.committed))


def describe(
    service: Service, run: Run, clip: Path, question: str, decoder: DecodingStrategy, options: dict[str, Any]
) -> Iterator[Told]:
    """Describe a clip; the last item has a card.

    Args:
        service: whose Video-LLM is asked.
        run: says when to stop.
        clip: a file.
        question: what is asked.
        decoder: the strategy.
        options: of the pipeline's call: ``num_frames``, ``max_new_tokens``.
    """

    def work(hear: Callable[[Told], None]) -> None:
        listener, pace = _Listener(service.video_llm.processor.tokenizer, decoder), Pace()
        hear(listener.seen())

        def on_round(round: Round) -> bool:
            listener.hear(round)
            pace(lambda: hear(listener.seen()))
            return run.over()

        def on_frame() -> None:
            if run.over():
                raise InputError(f"cut short ({run.reason}) while the clip was read")

        try:
            out = service.video_llm(clip, question, decoder=decoder, on_round=on_round, on_frame=on_frame, **options)
        except InputError as error:
            raise InputError(str(error).replace(str(clip), clip.name)) from error
        listener.end()
        ended = out.stats.tokens[0] >= options["max_new_tokens"] or int(out.tokens[0, -1]) in _ends(service.video_llm)
        told = replace(listener.seen(), output=out, stopped="" if ended else run.reason)
        hear(replace(told, card=text_card(service, told, question, decoder, options)))

    return service.stream(run, work)


def _ends(pipe: Any) -> set[int]:
    """The ids that end an answer."""
    found = pipe.model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found}
