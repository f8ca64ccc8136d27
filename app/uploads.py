"""What users upload, looked at before anything else is done with it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from arsd.app.service import Limits
from arsd.errors import InputError
from arsd.video import PICTURES

MP4, MATROSKA = (b"ftyp", b"moov", b"mdat", b"free", b"wide"), b"\x1a\x45\xdf\xa3"
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
CLIPS = (*(suffix for suffix in PICTURES if suffix not in (".jpg", ".jpeg", ".bmp")), *VIDEOS)


def checked_picture(path: object, limits: Limits) -> Path:
    """A PNG file of bearable size.

    Raises:
        InputError: for anything else.
    """
    file = _file(path, "a PNG file", limits)
    width, height, form, _ = _header(file)
    if form != "PNG":
        raise InputError(f"{file.name} is a {form or 'file'}, no PNG: only PNG files carry an arsd record")
    _bearable(file, width * height, limits.pixels)
    return file


def checked_clip(path: object, limits: Limits) -> Path:
    """A video or an animated picture of bearable size.

    Raises:
        InputError: for anything else.
    """
    file = _file(path, "a clip", limits)
    if file.suffix.lower() not in CLIPS:
        raise InputError(f"{file.name} is no clip that can be read: give one of {', '.join(CLIPS)}")
    if file.suffix.lower() in PICTURES:
        width, height, _, frames = _header(file)
        _bearable(file, width * height, limits.clip_pixels)
        if frames > limits.clip_frames:
            raise InputError(f"{file.name} has {frames} frames: at most {limits.clip_frames} are taken")
    elif not _looks_like_video(file):
        raise InputError(f"{file.name} is no video: its content is not that of mp4, mov, webm, mkv or avi")
    else:
        _bearable(file, _video_pixels(file), limits.clip_pixels)
    return file


def _file(path: object, wanted: str, limits: Limits) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(f"there is no file: upload {wanted}")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no file {file.name}: upload it again")
    size = file.stat().st_size
    if not 0 < size <= limits.upload:
        raise InputError(f"{file.name} has {size} bytes: files of 1 to {limits.upload} are taken")
    return file


def _header(file: Path) -> tuple[int, int, str, int]:
    """Width, height, format and number of frames."""
    try:
        with Image.open(file, formats=("PNG", "GIF", "WEBP", "JPEG")) as image:  # no format that starts other programs
            return *image.size, image.format or "", int(getattr(image, "n_frames", 1))
    except Exception as error:  # Pillow's plugins raise what they like
        raise InputError(f"{file.name} cannot be read as a picture: is it one, and complete?") from error


def _video_pixels(file: Path) -> int:
    """Pixels of a frame of a video; 0 where nothing can tell (reading it will say why)."""
    try:
        import av

        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            return int(stream.width or 0) * int(stream.height or 0)
    except Exception:
        return 0


def _looks_like_video(file: Path) -> bool:
    """By its first bytes: a text file may name other files for FFmpeg to open."""
    with file.open("rb") as content:
        first = content.read(12)
    return first[4:8] in MP4 or first[:4] == MATROSKA or (first[:4], first[8:12]) == (b"RIFF", b"AVI ")


def _bearable(file: Path, pixels: int, most: int) -> None:
    if pixels > most:
        raise InputError(f"{file.name} has {pixels} pixels: at most {most} are taken")
