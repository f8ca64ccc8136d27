"""Errors as a browser shows them: one line in a toast."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import gradio as gr

from arsd.app.service import RunFailed, told

F = TypeVar("F", bound=Callable[..., Any])


def as_toast(error: BaseException, plain: bool = False) -> gr.Error:
    """The toast of an error; its text may repeat what a user wrote, and toasts are HTML, unless ``plain``."""
    if isinstance(error, gr.Error):
        return error
    known = told(error)
    title = "This run failed" if isinstance(known, RunFailed) else "Please check"
    line = " ".join(str(known).split())[:400]
    return gr.Error(line if plain else html.escape(line, quote=False), title=title, print_exception=False)


def with_toasts(handler: F, plain: bool = False) -> F:
    """Handlers, and handlers that are generators, whose errors are toasts; ``plain`` for clients that show no HTML."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise as_toast(error, plain) from None

        return stream  # type: ignore[return-value]

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise as_toast(error, plain) from None

    return call  # type: ignore[return-value]
