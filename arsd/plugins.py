"""Methods in files of their own: import them by path or module name, find a class in one."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from arsd.errors import InputError


def import_plugin(text: str) -> ModuleType:
    """Import a module, which registers its drafters and rules as it runs; a second time gives the same module.

    Args:
        text: ``path/to/file.py``, or the name of a module on ``sys.path`` or in the working directory.

    Raises:
        InputError: when there is no such file or module, or it fails as it runs.
    """
    is_file = text.endswith(".py")
    if is_file and not Path(text).is_file():
        raise InputError(f"cannot import {text}: there is no such file")
    try:
        return _import_file(Path(text).resolve()) if is_file else _import_module(text)
    except (Exception, SystemExit) as error:  # a file of the user's may fail in any way
        raise InputError(f"cannot import {text}: {one_line(error)}") from error


def find_object(text: str) -> Any:
    """``path/to/file.py:Name`` or ``module:Name`` to what it names.

    Raises:
        InputError: when it has another form, does not import, or names nothing.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise InputError(f"{text!r} names no class: write FILE.py:Class or module:Class")
    module = import_plugin(place)
    if not hasattr(module, name):
        raise InputError(f"{place} has no {name!r}")
    return getattr(module, name)


def one_line(error: BaseException) -> str:
    """An exception as one short line, with its type."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _import_file(path: Path) -> ModuleType:
    name = f"arsd_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # two files may share a stem
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # at the end: a folder of the user's must not hide an installed package
    importlib.invalidate_caches()
    return importlib.import_module(name)
