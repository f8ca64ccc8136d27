"""Verify: drop a PNG; is it the plain AR sample of its seed?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from arsd.app.cards import verify_command
from arsd.app.checking import check
from arsd.app.markup import notice, text
from arsd.app.painting import uri_of
from arsd.app.service import Service
from arsd.app.tabs.parts import buttons, owner_of, wire
from arsd.app.uploads import checked_picture

KINDS = {"verified": "good", "refuted": "bad", "unknown": ""}


def build(service: Service) -> None:
    """The tab."""
    gr.Markdown(
        "Pictures that arsd writes carry their prompt, seed and tokens. A few passes recompute all of it. This proves that "
        "a picture is the sample of its seed; it is no signature.",
        elem_classes="arsd-intro",
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            file = gr.File(label="PNG", file_types=[".png"], type="filepath", height=160)
            _, start, stop = buttons("Verify", lock=False)
        with gr.Column(scale=3, min_width=300):
            verdict = gr.HTML(notice("Drop a PNG that arsd wrote."))
            shown = gr.HTML(facts({}))
    with gr.Accordion("Record and command", open=False):
        command = gr.Code(label="Command line", language="shell", lines=1, interactive=False, wrap_lines=True)
        card = gr.JSON(label="Result and record", max_height=360)

    def run(path: Any, request: gr.Request) -> Iterator[Any]:
        picture = checked_picture(path, service.limits)
        yield notice("Recomputing."), gr.skip(), gr.skip(), gr.skip()
        found = check(service, service.new_run(owner_of(request, "verify")), picture)
        line = f"{found['result']}: {found['reason']}"
        code = verify_command(picture.name, service)
        yield notice(line, KINDS[found["result"]]), facts(found, picture), code, found

    triggers = [(start, "click"), (file, "upload")]
    wire(service, "verify", triggers, stop, run, [file], [verdict, shown, command, card], verdict)


def facts(found: dict[str, Any], file: Path | None = None) -> str:
    """What was found, as a table, beside the picture."""
    if not found or file is None:
        return '<div class="arsd-facts"><div class="arsd-thumb"></div><table></table></div>'
    record = found["record"]
    rows = {"file": found["file"], "meaning": found["meaning"], "prompt": record.get("prompt", record.get("class_label"))}
    rows |= {"seed": record.get("seed"), "strategy": record.get("decoder"), "model": record.get("model")}
    rows |= {"made in": record.get("dtype"), "same arithmetic here": found["same_arithmetic"]}
    rows |= {"tokens that do not fit": found["mismatches"], "near-ties": found["near_ties"]}
    rows |= {"pixels match": found["pixels_match"], "forward passes": found["forward_passes"]}
    cells = "".join(
        f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows.items() if value is not None
    )
    uri = uri_of(file.read_bytes(), "image/png") if file.stat().st_size < 8 * 2**20 else ""
    image = f'<img src="{uri}" alt="the picture">' if uri else ""
    return f'<div class="arsd-facts"><div class="arsd-thumb">{image}</div><table>{cells}</table></div>'
