"""Clips as files: animated WebP that carries its record, and MP4 to show around."""

from __future__ import annotations

import html
import io
import json
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from arsd.errors import InputError

_PACKET = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:arsd="urn:arsd:record" arsd:record="{}"/></rdf:RDF></x:xmpmeta>'
)
_RECORD = re.compile(rb'arsd:record="([^"]*)"')
MOST_FRAMES = 4096


def webp_bytes(frames: Sequence[Image.Image], record: dict[str, Any] | None, frame_rate: float, loop: int = 0) -> bytes:
    """An animated WebP without loss, with ``record`` as an attribute in its XMP metadata.

    Args:
        frames: RGB pictures of one size.
        record: see :func:`arsd.provenance.make_record`; ``None``: without.
        frame_rate: frames per second.
        loop: how often it is shown; 0 is for ever.
    """
    buffer, first, rest = io.BytesIO(), frames[0], list(frames[1:])
    packet = b"" if record is None else _PACKET.format(html.escape(json.dumps(record, ensure_ascii=False))).encode()
    options = {"lossless": True, "quality": 80, "method": 4, "minimize_size": False, "xmp": packet}
    duration = max(1, round(1000 / frame_rate))
    first.save(buffer, format="WEBP", save_all=True, append_images=rest, duration=duration, loop=loop, **options)
    return buffer.getvalue()


def xmp_record(image: Image.Image) -> str | None:
    """The text of the record in the XMP metadata of an opened picture, or ``None``."""
    packet = image.info.get("xmp") or b""
    found = _RECORD.search(packet if isinstance(packet, bytes) else packet.encode())
    return None if found is None else html.unescape(found.group(1).decode("utf-8", "replace"))


def frames_of(image: Image.Image) -> list[Image.Image]:
    """All frames of an opened clip, RGB; a transparent one as RGBA, which no clip of arsd has.

    Raises:
        ValueError: for more frames than any clip has.
    """
    if getattr(image, "n_frames", 1) > MOST_FRAMES:
        raise ValueError(f"it has more than {MOST_FRAMES} frames")
    frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    return [frame.convert("RGB") if int(np.asarray(frame)[..., 3].min()) == 255 else frame for frame in frames]


def mp4_bytes(frames: Sequence[Image.Image], frame_rate: float) -> bytes:
    """An MP4 (H.264, with loss) of RGB pictures of one size; odd sides lose a pixel, as the codec wants.

    Raises:
        InputError: without PyAV.
    """
    try:
        import av
    except ImportError:
        raise InputError("writing MP4 needs PyAV: pip install 'arsd[video]'") from None
    buffer, (width, height) = io.BytesIO(), frames[0].size
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            pixels = np.ascontiguousarray(np.asarray(frame.convert("RGB"))[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_clip(content: bytes, path: str | Path, overwrite: bool = False) -> None:
    """Write a file; it is there whole or not at all.

    Raises:
        InputError: when the file exists and ``overwrite`` is off, or it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another --out, or pass --overwrite")
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        scratch.unlink(missing_ok=True)


def save_webp(
    frames: Sequence[Image.Image], path: str | Path, record: dict[str, Any], frame_rate: float = 8.0, overwrite: bool = False
) -> None:
    """Write a clip with its record; see :func:`webp_bytes`.

    Raises:
        InputError: when the file exists and ``overwrite`` is off, or it cannot be written.
    """
    write_clip(webp_bytes(frames, record, frame_rate), path, overwrite)
