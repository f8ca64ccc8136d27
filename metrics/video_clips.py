"""Sets of clips in folders, read one clip at a time, and which of their frames are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from arsd.errors import DataError, InputError
from arsd.metrics.images import _UNREADABLE, SUFFIXES, _open_rows, on_white
from arsd.video import PICTURES, check_sampling, read_video, sampled

ANIMATIONS = (".webp", ".gif", ".apng")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")
PICKS = ("even", "first")
_UNTOLD = 100  # milliseconds that browsers show a frame of no duration


@dataclass(frozen=True)
class FramePick:
    """Which frames of a clip are looked at; figures of other picks are not comparable.

    Args:
        num_frames: how many, of every clip; ``None``: all that it has.
        pick: ``even``: evenly over the whole clip, its first and last among them; ``first``: one after the other from the
            beginning, as FVD is computed.
        fps: with ``first``: read the clip at so many frames per second.

    Raises:
        InputError: for anything else.
    """

    num_frames: int | None = 16
    pick: str = "even"
    fps: float | None = None

    def __post_init__(self) -> None:
        check_sampling(self.num_frames, self.fps)
        if self.pick not in PICKS:
            raise InputError(f"no pick of frames {self.pick!r}: there are {' and '.join(PICKS)}")
        if self.fps is not None and self.pick == "even":
            raise InputError("a rate in frames per second goes with the first frames, not with frames spread evenly")

    def __str__(self) -> str:
        count = "all" if self.num_frames is None else str(self.num_frames)
        return f"{self.pick}-{count}" + ("" if self.fps is None else f"-at-{self.fps:g}")


@dataclass(frozen=True)
class Clip:
    """The frames that are looked at.

    Args:
        frames: uint8 [T, H, W, 3].
        rate: of these frames per second; ``None`` where the source does not tell.
    """

    frames: np.ndarray
    rate: float | None


class Clips:
    """An ordered set of clips that are read when asked for; use :meth:`open`.

    Attributes:
        names: of the clips, in order.
        format: the suffix of the files without its dot, ``frames`` for folders of pictures, ``npz``, or ``mixed``.
    """

    def __init__(
        self, source: Path, items: Sequence[Path] | np.ndarray, names: list[str], format: str, pick: FramePick
    ) -> None:
        self.source, self.names, self.format, self.pick = source, names, format, pick
        self._items = items

    @staticmethod
    def open(source: str | Path, pick: FramePick | None = None, limit: int | None = None) -> Clips:
        """The clips of a folder or an ``.npz``, or one clip file.

        Args:
            source: a folder of clip files (:data:`ANIMATIONS`, :data:`VIDEOS`) and of folders of frames, sorted by name,
                hidden ones left out; or an ``.npz`` with uint8 [N, T, H, W, 3] as ``arr_0``; or a file of one clip.
            pick: which frames are looked at.
            limit: take the first so many clips.

        Raises:
            DataError: when there is no such source, or it holds no clips.
            InputError: for a limit below 1.
        """
        source, pick = Path(source), pick or FramePick()
        if limit is not None and limit < 1:
            raise InputError(f"a limit of {limit} clips leaves none: give at least 1")
        if source.is_dir():
            files = _clips_of(source)[:limit]
            kinds = {path.suffix.lower()[1:] if path.is_file() else "frames" for path in files}
            return Clips(source, files, [p.name for p in files], kinds.pop() if len(kinds) == 1 else "mixed", pick)
        suffix = source.suffix.lower()
        if not source.is_file():
            raise DataError(f"{source} does not exist: give a folder of clips")
        if suffix in ANIMATIONS + VIDEOS:
            return Clips(source, [source], [source.name], suffix[1:], pick)
        if suffix != ".npz":
            raise DataError(f"{source} is no set of clips: give a folder of {', '.join(ANIMATIONS + VIDEOS)}, or an .npz")
        rows = _rows(source)[:limit]
        return Clips(source, rows, [f"{i:06d}" for i in range(len(rows))], "npz", pick)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Clip:
        """Clip ``index``; transparent parts show white.

        Writers of WebP, GIF and APNG merge frames that are equal: a picture that is shown k times as long as the shortest
        counts as k frames, and one that is alone as a clip that never moves.

        Raises:
            DataError: when it cannot be read, or has fewer frames than are looked at; the message names it.
        """
        wanted = self.pick
        frames, kept, fps = _looked_at(self._items[index], wanted)
        if wanted.num_frames is not None and len(frames) < wanted.num_frames:
            name = self.source / self.names[index] if self.source.is_dir() else self.source
            raise DataError(
                f"{name} has {len(frames)} frames, {wanted.num_frames} are looked at: ask for fewer, or leave this clip out"
            )
        return Clip(frames, _rate(kept, fps))

    def batches(self, size: int) -> Iterator[list[Clip]]:
        """All clips in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield [self[i] for i in range(start, min(start + size, len(self)))]


