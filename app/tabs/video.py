"""Video: a clip described in words as they are decoded, every token in the colour of who proposed it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from arsd.app.cards import text_command, text_python
from arsd.app.describing import Told, describe
from arsd.app.knobs import TEXTS, promise, strategy, whole, words
from arsd.app.markup import coloured, legend, lengths_plot, notice, text
from arsd.app.painting import uri_of
from arsd.app.service import Service
from arsd.app.tabs.parts import buttons, card_fields, cut_short, owner_of, wire
from arsd.app.toasts import with_toasts
from arsd.app.uploads import CLIPS, checked_clip
from arsd.decoding import Outcome
from arsd.errors import ArsdError
from arsd.video import PICTURES

SHOWN = 8 * 2**20  # bytes of a clip that is put into the page
LEGEND = (Outcome.ACCEPTED, Outcome.RESAMPLED, Outcome.BONUS)


def build(service: Service) -> None:
    """The tab."""
    gr.Markdown(
        "A Video-LLM answers a question about a clip. Sparse-to-Dense lets the same weights draft over a few entries of the "
        "clip; one dense pass verifies. The answer is plain decoding's, token for token.",
        elem_classes="arsd-intro",
    )
    sample = sample_clip(service)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            clip = gr.File(value=sample, label="Clip", file_types=list(CLIPS), type="filepath", height=120)
            preview = gr.HTML(clip_html(sample))
            question = gr.Textbox("Describe the clip.", label="Question", max_length=service.limits.prompt)
            decoder = gr.Dropdown(list(TEXTS.items()), value="std", label="Strategy", allow_custom_value=True)
            with gr.Row():
                frames = gr.Slider(1, service.limits.frames, value=32, step=1, label="Frames at most", min_width=120)
                most = service.limits.new_tokens
                tokens = gr.Slider(1, most, value=min(192, most), step=1, label="Tokens at most", min_width=120)
            _, start, stop = buttons("Describe", lock=False)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(notice("Press Describe."))
            answer = gr.HTML(coloured([]), elem_classes="arsd-answer")
            gr.HTML(legend(LEGEND))
            plot = gr.HTML(lengths_plot({}))
    card = card_fields()
    clip.change(with_toasts(clip_html), clip, preview, queue=False, show_progress="hidden", api_visibility="private")
    outputs = [status, answer, plot, *card.outputs]

    def run(clip: Any, question: Any, decoder: Any, frames: Any, tokens: Any, request: gr.Request) -> Iterator[Any]:
        try:
            file, wanted = checked_clip(clip, service.limits), asked_text(service, question, decoder, frames, tokens)
            describing = service.new_run(owner_of(request, "video"))
            for told in describe(service, describing, file, *wanted):
                yield seen(service, file, wanted, told)
        except ArsdError as error:
            yield (notice(str(error), "bad"), *[gr.skip()] * (len(outputs) - 1))
            raise

    wire(service, "video", [(start, "click")], stop, run, [clip, question, decoder, frames, tokens], outputs, status)


Wanted = tuple[str, Any, dict[str, Any]]


def asked_text(service: Service, question: Any, decoder: Any, frames: Any, tokens: Any) -> Wanted:
    """Question, strategy and options, checked.

    Raises:
        InputError: for what cannot be worked with.
        StrategyError: for a strategy that there is not.
    """
    limits = service.limits
    options = {"num_frames": whole("the number of frames", frames, 1, limits.frames)}
    options["max_new_tokens"] = whole("the number of tokens", tokens, 1, limits.new_tokens)
    return words("the question", question, limits.prompt), strategy(decoder, limits), options


def seen(service: Service, file: Path, wanted: Wanted, told: Told) -> tuple[Any, ...]:
    """A description as the outputs."""
    question, decoder, options = wanted
    line = f"{told.tokens} tokens in {len(told.committed)} passes"
    line += f", {told.tokens / max(1, len(told.committed)):.2f} tokens per pass" if told.committed else ""
    plot = lengths_plot({str(decoder): told.committed})
    if told.output is None:
        line = line if told.committed else "reading the clip"
        return notice(line), coloured(told.pieces), plot, *[gr.skip()] * 3
    out = told.output
    line += f", {out.stats.total_seconds:.2f} s ({out.stats.seconds['prefill']:.2f} s of it for the prompt: "
    line += f"{out.num_frames} frames, {out.num_visual_tokens} visual tokens); {promise(decoder)}"
    line = f"{cut_short(told.stopped)}: {line}" if told.stopped else line
    own = sample_clip(service)
    name = own if own and Path(own).name == file.name and Path(own).stat().st_size == file.stat().st_size else file.name
    code = [make(service, name, question, decoder, options) for make in (text_python, text_command)]
    return notice(line, "" if told.stopped else "good"), coloured(told.pieces), plot, told.card, *code


def sample_clip(service: Service) -> str | None:
    """The clip that came with the model."""
    from arsd.errors import CheckpointError
    from arsd.pipelines.video_parts import find_video_llm

    try:
        file = find_video_llm(service.video_model) / "sample.webp"
    except CheckpointError:
        return None
    return str(file) if file.is_file() else None


def clip_html(path: str | None) -> str:
    """A clip as the page shows it, put into the page itself."""
    if not path or not (file := Path(path)).is_file():
        return '<div class="arsd-clip"><span class="arsd-faint">no clip</span></div>'
    if file.stat().st_size > SHOWN:
        return f'<div class="arsd-clip"><span class="arsd-faint">{text(file.name)}: too large for a preview</span></div>'
    kind = text(file.suffix.lower().lstrip("."))
    if file.suffix.lower() in PICTURES:
        uri = uri_of(file.read_bytes(), f"image/{kind}")
        return f'<div class="arsd-clip"><img src="{uri}" alt="{text(file.name)}"></div>'
    uri = uri_of(file.read_bytes(), f"video/{'mp4' if kind in ('mp4', 'mov') else kind}")
    return f'<div class="arsd-clip"><video src="{uri}" controls muted loop playsinline></video></div>'
