"""Pictures to be measured: sets read one picture at a time, and the resizing that a figure depends on."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from arsd.errors import DataError, InputError

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
METHODS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Pictures(ABC):
    """An ordered set of pictures that are read when asked for; use :meth:`open`.

    Attributes:
        names: of the pictures, in order (file names, zip members, or row numbers of an npz).
        format: ``png``, ``jpeg``, ``webp``, ``npz``, or ``mixed``; JPEG shifts Frechet distances, so it belongs to a figure.
    """

    def __init__(self, source: Path, names: list[str], format: str) -> None:
        if not names:
            raise DataError(f"{source} holds no pictures: give a folder or .zip of {', '.join(SUFFIXES)}, or an .npz")
        self.source, self.names, self.format = source, names, format

    @staticmethod
    def open(source: str | Path, limit: int | None = None) -> Pictures:
        """The pictures of a folder, a ``.zip`` or an ``.npz``.

        Args:
            source: a folder (its own files, sorted by name; hidden ones are left out), a ``.zip`` (sorted by member name;
                other members are left out), or an ``.npz`` with uint8 [N, H, W, 3] as ``arr_0`` (the layout of the sample
                files of OpenAI's guided-diffusion).
            limit: take the first so many.

        Raises:
            DataError: when there is no such source, or it holds no pictures.
            InputError: for a limit below 1.
        """
        source = Path(source)
        if limit is not None and limit < 1:
            raise InputError(f"a limit of {limit} pictures leaves none: give at least 1")
        if source.is_dir():
            return _Folder(source, limit)
        if not source.is_file():
            raise DataError(f"{source} does not exist: give a folder of pictures, a .zip or an .npz")
        if source.suffix.lower() == ".zip":
            return _Archive(source, limit)
        if source.suffix.lower() == ".npz":
            return _Rows(source, limit)
        raise DataError(f"{source} is no set of pictures: give a folder, a .zip or an .npz")

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """Picture ``index``, uint8 [H, W, 3], RGB; transparent parts show white.

        An EXIF orientation is not applied, as in the published evaluators.

        Raises:
            DataError: when it cannot be read; the message names it.
        """

    def size(self) -> tuple[int, int]:
        """(height, width) of the first picture."""
        height, width = self[0].shape[:2]
        return height, width

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """All pictures in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield [self[i] for i in range(start, min(start + size, len(self)))]


class _Folder(Pictures):
    def __init__(self, source: Path, limit: int | None) -> None:
        names = _picture_names([path.name for path in source.iterdir() if path.is_file()])[:limit]
        super().__init__(source, names, _format(names))

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.source / self.names[index]
        return _decode(path, str(path))


class _Archive(Pictures):
    def __init__(self, source: Path, limit: int | None) -> None:
        try:
            self._archive = zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{source} cannot be read as a zip file ({error}): make or download it again") from None
        names = _picture_names(self._archive.namelist())[:limit]
        super().__init__(source, names, _format(names))

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.names[index]
        try:
            content = self._archive.read(name)
        except _UNREADABLE as error:
            raise DataError(f"{self.source}: {name} cannot be read ({error}): make the archive again") from None
        return _decode(BytesIO(content), f"{self.source}: {name}")


class _Rows(Pictures):
    def __init__(self, source: Path, limit: int | None) -> None:
        try:
            rows = _open_rows(source)
        except (*_UNREADABLE, KeyError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{source} cannot be read ({reason}): give uint8 [N, H, W, 3] as arr_0") from None
        if rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[-1] != 3:
            raise DataError(f"{source} holds {rows.dtype} {list(rows.shape)} as arr_0: give uint8 [N, H, W, 3]")
        self._rows = rows[:limit]
        super().__init__(source, [f"{i:06d}" for i in range(len(self._rows))], "npz")

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self._rows[index])


def _picture_names(names: Sequence[str]) -> list[str]:
    """Those that name a picture and are not hidden, sorted."""
    paths = [PurePosixPath(name) for name in names]
    return sorted(
        name
        for name, path in zip(names, paths, strict=True)
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not name.endswith("/")
    )


def _format(names: Sequence[str]) -> str:
    kinds = {SUFFIXES[PurePosixPath(name).suffix.lower()] for name in names}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _open_rows(source: Path) -> np.ndarray:
    """``arr_0`` of an npz: mapped from the file where it is stored uncompressed (as np.savez does), else read."""
    with zipfile.ZipFile(source) as archive:
        entry = archive.getinfo("arr_0.npy")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        with np.load(source, allow_pickle=False) as arrays:
            return arrays["arr_0"]
    with source.open("rb") as file:
        file.seek(entry.header_offset + 26)  # of the local header, whose extra field may differ from the directory's
        lengths = np.frombuffer(file.read(4), dtype="<u2")
        file.seek(int(lengths.sum()), 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("arr_0 holds Python objects")
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")


def _decode(source: Path | IO[bytes], name: str) -> np.ndarray:
    """A picture file as uint8 [H, W, 3] on white."""
    try:
        with Image.open(source) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}): save it with 8")
            return np.array(on_white(image))
    except DataError:
        raise
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} cannot be read as a picture ({reason}): replace or remove it") from None