def _looked_at(item: Path | np.ndarray, wanted: FramePick) -> tuple[np.ndarray, list[int], float | None]:
    """Frames [T, H, W, 3], their numbers in the clip, and the frames per second of the clip."""
    most = wanted.num_frames if wanted.pick == "even" else None
    if isinstance(item, Path) and item.is_file() and item.suffix.lower() in ANIMATIONS:
        pictures, order, rate = _animation(item)
        if len(pictures) == 1 and wanted.num_frames is not None:
            return pictures.repeat(wanted.num_frames, axis=0), [], None
        kept = sampled(len(order), rate, most, wanted.fps)[: wanted.num_frames]
        return pictures[order[kept]], kept, rate
    try:
        frames, told = read_video(item, most, wanted.fps)
    except InputError as error:
        raise DataError(str(error)) from None
    return frames[: wanted.num_frames], list(told.frames_indices or ())[: wanted.num_frames], told.fps


def _animation(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Pictures [P, H, W, 3], the picture of each frame [T], and frames per second.

    Raises:
        DataError: when it cannot be read.
    """
    pictures, milliseconds = [], []
    try:
        with Image.open(path) as animation:
            for picture in ImageSequence.Iterator(animation):
                picture.load()
                pictures.append(np.asarray(on_white(picture)))
                milliseconds.append(float(picture.info.get("duration") or _UNTOLD))
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise DataError(f"{path} cannot be read as an animation ({reason}): replace or remove it") from None
    shortest = min(milliseconds)
    times = [round(each / shortest) for each in milliseconds]
    return np.stack(pictures), np.repeat(np.arange(len(pictures)), times), 1000 / shortest


def _rate(kept: list[int], fps: float | None) -> float | None:
    """Frames per second of the frames kept."""
    return None if fps is None or len(kept) < 2 else fps * (len(kept) - 1) / (kept[-1] - kept[0])


def _clips_of(folder: Path) -> list[Path]:
    """Clip files and folders of frames, sorted by name.

    Raises:
        DataError: when there are none.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [
        p for p in entries if (p.suffix.lower() in ANIMATIONS + VIDEOS if p.is_file() else p.is_dir() and _has_pictures(p))
    ]
    if found:
        return found
    if any(path.suffix.lower() in SUFFIXES for path in entries):
        raise DataError(f"{folder} holds pictures, not clips: give the folder above it, or leave out --video")
    kinds = ", ".join(ANIMATIONS + VIDEOS)
    raise DataError(f"{folder} holds no clips: give a folder of {kinds}, or of folders of frames")


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURES and path.name[0] != "." for path in folder.iterdir())


def _rows(source: Path) -> np.ndarray:
    """``arr_0`` of an npz, uint8 [N, T, H, W, 3].

    Raises:
        DataError: when it is something else.
    """
    try:
        rows = _open_rows(source)
    except (*_UNREADABLE, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source} cannot be read ({reason}): give uint8 [N, T, H, W, 3] as arr_0") from None
    if rows.dtype != np.uint8 or rows.ndim != 5 or rows.shape[-1] != 3 or not rows.size:
        raise DataError(f"{source} holds {rows.dtype} {list(rows.shape)} as arr_0: give uint8 [N, T, H, W, 3]")
    return rows
