"""Clips as files: animated WebP that carries its record, and MP4 to show around."""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
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
_XMP, _ANIMATED = 1 << 2, 1 << 1  # flags of a VP8X chunk
MOST_PIXELS = 1 << 26  # of all frames of a clip that is read
RATES = (0.1, 1000.0)  # frames per second that a file can have


def webp_bytes(frames: Sequence[Image.Image], record: dict[str, Any] | None, frame_rate: float, loop: int = 0) -> bytes:
    """An animated WebP without loss, with ``record`` as an attribute in its XMP metadata.

    Frames are put together here, since libwebp's own encoder joins equal ones to one that is shown longer.

    Args:
        frames: RGB pictures of one size.
        record: see :func:`arsd.provenance.make_record`; ``None``: without.
        frame_rate: frames per second, 0.1 to 1000.
        loop: how often it is shown; 0 is for ever.

    Raises:
        InputError: for frames that are no such pictures, or another rate.
    """
    _check(frames, frame_rate)
    width, height = frames[0].size
    duration = round(1000 / frame_rate)
    packet = b"" if record is None else _PACKET.format(html.escape(json.dumps(record, ensure_ascii=False))).encode()
    canvas = _u24(width - 1) + _u24(height - 1)
    flags = _ANIMATED | (_XMP if packet else 0)
    chunks = [_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas)]
    chunks.append(_chunk(b"ANIM", b"\xff\xff\xff\xff" + loop.to_bytes(2, "little")))
    for frame in frames:
        buffer = io.BytesIO()
        frame.convert("RGB").save(buffer, format="WEBP", lossless=True, quality=80, method=4)
        still = next(chunk for name, chunk in _chunks(buffer.getvalue()) if name == b"VP8L")
        place = bytes(6) + canvas + _u24(max(1, duration)) + b"\x02"  # at (0, 0), over what was there
        chunks.append(_chunk(b"ANMF", place + still))
    if packet:
        chunks.append(_chunk(b"XMP ", packet))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def xmp_record(image: Image.Image) -> str | None:
    """The text of the record in the XMP metadata of an opened picture, or ``None``."""
    packet = image.info.get("xmp") or b""
    found = _RECORD.search(packet if isinstance(packet, bytes) else packet.encode())
    return None if found is None else html.unescape(found.group(1).decode("utf-8", "replace"))


def frames_of(image: Image.Image) -> list[Image.Image]:
    """All frames of an opened clip, RGB; a transparent one as RGBA, which no clip of arsd has.

    Raises:
        ValueError: for more pixels than a clip of arsd has.
    """
    if image.width * image.height * getattr(image, "n_frames", 1) > MOST_PIXELS:
        raise ValueError(f"its frames have more than {MOST_PIXELS} pixels")
    frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
    return [frame.convert("RGB") if int(np.asarray(frame)[..., 3].min()) == 255 else frame for frame in frames]


def mp4_bytes(frames: Sequence[Image.Image], frame_rate: float) -> bytes:
    """An MP4 (H.264, with loss) of RGB pictures of one size; odd sides lose a pixel, as the codec wants.

    Raises:
        InputError: without PyAV, or as :func:`webp_bytes` does.
    """
    _check(frames, frame_rate)
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


def write_file(content: bytes, path: str | Path, overwrite: bool = False) -> None:
    """Write a file; it is there whole or not at all.

    Raises:
        InputError: when the file exists and ``overwrite`` is off, or it cannot be written.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: choose another --out, or pass --overwrite")
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def save_webp(
    frames: Sequence[Image.Image], path: str | Path, record: dict[str, Any], frame_rate: float = 8.0, overwrite: bool = False
) -> None:
    """Write a clip with its record; see :func:`webp_bytes`.

    Raises:
        InputError: for frames that are none, when the file exists and ``overwrite`` is off, or it cannot be written.
    """
    write_file(webp_bytes(frames, record, frame_rate), path, overwrite)


def _check(frames: Sequence[Image.Image], frame_rate: float) -> None:
    if not len(frames) or not all(isinstance(frame, Image.Image) for frame in frames):
        raise InputError("frames must be PIL pictures, at least one: make clips with output_type='pil'")
    if len({frame.size for frame in frames}) > 1:
        raise InputError("the frames of a clip must have one size")
    if not RATES[0] <= frame_rate <= RATES[1]:
        raise InputError(f"frame_rate must lie in {RATES[0]:g}..{RATES[1]:g} frames per second, not {frame_rate}")


def _u24(number: int) -> bytes:
    return number.to_bytes(3, "little")


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


def _chunks(webp: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, whole chunk) of every chunk of a file."""
    at = 12
    while at < len(webp):
        end = at + 8 + int.from_bytes(webp[at + 4 : at + 8], "little")
        end += end % 2
        yield webp[at : at + 4], webp[at:end]
        at = end
