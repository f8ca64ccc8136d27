"""The page and its server: ``arsd app``."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from arsd.app import api
from arsd.app.addresses import NoAddresses
from arsd.app.service import Limits, Service
from arsd.app.tabs import explore, frontier, race, verify, video
from arsd.app.theme import head, theme
from arsd.errors import InputError


def forget(limits: Limits) -> tuple[int, int]:
    """How often files are looked at, and at which age they are deleted (seconds): not while a run that needs them waits."""
    return 60, max(600, int(limits.waiting_seconds) + 60)


def build(service: Service, card: dict[str, Any] | None = None) -> gr.Blocks:
    """The page.

    Args:
        service: models and limits.
        card: the evaluation card that the tab Frontier shows.
    """
    with gr.Blocks(title="arsd", analytics_enabled=False, delete_cache=forget(service.limits)) as page:
        gr.Markdown(_title(service), elem_classes="arsd-title")
        with gr.Tabs():
            if service.pipe is not None:
                with gr.Tab("Race", id="race"):
                    race.build(service)
                with gr.Tab("Explore", id="explore"):
                    decoder = explore.build(service)
                with gr.Tab("Frontier", id="frontier"):
                    frontier.build(service, card, decoder)
            if service.video_llm is not None:
                with gr.Tab("Video", id="video"):
                    video.build(service)
            if service.pipe is not None:
                with gr.Tab("Verify", id="verify"):
                    verify.build(service)
        api.build(service)
    page.queue(max_size=service.limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


def _title(service: Service) -> str:
    models = [service.model] if service.pipe is not None else []
    models += [service.video_model] if service.video_llm is not None else []
    return f"# arsd\n\nMany tokens per forward pass, and proof of what that did to the output. Models: {', '.join(models)}."


@dataclass(frozen=True)
class Served:
    """A page that is served: its address, and the server."""

    url: str
    page: gr.Blocks


@contextmanager
def serve(
    service: Service, card: dict[str, Any] | None = None, host: str = "127.0.0.1", port: int | None = None, mcp: bool = False
) -> Iterator[Served]:
    """Serve the page for as long as the context lasts; files that users made are deleted with it.

    Args:
        service: models and limits.
        card: of the tab Frontier.
        host: address to listen on.
        port: likewise; ``None`` takes 7860 or the next free one.
        mcp: also be an MCP server.

    Raises:
        InputError: when the port is taken, or what an MCP server needs is not installed.
    """
    _check_port(host, port)
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="arsd-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(service, card)
        try:
            yield Served(_launch(page, service, host, port, mcp), page)
        finally:
            page.close(verbose=False)
            service.close()
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _launch(page: gr.Blocks, service: Service, host: str, port: int | None, mcp: bool) -> str:
    """Start the server; its address."""
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=service.limits.upload,
            mcp_server=mcp,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            theme=theme(),
            head=head(),
            app_kwargs={"middleware": [Middleware(NoAddresses)]},
        )
    except ImportError as error:
        raise InputError(f"an MCP server needs the package mcp: pip install 'arsd[app]' ({error})") from error
    return str(url)


def _check_port(host: str, port: int | None) -> None:
    if port is not None and not 0 < port < 2**16:
        raise InputError(f"--port must lie in 1..65535, not {port}")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise InputError(f"cannot listen on {where} ({error.strerror or error}): choose another --host or --port") from None
