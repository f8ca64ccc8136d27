"""What a picture carries about its making: a JSON record in the PNG, enough to make it again."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from arsd.errors import InputError

KEY = "arsd"
_WEIGHTS = (".safetensors", ".bin", ".pt")
_NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype")


def model_hash(folder: str | Path) -> str:
    """SHA-256 over the weights, tokenizers and network configurations of a pipeline folder (64 hex digits).

    Files count in the order of their names. What a library writes about itself into a configuration does not count, nor do
    the model index and the decoding strategy: they do not belong to the model.
    """
    folder, digest = Path(folder), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _WEIGHTS or path.name == "tokenizer.json":
            content = path.read_bytes()
        elif path.name == "config.json":
            values = json.loads(path.read_bytes())
            kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in _NOT_THE_MODEL}
            content = json.dumps(kept, sort_keys=True).encode()
        else:
            continue
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def pack_tokens(tokens: Tensor) -> str:
    """Token ids [N] as text: little-endian uint32, deflated, base64."""
    return base64.b64encode(zlib.compress(tokens.cpu().numpy().astype("<u4").tobytes(), 9)).decode()


def unpack_tokens(text: str) -> np.ndarray:
    """Inverse of :func:`pack_tokens`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4").astype(np.int64)


def tokens_sha256(tokens: Tensor) -> str:
    """SHA-256 of the ids as little-endian uint32."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<u4").tobytes()).hexdigest()


def save_png(image: Image.Image, path: str | Path, record: dict[str, Any], overwrite: bool = False) -> None:
    """Write a PNG with ``record`` in its metadata; a file is there whole or not at all.

    Raises:
        InputError: when the file exists and ``overwrite`` is off, or it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another --out, or pass --overwrite")
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False))
    scratch = path.with_name(f".{path.name}.part")
    try:
        image.save(scratch, format="PNG", pnginfo=info)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        scratch.unlink(missing_ok=True)


def read_png(path: str | Path) -> dict[str, Any]:
    """The record of a picture made by arsd.

    Raises:
        InputError: when the file is no picture, or has no record.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(KEY)
    except OSError as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None
    if text is None:
        raise InputError(f"{path} carries no arsd record")
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{path} carries a damaged arsd record")
    return record
