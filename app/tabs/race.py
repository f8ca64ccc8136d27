"""Race: plain AR and a strategy with the same seed, one after the other, as they happen."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from arsd.app.cards import picture_command, picture_python
from arsd.app.drawing import Drawn
from arsd.app.knobs import Asked, asked, promise
from arsd.app.markup import PLAIN, Canvas, counts_line, legend, lengths_plot, notice, pane
from arsd.app.race import Race, race
from arsd.app.service import Service
from arsd.app.tabs.parts import (
    buttons,
    card_fields,
    decoder_field,
    next_seed,
    overlay_field,
    owner_of,
    seed_field,
    subject_field,
    wire,
)
from arsd.errors import ArsdError

SIDES = "arsd-race"
INTRO = (
    "Both sides draw with the same seed, one after the other, on the same machine. "
    "Plain AR makes one token per forward pass; the other side guesses, and checks its guesses in one pass."
)


def build(service: Service) -> None:
    """The tab."""
    gr.Markdown(INTRO, elem_classes="arsd-intro")
    with gr.Row():
        subject = subject_field(service)
        decoder = decoder_field(service)
        seed = seed_field()
    lock, start, stop = buttons("Race")
    blank = Canvas(columns=service.pipe.make_raster().columns, rows=service.pipe.make_raster().rows)
    with gr.Row(elem_classes="arsd-sides", elem_id=SIDES):
        left = gr.HTML(side(None, blank, PLAIN, "the reference", ""))
        right = gr.HTML(side(None, blank, "Strategy", "", ""))
    verdict = gr.HTML(notice("Press Race."))
    with gr.Row(elem_classes="arsd-under"):
        with gr.Column(scale=3, min_width=300):
            plot = gr.HTML(lengths_plot({}, service.pipe.make_raster().num_tokens))
            overlay_field(SIDES)
            gr.HTML(legend())
        with gr.Column(scale=2, min_width=240):
            slider = gr.ImageSlider(
                label="plain AR | strategy",
                type="filepath",
                format="png",
                max_height=400,
                buttons=["download", "fullscreen"],
                elem_classes="arsd-slider",
            )
    card = card_fields()
    outputs = [seed, left, right, verdict, plot, slider, *card.outputs]

    def run(subject: Any, decoder: Any, seed: Any, lock: bool, request: gr.Request) -> Iterator[Any]:
        try:
            seed = next_seed(seed, lock)
            wanted = asked(service.pipe, subject, decoder, seed, service.limits)
            for now in race(service, service.new_run(owner_of(request, "race")), wanted):
                with tempfile.TemporaryDirectory() as folder:  # Gradio copies what it shows
                    yield (seed, *shown(service, wanted, blank, now, Path(folder)))
        except ArsdError as error:
            yield (*[gr.skip()] * 3, notice(str(error), "bad"), *[gr.skip()] * (len(outputs) - 4))
            raise

    inputs = [subject, decoder, seed, lock]
    triggers = [(start, "click")] + ([] if service.pipe.takes_classes else [(subject, "submit")])
    wire(service, "race", triggers, stop, run, inputs, outputs, verdict)


def shown(service: Service, wanted: Asked, blank: Canvas, now: Race, folder: Path) -> list[Any]:
    """A race as the outputs behind the seed."""
    names = PLAIN, str(wanted.decoder)
    states = {"preparing": ("warming up", ""), "ar": ("drawing", "waits"), "decoder": ("done", "drawing"), "over": ("", "")}
    left, right = states[now.stage]
    sides = [
        side(now.plain, blank, names[0], "the reference: one token per pass", left),
        side(now.fast, blank, names[1], promise(wanted.decoder), right),
    ]
    series = {name: one.committed[0] for name, one in zip(names, (now.plain, now.fast), strict=True) if one is not None}
    plot = lengths_plot(series, service.pipe.make_raster().num_tokens)
    if now.stage != "over":
        words = {"preparing": "Warming up both sides, so that neither pays for it.", "ar": "Plain AR draws."}
        words["decoder"] = f"{names[1]} draws the same seed."
        slider = None if now.stage == "preparing" else gr.skip()
        return [*sides, notice(words[now.stage]), plot, slider, *[gr.skip()] * 3]
    assert now.card is not None
    if now.pngs is None:
        slider = gr.skip()
    else:
        files = [folder / f"{name}.png" for name in ("plain-ar", wanted.decoder.name)]
        for file, content in zip(files, now.pngs, strict=True):
            file.write_bytes(content)
        slider = tuple(str(file) for file in files)
    relaxed = not wanted.decoder.lossless
    kind = "good" if now.same else "" if relaxed or now.same is None else "note"
    code: tuple[Any, ...] = (gr.skip(), gr.skip())
    if now.fast is not None and now.fast.output is not None:
        code = tuple(make(service, wanted, now.fast.output, compare=True) for make in (picture_python, picture_command))
    notes = "; ".join(["", *(now.plain.notes if now.plain is not None else [])])
    return [*sides, notice(f"{now.verdict}{faster(now)}{notes}", kind), plot, slider, now.card, *code]


def faster(now: Race) -> str:
    """What was gained, where both sides are whole."""
    if now.plain is None or now.fast is None or now.same is None:
        return ""
    passes = f"{now.plain.forward_passes} \N{RIGHTWARDS ARROW} {now.fast.forward_passes} forward passes"
    return f" \N{MIDDLE DOT} {passes}, {now.plain.seconds / max(1e-9, now.fast.seconds):.2f}x the speed"


def side(drawn: Drawn | None, blank: Canvas, title: str, promise: str, state: str) -> str:
    """One side of the race."""
    if drawn is None:
        numbers = {"passes": "0", "tokens per pass": "\N{EN DASH}", "seconds": "0.00", "tokens": "0"}
        return pane(title, promise, blank.html(title), numbers, state)
    numbers = {"passes": str(drawn.forward_passes), "tokens per pass": f"{drawn.tokens_per_pass:.2f}"}
    numbers |= {"seconds": f"{drawn.seconds:.2f}", "tokens": f"{drawn.done}/{drawn.total}"}
    state = f"stopped: {drawn.stopped}" if drawn.stopped else counts_line(drawn.counts[0]) if drawn.finished else state
    return pane(title, promise, drawn.canvases[0].html(title), numbers, state)
