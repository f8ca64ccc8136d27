"""Frontier: the measured speed and quality of strategies; a click on a point sets the knobs of Explore."""

from __future__ import annotations

from typing import Any

import gradio as gr

from arsd.app.frontier import about, band, points, qualities, speeds
from arsd.app.markup import notice, scatter, text
from arsd.app.service import Service

CLICKS = """
const choose = (event) => {
  const point = event.target.closest('[data-decoder]');
  if (point && element.contains(point)) { event.preventDefault(); trigger('select', {decoder: point.dataset.decoder}); }
};
element.addEventListener('click', choose);
element.addEventListener('keydown', (event) => { if (event.key === 'Enter' || event.key === ' ') choose(event); });
"""


def build(service: Service, card: dict[str, Any] | None, decoder: gr.Textbox) -> None:
    """The tab; a click writes into ``decoder``."""
    if card is None:
        gr.HTML(notice("No frontier was measured for this model."))
        gr.Markdown("`arsd evaluate --frontier --model ...` measures one; `arsd app --card card.json` shows it here.")
        return
    xs, ys = speeds(card), qualities(card)
    gr.Markdown(f"Measured by `arsd evaluate --frontier`: {text(about(card))}. Click a point to set the knobs of Explore.")
    with gr.Row(elem_classes="arsd-form"):
        x = gr.Dropdown(xs, value=xs[0], label="Across: speed")
        y = gr.Dropdown(ys, value=ys[0], label="Up: quality")
    plot = gr.HTML(drawn(card, xs[0], ys[0]), js_on_load=CLICKS, elem_id="frontier-plot")
    told = gr.HTML(notice("Nothing chosen."))
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def chosen(x: str, y: str, event: gr.EventData) -> tuple[str, str, str]:
        name = str(event._data["decoder"])
        return drawn(card, x, y, name), name, notice(f"Explore is set to {name}.", "good")

    plot.select(chosen, [x, y], [plot, decoder, told], **quiet)
    for field in (x, y):
        field.input(lambda x, y: drawn(card, x, y), [x, y], plot, **quiet)


def drawn(card: dict[str, Any], x: str, y: str, chosen: str = "") -> str:
    """The plot."""
    return scatter(points(card, x, y), x, y, band(card, y), chosen)
