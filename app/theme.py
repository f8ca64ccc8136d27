"""How the page looks: one theme, light and dark, with the system's own fonts (no request leaves the machine)."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from arsd.app.progress import NAMES
from arsd.decoding import Outcome

_here = Path(__file__).resolve().parent
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Slate with a quiet teal."""
    made = gr.themes.Base(primary_hue="teal", secondary_hue="slate", neutral_hue="slate", font=SANS, font_mono=MONO)
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",  # the theme's own is too pale to be read
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
    )


def head() -> str:
    """Style sheet and script. Both go into the head: what Gradio takes as ``css`` it confines to its container."""
    style, script = (((_here / name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    ways = json.dumps([NAMES[kind] for kind in sorted(Outcome)])
    return f"<style>{style}</style><script>window.arsdWays = {ways};\n{script}</script>"
