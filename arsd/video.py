"""Reading clips: video files, animated pictures, folders of pictures, and frames that are in memory already."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from transformers.video_utils import VideoMetadata

from arsd.errors import InputError

PICTURES = (".png", ".apng", ".gif", ".webp", ".jpg", ".jpeg", ".bmp")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError)


def read_video(
    source: Any,
    num_frames: int | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    on_frame: Callable[[], Any] | None = None,
) -> tuple[np.ndarray, VideoMetadata]:
    """Frames of a clip and what transformers' video processors want to know of it.

    The frames kept lie evenly over the clip: ``round(linspace(0, total - 1, n))``. Of a video file only they are turned into
    pictures, and stretches between them are skipped where the file has key frames to go on from.

    Args:
        source: one of

            - a file: mp4, mkv, webm, mov, avi, ... (through PyAV, or torchcodec where only that is installed), or a picture
              or animation that Pillow reads (WebP, GIF, APNG; transparent parts show white),
            - a folder of pictures of one size, in the order of the numbers in their names,
            - frames: a list of PIL pictures, an array [T, H, W, 3] or a tensor [T, 3, H, W], uint8 or floats in [0, 1].
        num_frames: how many frames to keep at most; ``None``: all.
        fps: how many frames to keep of each second; with ``num_frames`` no more than those in all.
        source_fps: frames per second of a folder or of frames in memory, which tell none.
        on_frame: called for every frame that is decoded, kept or not; what it raises ends the reading.

    Returns:
        uint8 [T, H, W, 3] and ``transformers.video_utils.VideoMetadata``, which has the rate (``None`` where it is not
        known), duration in seconds, size and number of frames of the whole clip, and the indices of the frames kept.

    Raises:
        InputError: for what is no clip, is damaged, has no frames, or cannot be sampled so.
    """
    check_sampling(num_frames, fps, source_fps)

    def pick(total: int, rate: float | None) -> list[int]:
        return sampled(total, rate, num_frames, fps)

    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _of_pictures(_folder(path), source_fps, pick, "folder")
        if not path.is_file():
            raise InputError(f"there is no file {path}: give a video, an animated picture or a folder of pictures")
        seen = on_frame or (lambda: None)
        return _animation(path, pick, seen) if path.suffix.lower() in PICTURES else _video(path, pick, seen)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _of_array(source, source_fps, pick)
    if isinstance(source, Sequence) and source and all(isinstance(x, Image.Image) for x in source):
        return _of_pictures([lambda x=x: x for x in source], source_fps, pick, "pictures")
    known = "a file, a folder, a list of PIL pictures, an array [T, H, W, 3] or a tensor [T, 3, H, W]"
    raise InputError(f"a clip is {known}, not {_kind(source)}")


def check_sampling(num_frames: Any, fps: Any, source_fps: Any = None) -> None:
    """Raise InputError unless ``num_frames`` is at least 1 and the rates are positive, or ``None``."""
    if num_frames is not None and (isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1):
        raise InputError(f"num_frames must be a whole number of at least 1, not {num_frames!r}")
    for name, rate in (("fps", fps), ("source_fps", source_fps)):
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e6):
            raise InputError(f"{name} must be a positive number of frames per second, not {rate!r}")


def sampled(total: int, rate: float | None, num_frames: int | None = None, fps: float | None = None) -> list[int]:
    """Indices of the frames that are kept of ``total``, in order; see :func:`read_video`.

    Raises:
        InputError: when there are no frames, or ``fps`` is asked of a clip whose own ``rate`` is not known.
    """
    if total < 1:
        raise InputError("the clip has no frames: it is empty or damaged")
    count = total if num_frames is None else min(num_frames, total)
    if fps is not None:
        if rate is None:
            raise InputError("fps was given, but the frames do not tell their own rate: pass source_fps, or num_frames only")
        count = min(count, max(1, round(total / rate * fps)))
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


Pick = Callable[[int, float | None], list[int]]


def _described(frames: np.ndarray, total: int, rate: float | None, kept: list[int], backend: str) -> Any:
    height, width = frames.shape[1:3]
    duration = None if rate is None else total / rate
    return frames, VideoMetadata(total, rate, width, height, duration, backend, kept)


def _kind(source: Any) -> str:
    shape = f" of shape {list(source.shape)}" if isinstance(source, (np.ndarray, torch.Tensor)) else ""
    empty = " that is empty" if isinstance(source, Sequence) and not source else ""
    return f"{type(source).__name__}{shape}{empty}"


# ------------------------------------------------------------------------------------------------- pictures and arrays


def _rgb(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]; transparent parts show white."""
    if picture.mode == "RGB":
        return np.asarray(picture)
    rgba = picture.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def _folder(path: Path) -> list[Callable[[], Image.Image]]:
    """What opens each picture of a folder, by the numbers in their names."""

    def order(file: Path) -> list[Any]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", file.name) if part]

    files = sorted((f for f in path.iterdir() if f.suffix.lower() in PICTURES and f.name[0] != "."), key=order)
    if not files:
        raise InputError(f"the folder {path} has no pictures: give one with {', '.join(PICTURES)}, or a video file")

    def opened(file: Path) -> Image.Image:
        try:
            with Image.open(file) as picture:
                picture.load()
                return picture
        except _UNREADABLE as error:
            raise InputError(f"{file} cannot be read as a picture ({_line(error)}): make it again or leave it out") from None

    return [lambda file=file: opened(file) for file in files]  # type: ignore[misc]


def _of_pictures(pictures: list[Any], rate: float | None, pick: Pick, backend: str) -> Any:
    kept = pick(len(pictures), rate)
    frames = [_rgb(pictures[i]()) for i in kept]
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({(frame.shape[1], frame.shape[0]) for frame in frames})
        raise InputError(f"the pictures of a clip must have one size, not {sizes[0]} and {sizes[-1]}: resize them")
    return _described(np.stack(frames), len(pictures), rate, kept, backend)


