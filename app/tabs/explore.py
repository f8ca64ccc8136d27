"""Explore: the knobs of a strategy and of sampling, and pictures of several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from arsd.app.cards import picture_card, picture_command, picture_python
from arsd.app.drawing import Drawer, Drawn
from arsd.app.knobs import (
    COUPLINGS,
    KNOBS,
    NEEDS_DRAFTER,
    Asked,
    asked,
    compose,
    has_drafter,
    knob_values,
    promise,
    strategy,
    whole,
)
from arsd.app.markup import Canvas, counts_line, figure, gallery, legend, lengths_plot, notice, text
from arsd.app.painting import uri_of
from arsd.app.service import Service
from arsd.app.tabs.parts import (
    buttons,
    card_fields,
    cut_short,
    next_seed,
    overlay_field,
    owner_of,
    seed_field,
    subject_field,
    wire,
)
from arsd.app.toasts import with_toasts
from arsd.errors import ArsdError
from arsd.provenance import slug

Knobs = dict[str, Any]
GALLERY = "arsd-explore"
ORDER = ("window", "draft_length", "coupling", "delta", "nu", "budget")


def build(service: Service) -> gr.Textbox:
    """The tab; returns the field with the strategy, which other tabs may set."""
    families = [name for name in KNOBS if has_drafter(service.pipe) or name not in NEEDS_DRAFTER]
    sampling, widest = service.pipe.sampling, min(256, service.pipe.make_raster().num_tokens)
    with gr.Row():
        with gr.Column(scale=2, min_width=280, elem_classes="arsd-knobs"):
            subject = subject_field(service)
            lock, start, stop = buttons("Draw")
            family = gr.Dropdown(families, value="sjd", label="Strategy")
            window = gr.Slider(1, widest, value=min(16, widest), step=1, label="Window (tokens per pass)")
            draft_length = gr.Slider(1, 16, value=4, step=1, label="Draft length (guesses per pass)", interactive=False)
            coupling = gr.Dropdown(list(COUPLINGS), value="gumbel", label="Coupling")
            budget = gr.Slider(
                0, 32, value=0, step=0.5, label="Distortion budget (expected changed tokens; 0: schedule)", interactive=False
            )
            delta = gr.Slider(0.5, 30, value=2, step=0.1, label="Delta (mean relaxation)", interactive=False)
            nu = gr.Slider(-1, 2, value=0.7, step=0.05, label="Nu (how fast it falls along the chain)", interactive=False)
            decoder = gr.Textbox("sjd:window=16", label="Strategy in words (this is what runs)", max_length=200)
            words = gr.HTML(notice(promise(strategy("sjd:window=16"))))
            with gr.Row():
                guidance = gr.Number(sampling.get("guidance_scale"), label="Guidance scale", minimum=0, min_width=90)
                temperature = gr.Number(sampling.get("temperature"), label="Temperature", minimum=0, min_width=90)
                top_k = gr.Number(sampling.get("top_k"), label="Top-k (0: all)", precision=0, minimum=0, min_width=90)
            with gr.Row():
                seed = seed_field()
                most = service.limits.pictures
                pictures = gr.Slider(1, most, value=min(4, most), step=1, label="Pictures, a seed each", min_width=180)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(notice("Press Draw."))
            raster = service.pipe.make_raster()
            blank = Canvas(columns=raster.columns, rows=raster.rows)
            shown = gr.HTML(gallery([figure(blank, "", "&nbsp;") for _ in range(4)]), elem_id=GALLERY)
            overlay_field(GALLERY)
            gr.HTML(legend())
            plot = gr.HTML(lengths_plot({}))
    card = card_fields()
    knobs = {"window": window, "draft_length": draft_length, "coupling": coupling}
    knobs |= {"delta": delta, "nu": nu, "budget": budget}
    _connect(service, family, knobs, decoder, words)
    outputs = [seed, status, shown, plot, *card.outputs]

    def run(
        subject: Any, decoder: Any, seed: Any, lock: bool, pictures: Any, scale: Any, heat: Any, k: Any, request: gr.Request
    ) -> Iterator[Any]:
        try:
            seed, count = next_seed(seed, lock), whole("the number of seeds", pictures, 1, service.limits.pictures)
            options = {"guidance_scale": scale, "temperature": heat, "top_k": k}
            wanted = asked(service.pipe, subject, decoder, seed, service.limits, **options)
            drawing = service.new_run(owner_of(request, "explore"))
            for drawn in service.stream(drawing, Drawer(service, drawing, wanted, count)):
                yield (seed, *seen(service, wanted, drawn))
        except ArsdError as error:
            yield (gr.skip(), notice(str(error), "bad"), *[gr.skip()] * (len(outputs) - 2))
            raise

    inputs = [subject, decoder, seed, lock, pictures, guidance, temperature, top_k]
    wire(service, "explore", [(start, "click")], stop, run, inputs, outputs, status)
    return decoder


def seen(service: Service, wanted: Asked, drawn: Drawn) -> list[Any]:
    """Pictures as the outputs behind the seed."""
    figures = [_figure(wanted, drawn, i) for i in range(len(drawn.canvases))]
    passes = max(map(len, drawn.committed))
    means = [
        sum(one[i] for one in drawn.committed if i < len(one)) / max(1, sum(i < len(one) for one in drawn.committed))
        for i in range(passes)
    ]
    plot = lengths_plot({f"{wanted.decoder} (mean of {len(figures)})": means})
    line = f"{drawn.done} of {drawn.total} tokens, {drawn.forward_passes} passes, {drawn.seconds:.2f} s"
    if drawn.output is None:
        return [notice(line), gallery(figures), plot, *[gr.skip()] * 3]
    line = f"{line}, {drawn.tokens_per_pass:.2f} tokens per pass and picture"
    changed = drawn.output.stats.expected_changed_tokens
    if not wanted.decoder.lossless:
        line += f"; changed tokens expected: {sum(changed) / len(changed):.1f} per picture"
    if drawn.stopped:
        line = f"{cut_short(drawn.stopped)}: {line}"
    line = "; ".join([line, *drawn.notes])
    code = picture_python(service, wanted, drawn.output), picture_command(service, wanted, drawn.output)
    return [
        notice(line, "" if drawn.stopped else "good"),
        gallery(figures),
        plot,
        picture_card(service, wanted, drawn),
        *code,
    ]


def _figure(wanted: Asked, drawn: Drawn, i: int) -> str:
    seed, passes = wanted.seed + i, len(drawn.committed[i])
    caption = f"<b>seed {seed}</b> {passes} passes, {sum(drawn.committed[i]) / max(1, passes):.2f} tokens per pass"
    save = None
    if drawn.finished and drawn.output is not None:
        changed = drawn.output.stats.expected_changed_tokens[i]
        caption += "" if wanted.decoder.lossless else f", {changed:.1f} changed expected"
        caption += f'<span class="arsd-faint">{text(counts_line(drawn.counts[i]))}</span>'
        if drawn.pngs:
            save = f"{slug(wanted.subject)}-seed{seed}.png", uri_of(drawn.pngs[i], "image/png")
    return figure(drawn.canvases[i], f"{wanted.subject}, seed {seed}", caption, save)


def _connect(service: Service, family: gr.Dropdown, knobs: Knobs, decoder: gr.Textbox, words: gr.HTML) -> None:
    """Knobs write the strategy in words; words that are changed set the knobs, and say what they promise."""
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def turned(name: str, *values: Any) -> str:
        return compose(name, **dict(zip(ORDER, values, strict=True)))

    def chosen(name: str) -> list[Any]:
        return [gr.update(interactive=knob in KNOBS.get(name, ())) for knob in ORDER]

    def read(text: str) -> list[Any]:
        try:
            line = notice(promise(asked(service.pipe, _any_subject(service), text, 0, service.limits).decoder))
        except ArsdError as error:
            return [notice(str(error), "bad"), gr.skip(), *[gr.skip()] * len(ORDER)]
        name, values = knob_values(text)
        if name is None:
            return [line, gr.skip(), *[gr.update(interactive=False)] * len(ORDER)]
        known = {knob: value for knob, value in values.items() if value is not None and value != "auto"}
        updates = [
            gr.update(interactive=knob in values, **({"value": known[knob]} if knob in known else {})) for knob in ORDER
        ]
        return [line, name, *updates]

    fields = [knobs[name] for name in ORDER]
    family.input(chosen, family, fields, **quiet)
    for component in (family, *fields):
        component.input(with_toasts(turned), [family, *fields], decoder, **quiet)
    decoder.change(read, decoder, [words, family, *fields], **quiet)


def _any_subject(service: Service) -> Any:
    return 0 if service.pipe.takes_classes else "anything"
