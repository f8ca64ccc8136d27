"""What the readers of published weight files share: opening, checking and writing them, and rotary row order."""

from __future__ import annotations

import argparse
import errno
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from arsd.errors import CheckpointError

_CONTAINERS = ("model", "module", "state_dict")


class _Callback:
    """Stands for lightning's ``ModelCheckpoint``, of which checkpoints before version 1.5 hold the class alone."""


_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by upstream key, on the CPU; they may be mapped from the file, so copy what you keep.

    ``.safetensors`` files are flat. Any other file is a ``torch.save`` archive, of which the entry ``model``, else
    ``module``, else ``state_dict``, else the whole dict is taken. Nothing is unpickled but tensors, plain containers, the
    ``argparse.Namespace`` of a training checkpoint, and what old lightning checkpoints hold (read without lightning).

    Raises:
        CheckpointError: for a file that is missing, truncated or corrupt, holds other objects, or has no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: check the path, or download the checkpoint first")
    try:
        content = _read(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # what torch's reader makes of a zip archive that ends early
            raise CheckpointError(f"{path} is truncated, corrupt or no weight file: download or export it again") from error
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): check disk and permissions") from error
    except Exception as error:  # a damaged pickle can raise anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"{path} holds the Python object {refused[1]}, which is not safe to load"
            raise CheckpointError(f"{what}: save its state_dict alone with torch.save and load that file") from error
        raise CheckpointError(f"{path} is truncated, corrupt or no weight file: download or export it again") from error
    if isinstance(content, dict):
        content = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), dict)), content)
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {str(key): value for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} has no tensors under {', '.join(_CONTAINERS)} or at the top: give a weight file")
    return tensors


def write_state_dict(state: dict[str, Tensor], path: str | Path, container: str | None = None) -> None:
    """Write ``state`` as ``{container: state}``, or flat without a container or if ``path`` ends in ``.safetensors``.

    The file replaces an older one only when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, partial)
        else:
            torch.save({container: state} if container else state, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def count_indices(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that ``pattern`` captures among the keys; 0 if it matches none."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def shape_of(state: Mapping[str, Tensor], key: str, ndim: int, path: str | Path) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        CheckpointError: when it is missing or has another number of axes than ``ndim``.
    """
    if key not in state:
        raise CheckpointError(f"{path} is not a file of this kind: {key} is missing, give another file")
    if state[key].ndim != ndim:
        shape = list(state[key].shape)
        raise CheckpointError(f"{path}: {key} has shape {shape}, expected {ndim} axes: give an upstream file")
    return tuple(state[key].shape)


def check_keys(state: Mapping[str, Tensor], expected: Iterable[str], path: str | Path, kind: str) -> None:
    """Check that the keys are those of ``kind``.

    Raises:
        CheckpointError: naming the first missing and unexpected ones.
    """

    def listed(keys: Iterable[str]) -> str:
        names = sorted(keys)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    wanted = set(expected)
    missing, unexpected = wanted - state.keys(), state.keys() - wanted
    problems = [f"{what} {listed(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if problems:
        raise CheckpointError(f"{path} does not have {kind}'s keys ({'; '.join(problems)}): give an upstream weight file")


def check_tensors(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], path: str | Path) -> None:
    """Check shape and dtype of every tensor in ``shapes``.

    Raises:
        CheckpointError: for the first that does not fit.
    """
    for key, expected in shapes.items():
        found = list(state[key].shape)
        if found != list(expected):
            raise CheckpointError(
                f"{path}: {key} has shape {found}, expected {list(expected)}: give an upstream weight file"
            )
        if not state[key].is_floating_point():
            raise CheckpointError(f"{path}: {key} has dtype {state[key].dtype}: give the weights in floating point")


def to_half(weight: Tensor, heads: int) -> Tensor:
    """Rows per head from pairs (2j, 2j + 1) to pairs (j, j + d/2), as transformers rotates them; [heads * d, D]."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Inverse of :func:`to_half`."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with torch.serialization.safe_globals(_HARMLESS):
        # a mapped file costs no memory for what is not copied: optimiser states, exponential averages
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def keys_of(path: Path) -> set[str]:
    """The names of the tensors in a weight file; of a safetensors file nothing else is read.

    Raises:
        CheckpointError: when it cannot be read.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return set(read_state_dict(path))
    try:
        with safe_open(path, framework="numpy") as file:  # torch would map all of it as memory that may be written
            return set(file.keys())
    except Exception as error:
        raise CheckpointError(f"{path} is truncated, corrupt or no weight file: download or export it again") from error
