"""What several tabs have: fields, the card of a run, buttons that start and stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from arsd.app.knobs import LARGEST_SEED, fresh_seed, presets
from arsd.app.service import STOPPED, Service
from arsd.app.toasts import with_toasts

GROUP = "model"  # concurrency group of everything that computes
STOP_WAIT = 3.0  # seconds in which a run that was stopped shows what it has, before its event is cancelled
LAYER = "(layer) => { document.getElementById('%s').dataset.layer = layer; }"
CANCEL = "() => { document.getElementById('arsd-cancel-%s').click(); }"
OVERLAYS = [("picture", "off"), ("how tokens came", "how"), ("in which pass", "when")]


def subject_field(service: Service) -> gr.components.Component:
    """A prompt, or the number of a class."""
    if service.pipe.takes_classes:
        return gr.Number(0, precision=0, minimum=0, label="Class", min_width=120)
    return gr.Textbox("red apple", label="Prompt", max_length=service.limits.prompt, lines=1, min_width=180)


def seed_field() -> gr.Number:
    """The seed of a run."""
    return gr.Number(7, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=110)


def decoder_field(service: Service, first: str = "sjd", label: str = "Strategy") -> gr.Dropdown:
    """The presets that this model can run; any other strategy may be written."""
    choices = [(name, decoder) for name, decoder in presets(service.pipe).items() if decoder != "ar"]
    return gr.Dropdown(choices, value=first, label=label, allow_custom_value=True, min_width=200)


def next_seed(seed: Any, lock: bool) -> Any:
    """The seed as it is, where it is locked; else a fresh one."""
    return seed if lock else fresh_seed()


@dataclass
class CardFields:
    """The card of a run."""

    card: gr.JSON
    python: gr.Code
    command: gr.Code

    @property
    def outputs(self) -> list[Any]:
        """All of them."""
        return [self.card, self.python, self.command]


def card_fields() -> CardFields:
    """The card of a run, folded."""
    with gr.Accordion("Card of this run: everything about it, and how to do it again", open=False):
        command = gr.Code(label="Command line", language="shell", lines=2, max_lines=8, interactive=False, wrap_lines=True)
        python = gr.Code(label="Python", language="python", lines=4, max_lines=16, interactive=False, wrap_lines=True)
        card = gr.JSON(label="Everything", max_height=360)
    return CardFields(card, python, command)


def overlay_field(target: str) -> gr.Radio:
    """Which layer lies over the pictures inside the element ``target``; the browser does it alone."""
    overlay = gr.Radio(OVERLAYS, value="off", label="Tokens", show_label=False, container=False, elem_classes="arsd-overlay")
    overlay.change(None, overlay, None, js=LAYER % target, api_visibility="private")
    return overlay


def buttons(start: str, lock: bool = True) -> tuple[gr.Checkbox, gr.Button, gr.Button]:
    """Whether the next run keeps the seed, a button that starts and one that stops."""
    with gr.Row(elem_classes="arsd-buttons"):
        keep = gr.Checkbox(True, label="Lock seed", min_width=140, scale=0, container=False, visible=lock)
        begin = gr.Button(start, variant="primary", min_width=100, scale=3)
        return keep, begin, gr.Button("Stop", min_width=80, scale=1)


def cut_short(reason: str) -> str:
    """How a run ended that did not end by itself."""
    return STOPPED if reason == STOPPED else f"{STOPPED} ({reason})"


def owner_of(request: gr.Request | None, tab: str) -> str:
    """Whose run it is: a browser window and a tab of the page."""
    return f"{getattr(request, 'session_hash', None) or 'nobody'}/{tab}"


def wire(
    service: Service,
    tab: str,
    start: Sequence[tuple[Any, str]],
    stop: gr.Button,
    handler: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    status: gr.HTML,
) -> None:
    """A generator behind a button, and a button that ends it.

    What has begun is asked to stop and shows what it has; only then is its event cancelled. What still waits in the queue is
    taken out of it by that.

    Args:
        service: whose thread computes.
        tab: the name of the tab.
        start: components and the names of their events that start it.
        stop: ends it.
        handler: the generator.
        inputs: its inputs.
        outputs: what it shows.
        status: where the place in the queue is shown.
    """
    shared: dict[str, Any] = {"concurrency_id": GROUP, "concurrency_limit": 1, "api_visibility": "private"}
    event = gr.on(
        [getattr(component, name) for component, name in start],
        with_toasts(handler),
        list(inputs),
        list(outputs),
        show_progress="minimal",
        show_progress_on=status,
        trigger_mode="once",
        **shared,
    )

    def end(request: gr.Request) -> None:
        service.stop(owner_of(request, tab), STOP_WAIT)

    ended = stop.click(end, None, None, queue=False, show_progress="hidden", api_visibility="private")
    cancel = gr.Button("cancel", visible="hidden", elem_id=f"arsd-cancel-{tab}")  # Gradio cancels on clicks only
    cancel.click(None, None, None, cancels=[event], api_visibility="private")
    ended.then(None, None, None, js=CANCEL % tab, api_visibility="private")