def _of_array(source: Any, rate: float | None, pick: Pick) -> Any:
    """Channels are last or second; where both fit, last in an array and second in a tensor."""
    tensor = isinstance(source, torch.Tensor)
    axes = [axis for axis in ((1, 3) if tensor else (3, 1)) if source.ndim == 4 and source.shape[axis] == 3]
    if not axes or 0 in source.shape[1:] or source.dtype in (torch.bool, np.bool_):
        raise InputError(f"frames must be [T, H, W, 3] or [T, 3, H, W] of numbers, not {_kind(source)} ({source.dtype})")
    kept = pick(len(source), rate)
    chosen = source[kept]
    if tensor:
        chosen = (chosen.float() if chosen.is_floating_point() else chosen).detach().cpu().numpy()
    chosen = np.moveaxis(chosen, axes[0], -1)
    floats = chosen.dtype.kind == "f"
    if not (chosen.dtype == np.uint8 or (chosen.min() >= 0 and chosen.max() <= (1 if floats else 255))):
        raise InputError("frames must be uint8, whole numbers in 0..255 or floats in [0, 1]: convert them")
    frames = np.ascontiguousarray(np.round(chosen * 255) if floats else chosen, dtype=np.uint8)
    return _described(frames, len(source), rate, kept, "array")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------- animations


def _animation(path: Path, pick: Pick, seen: Callable[[], Any]) -> Any:
    """Pictures that Pillow reads, one at a time; a still picture is a clip of one frame."""
    try:
        with Image.open(path) as picture:
            milliseconds = []
            for frame in ImageSequence.Iterator(picture):
                frame.load()
                seen()
                milliseconds.append(float(frame.info.get("duration") or 100))  # browsers show frames of no duration so long
            total, rate = len(milliseconds), 1000 * len(milliseconds) / sum(milliseconds)
            kept = pick(total, rate)
            frames = []
            for i in kept:
                picture.seek(i)
                seen()
                frames.append(_rgb(picture))
            backend = (picture.format or "pillow").lower()
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read as a picture or animation ({_line(error)}): is it complete?") from None
    return _described(np.stack(frames), total, rate, kept, backend)


# --------------------------------------------------------------------------------------------------------------- videos


def _video(path: Path, pick: Pick, seen: Callable[[], Any]) -> Any:
    try:
        import av
    except ImportError:
        return _with_torchcodec(path, pick)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video in it: give another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            times, starts = _index(path, container, stream)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            kept = pick(len(times), float(rate))
            frames = [_upright(frame) for frame in _decoded(container, stream, times, starts, kept, seen)]
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be read as a video ({error.strerror}): is it one, and complete?") from None
    if len(frames) < len(kept):
        raise InputError(f"{path} is damaged: {len(frames)} of {len(kept)} frames can be decoded; copy or download it again")
    return _described(np.stack(frames), len(times), float(rate), kept, "pyav")


def _index(path: Path, container: Any, stream: Any) -> tuple[list[int | None], list[int]]:
    """The time of every frame in the order shown, and the numbers of those that decoding can begin at. Nothing is decoded.

    Where a file does not give every frame a time of its own, all are ``None``, and decoding can begin at the first only.

    Raises:
        InputError: when packets are missing that the file says it has.
    """
    packets, end = [], Fraction(0)
    for packet in container.demux():
        if packet.size and not packet.is_corrupt:
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream is stream:
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
    told, form = Fraction(container.duration or 0, 1_000_000), container.format.name
    if ("mp4" in form and len(packets) < stream.frames) or ("matroska" in form and end < told * Fraction(9, 10)):
        held = (
            f"{len(packets)} of {stream.frames} frames"
            if stream.frames
            else f"{float(end):.1f} of {float(told):.1f} seconds"
        )
        raise InputError(f"{path} is not complete, it holds {held}: copy or download it again")
    container.seek(0)
    shown = [(time, key) for time, key, discarded in packets if not discarded]
    if len({time for time, _ in shown if time is not None}) < len(shown):
        return [None] * len(shown), [0]
    shown.sort()
    return [time for time, _ in shown], [number for number, (_, key) in enumerate(shown) if key]


def _decoded(
    container: Any, stream: Any, times: list[int | None], starts: list[int], kept: list[int], seen: Callable[[], Any]
) -> Iterator[Any]:
    """The frames ``kept``; jumps ahead where a key frame lies between the last one read and the next."""
    numbers = {time: i for i, time in enumerate(times)} if times[0] is not None else {}
    at, frames = -1, container.decode(stream)
    for wanted in kept:
        begin = starts[max(0, bisect_right(starts, wanted) - 1)] if starts else 0
        if begin > at + 1:
            container.seek(times[begin], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            at = numbers.get(frame.pts, at + 1)
            seen()
            if at >= wanted:
                break
        if at == wanted:
            yield frame


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as players turn it: phones write what the camera sees, and how it was held."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def _with_torchcodec(path: Path, pick: Pick) -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):  # not installed, or without the libraries of FFmpeg
        raise InputError(f"reading {path.name} needs PyAV: pip install 'arsd[video]'") from None
    try:
        decoder = VideoDecoder(str(path), dimension_order="NHWC")
        total, rate = decoder.metadata.num_frames or 0, decoder.metadata.average_fps
        kept = pick(total, rate)
        frames = decoder.get_frames_at(kept).data.numpy()
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be read as a video ({_line(error)}): is it one, and complete?") from None
    return _described(frames, total, rate, kept, "torchcodec")