def on_white(image: Image.Image) -> Image.Image:
    """An RGB copy; transparent parts show white."""
    if "A" not in image.mode and "a" not in image.mode and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_pictures(pictures: Sequence[np.ndarray]) -> None:
    """Refuse what is not a non-empty sequence of uint8 [H, W, 3].

    Raises:
        InputError: naming the first that is wrong.
    """
    if not len(pictures):
        raise InputError("no pictures were given: features need at least one")
    for i, picture in enumerate(pictures):
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            found = f"{picture.dtype} {list(picture.shape)}" if hasattr(picture, "dtype") else type(picture).__name__
            raise InputError(f"picture {i} is {found}: give numpy uint8 [H, W, 3]")


@dataclass(frozen=True)
class Resizer:
    """Scales pictures to a square with PIL (filters widened when shrinking, rounded to 8 bits).

    Its text form names it on an evaluation card: ``lanczos-256``, ``bicubic-224-center``, ``center``, ``none``.

    Attributes:
        size: of a side in pixels; None keeps the scale.
        method: filter, of :data:`METHODS`.
        crop: ``center`` cuts the largest centred square out first, ``none`` changes the proportions instead.
    """

    size: int | None = None
    method: str = "lanczos"
    crop: str = "none"

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise InputError(f"a side of {self.size} pixels cannot be made: give an integer of at least 1")
        if self.method not in METHODS:
            raise InputError(f"no resizing method {self.method!r}: there are {', '.join(METHODS)}")
        if self.crop not in ("none", "center"):
            raise InputError(f"no crop {self.crop!r}: there are none and center")

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [size, size, 3] (without a size: the picture, or its centred square)."""
        height, width = picture.shape[:2]
        if self.crop == "center":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            picture = picture[top : top + side, left : left + side]
        if self.size is None or picture.shape[:2] == (self.size, self.size):
            return np.ascontiguousarray(picture)
        image = Image.fromarray(np.ascontiguousarray(picture))
        return np.array(image.resize((self.size, self.size), METHODS[self.method]))

    def __str__(self) -> str:
        words = [] if self.size is None else [self.method, str(self.size)]
        return "-".join(words + ["center"] * (self.crop == "center")) or "none"

    @staticmethod
    def parse(text: str) -> Resizer:
        """Inverse of ``str``.

        Raises:
            InputError: when the text is no resizer.
        """
        words, crop = text.strip().lower().split("-"), "none"
        if words[-1] == "center":
            crop = words.pop()
        if words in ([], ["none"]):
            return Resizer(crop=crop)
        if len(words) != 2 or words[0] not in METHODS or not words[1].isdecimal() or int(words[1]) < 1:
            forms = "METHOD-SIZE, METHOD-SIZE-center, center or none"
            raise InputError(f"no resizer {text!r}: write {forms}, where METHOD is one of {', '.join(METHODS)}")
        return Resizer(int(words[1]), words[0], crop)
