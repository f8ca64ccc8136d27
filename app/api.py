"""The named endpoints: what ``gradio_client``, plain HTTP and MCP clients call. Docstrings are their documentation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from arsd.app.cards import picture_card
from arsd.app.checking import check
from arsd.app.describing import describe as describe_clip
from arsd.app.drawing import Drawer, Drawn
from arsd.app.knobs import TEXTS, asked, presets, promise, strategy, whole
from arsd.app.race import race
from arsd.app.service import Service
from arsd.app.tabs.parts import GROUP
from arsd.app.tabs.video import asked_text
from arsd.app.toasts import with_toasts
from arsd.app.uploads import CLIPS, checked_clip, checked_picture
from arsd.errors import InputError
from arsd.provenance import slug


class Endpoints:
    """The functions behind the endpoints; each call is a run of its own.

    Args:
        service: whose models are used.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    def list_presets(self) -> dict[str, Any]:
        """Names the models and the decoding strategies that they can run.

        "lossless" strategies have exactly the law of plain autoregressive decoding; "seed_exact" ones give the very same
        tokens.

        Returns:
            The models, and for each preset its label, strategy, promise, and whether it is lossless and seed-exact.
        """
        service, found = self.service, []
        named = [("pictures", presets(service.pipe))] if service.pipe is not None else []
        named += [("text", TEXTS)] if service.video_llm is not None else []
        for kind, choices in named:
            for label, words in choices.items():
                decoder = strategy(words)
                flags = {"lossless": decoder.lossless, "seed_exact": decoder.seed_exact, "promise": promise(decoder)}
                found.append({"kind": kind, "label": label, "decoder": words, **flags})
        models = {"model": service.model if service.pipe is not None else None}
        models["video_model"] = service.video_model if service.video_llm is not None else None
        return {**models, "presets": found}

    def generate(
        self,
        prompt: str,
        decoder: str = "sjd",
        seed: float = 0,
        pictures: float = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: float | None = None,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Draws pictures of consecutive seeds with one decoding strategy.

        While it draws, the report says how far it is.

        Args:
            prompt: What to draw, in a few words; for a class-conditional model the number of the class.
            decoder: Decoding strategy with its options, such as sjd, sjd:window=16 or cool-sd:budget=2.0; see list_presets.
            seed: Whole number; a lossless seed-exact strategy gives the same picture for it as plain AR ("ar").
            pictures: How many pictures, of the seeds seed, seed + 1, and so on.
            guidance_scale: Classifier-free guidance; leave it out for the model's own, 1 is none.
            temperature: Divides the logits; leave it out for the model's own, 0 is greedy.
            top_k: Keeps the k likeliest tokens; leave it out for the model's own, 0 keeps all.

        Returns:
            The first picture, all pictures as PNG files that carry their record, and a report with seeds, passes, tokens
            per pass and seconds.
        """
        service, sampling = self.service, {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k}
        count = whole("the number of pictures", pictures, 1, service.limits.pictures)
        wanted = asked(service.pipe, _subject(service, prompt), decoder, seed, service.limits, **sampling)
        run, drawn = service.new_run(), None
        for drawn in service.stream(run, Drawer(service, run, wanted, count, live=False)):
            if drawn.output is None:
                yield gr.skip(), gr.skip(), _so_far(drawn)
        if drawn is None or drawn.output is None:
            raise InputError("it was stopped before it began")
        report = {**picture_card(service, wanted, drawn), "notes": drawn.notes}
        if not drawn.finished:
            yield None, [], report
            return
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies what it serves
            files = [Path(folder) / f"{slug(wanted.subject)}-seed{wanted.seed + i}.png" for i in range(count)]
            for file, content in zip(files, drawn.pngs, strict=True):
                file.write_bytes(content)
            yield str(files[0]), [str(file) for file in files], report

    def compare(self, prompt: str, decoder: str = "sjd", seed: float = 0) -> Iterator[tuple[Any, Any, Any]]:
        """Draws one picture twice with the same seed, by plain autoregressive decoding and by a strategy.

        One goes after the other; tokens, forward passes and seconds are compared.

        Args:
            prompt: What to draw, in a few words; for a class-conditional model the number of the class.
            decoder: Decoding strategy, such as sjd or cool-sd:delta=2; see list_presets.
            seed: Whole number that both sides share.

        Returns:
            Plain AR's picture, the strategy's picture, and a report with the verdict and the figures of both.
        """
        service = self.service
        wanted = asked(service.pipe, _subject(service, prompt), decoder, seed, service.limits)
        for now in race(service, service.new_run(), wanted):
            if now.card is None:
                side = now.fast or now.plain
                yield gr.skip(), gr.skip(), {"stage": now.stage, **(_so_far(side) if side else {})}
            elif now.pngs is None:
                yield None, None, now.card
            else:
                with tempfile.TemporaryDirectory() as folder:
                    files = [Path(folder) / f"{slug(wanted.subject)}-{name}.png" for name in ("ar", wanted.decoder.name)]
                    for file, content in zip(files, now.pngs, strict=True):
                        file.write_bytes(content)
                    yield str(files[0]), str(files[1]), now.card

    def verify(self, picture: str) -> dict[str, Any]:
        """Recomputes a PNG that arsd wrote from the record that it carries: is it the plain AR sample of its seed?

        Args:
            picture: A PNG file that arsd wrote.

        Returns:
            The result (verified, refuted or unknown), why, and the record.
        """
        return check(self.service, self.service.new_run(), checked_picture(picture, self.service.limits))

    def describe(
        self,
        clip: str,
        question: str = "Describe the clip.",
        decoder: str = "std",
        frames: float = 32,
        new_tokens: float = 128,
    ) -> Iterator[tuple[str, Any]]:
        """Answers a question about a clip with a Video-LLM; the text comes as it is decoded.

        Args:
            clip: A video or an animated picture (mp4, webm, gif, webp, ...).
            question: What is asked about the clip.
            decoder: Decoding strategy, such as std (Sparse-to-Dense), token-recycling or ar; see list_presets.
            frames: Frames that are shown to the model at most, evenly over the clip.
            new_tokens: Tokens of the answer at most.

        Returns:
            The answer, and a report with passes, tokens per pass, seconds and who proposed the tokens.
        """
        service = self.service
        file, wanted = checked_clip(clip, service.limits), asked_text(service, question, decoder, frames, new_tokens)
        for told in describe_clip(service, service.new_run(), file, *wanted):
            yield told.text, told.card or {"tokens": told.tokens, "forward_passes": len(told.committed)}


def _so_far(drawn: Drawn) -> dict[str, Any]:
    return {"tokens": drawn.done, "of": drawn.total, "forward_passes": drawn.forward_passes, "seconds": drawn.seconds}


def _subject(service: Service, prompt: Any) -> Any:
    """A prompt, or the number of a class that came as text."""
    if not service.pipe.takes_classes or not isinstance(prompt, str):
        return prompt
    try:
        return int(prompt)
    except ValueError:
        raise InputError(f"this model draws classes: give the number of one, not {prompt!r}") from None


def build(service: Service) -> None:
    """The endpoints, with components that are never seen but name and type their parameters."""
    ends = Endpoints(service)
    with gr.Column(visible=False):
        report = gr.JSON(label="report")
        _endpoint(ends.list_presets, [], [report], shared=False)
        if service.pipe is not None:
            subject, decoder = gr.Textbox(label="prompt"), gr.Textbox("sjd", label="decoder")
            seed, count = gr.Number(0, label="seed"), gr.Number(1, label="pictures")
            sampling = [gr.Number(None, label=name) for name in ("guidance_scale", "temperature", "top_k")]
            shown = gr.Image(label="picture", format="png", type="filepath"), gr.Gallery(label="pictures", format="png")
            _endpoint(ends.generate, [subject, decoder, seed, count, *sampling], [*shown, report])
            sides = [gr.Image(label=name, format="png", type="filepath") for name in ("plain AR", "strategy")]
            _endpoint(ends.compare, [subject, decoder, seed], [*sides, report])
            _endpoint(ends.verify, [gr.File(label="picture", file_types=[".png"], type="filepath")], [report])
        if service.video_llm is not None:
            clip = gr.File(label="clip", file_types=list(CLIPS), type="filepath")
            words = gr.Textbox("Describe the clip.", label="question"), gr.Textbox("std", label="decoder")
            numbers = gr.Number(32, label="frames"), gr.Number(128, label="new_tokens")
            _endpoint(ends.describe, [clip, *words, *numbers], [gr.Textbox(label="answer"), report])


def _endpoint(function: Callable[..., Any], inputs: list[Any], outputs: list[Any], shared: bool = True) -> None:
    name = function.__name__
    group: dict[str, Any] = {"concurrency_id": GROUP, "concurrency_limit": 1} if shared else {"queue": False}
    gr.Button(name).click(
        with_toasts(function, plain=True), inputs, outputs, api_name=name, api_visibility="public", **group
    )
