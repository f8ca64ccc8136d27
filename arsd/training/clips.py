"""Stage ``clips``: animated Fluent Emoji (MIT) with their names, groups and keywords, split by base concept.

The clips are the animated WebP files of the four npm packages ``@lobehub/fluent-emoji-anim-1`` ... ``-4``; the names come
from the PyPI package ``emoji``, groups and keywords from the npm packages ``unicode-emoji-json`` and ``emojilib``.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from arsd.errors import DataError
from arsd.training.data import _captions_by_code, _chosen, _split, base_concept
from arsd.training.scorer_data import KEYWORDS_PACKAGE, fetched, read_keywords, without_tone

CLIP_PACKAGES = tuple(f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4))
GROUPS_PACKAGE = "unicode-emoji-json@0.8.0"
FRAMES, SIDE = 64, 96  # what is kept of a clip
LEAST_FRAMES = 16  # files with fewer are stills
KEYWORDS = 2  # kept of an emoji
_TONES = {f"{code:04x}" for code in range(0x1F3FB, 0x1F400)}


@dataclass
class ClipInfo:
    """What is known of a clip beside its pixels.

    Args:
        file: name of the WebP file, code points.
        name: Unicode short name.
        group: of Unicode's nine groups, lower case.
        keywords: up to two words, by emojilib.
        concept: base concept; all of one concept are on one side of the split.
        held_out: whether it is kept from training.
    """

    file: str
    name: str
    group: str
    keywords: list[str]
    concept: str
    held_out: bool = False


@dataclass
class ClipData:
    """Clips [N, 64, 96, 96, 4] uint8, RGBA and evenly spaced in time, and what is known of each."""

    frames: np.ndarray
    info: list[ClipInfo]

    def indices(self, held_out: bool) -> np.ndarray:
        """Places of the held-out clips, or of the others."""
        return np.flatnonzero(np.array([clip.held_out for clip in self.info]) == held_out)

    @property
    def weights(self) -> np.ndarray:
        """Sampling weights [N]: a concept with n clips counts sqrt(n), so skin tones do not dominate; held-out ones 0."""
        sizes = Counter(clip.concept for clip in self.info)
        return np.array([0.0 if clip.held_out else sizes[clip.concept] ** -0.5 for clip in self.info])

    def save(self, folder: Path) -> None:
        """Write ``clips.npy`` and ``clips.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "clips.npy", self.frames)
        rows = [asdict(clip) for clip in self.info]
        (folder / "clips.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ClipData:
        """Read what :meth:`save` wrote; the frames stay on disk.

        Raises:
            DataError: when the folder does not hold clips.
        """
        folder = Path(folder)
        if not (folder / "clips.npy").is_file() or not (folder / "clips.json").is_file():
            raise DataError(f"no clips in {folder}: run `arsd train clips --out {folder}` first")
        rows = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
        return cls(np.load(folder / "clips.npy", mmap_mode="r"), [ClipInfo(**row) for row in rows])


def decode(stream: bytes, frames: int = FRAMES, side: int = SIDE) -> np.ndarray | None:
    """``frames`` evenly spaced frames [T, side, side, 4] uint8 of an animated file; ``None`` for a still one."""
    image = Image.open(BytesIO(stream))
    count = getattr(image, "n_frames", 1)
    if count < LEAST_FRAMES:
        return None
    wanted = Counter(np.linspace(0, count - 1, frames).round().astype(int).tolist())
    kept = []
    for index, frame in enumerate(ImageSequence.Iterator(image)):
        if index in wanted:
            small = np.asarray(frame.convert("RGBA").resize((side, side), Image.Resampling.BILINEAR))
            kept += [small] * wanted[index]
    return np.stack(kept)


def read_groups(archive: Path) -> dict[str, str]:
    """The group of each emoji, by code points without skin tone and variation selector, from unicode-emoji-json."""
    try:
        with tarfile.open(archive) as files:
            stream = files.extractfile("package/data-by-emoji.json")
            table = json.load(stream) if stream is not None else {}
    except (tarfile.TarError, KeyError, ValueError):
        raise DataError(f"{archive} is not the npm archive of {GROUPS_PACKAGE}") from None
    return {_code([f"{ord(c):04x}" for c in text]): entry["group"].lower() for text, entry in table.items()}


def _code(parts: list[str], tones: bool = False) -> str:
    return "-".join(part for part in parts if part != "fe0f" and (tones or part not in _TONES))


def _archives(source: Path | None, scratch: str) -> Iterator[Path]:
    if source is not None:
        found = sorted(source.glob("*fluent-emoji-anim*.tgz")) if source.is_dir() else []
        if not found:
            raise DataError(f"{source} holds no fluent-emoji-anim .tgz: give the folder with the npm archives, or nothing")
        yield from found
        return
    for package in CLIP_PACKAGES:
        place = Path(scratch) / package.split("/")[1]
        place.mkdir()
        yield fetched(package, None, str(place), "--source")


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive) as files:
            for member in files:
                stream = files.extractfile(member) if member.name.endswith(".webp") else None
                if stream is not None:
                    yield Path(member.name).name, stream.read()
    except tarfile.TarError:
        raise DataError(f"{archive} is no .tgz archive: fetch it with `npm pack`") from None


def build_clips(out: Path, source: Path | None = None, keywords: Path | None = None, groups: Path | None = None) -> ClipData:
    """Decode all clips to ``out/clips.npy`` and copy the held-out files to ``out/held-out/``.

    Args:
        out: folder to write.
        source: folder with the four npm archives; ``None`` fetches them.
        keywords: npm archive of emojilib; ``None`` fetches it.
        groups: npm archive of unicode-emoji-json; ``None`` fetches it.

    Raises:
        DataError: when an archive cannot be fetched or read, or holds no clip with a known name.
    """
    out = Path(out)
    names, clips, info = _captions_by_code(), [], []
    (out / "held-out").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        known = read_keywords(fetched(KEYWORDS_PACKAGE, keywords, scratch, "--keywords"))
        group_of = read_groups(fetched(GROUPS_PACKAGE, groups, scratch, "--groups"))
        for archive in _archives(source, scratch):
            for file, content in _members(archive):
                parts = Path(file).stem.split("-")
                captions, frames = names.get(_code(parts, tones=True)), decode(content)
                if captions is None or frames is None:
                    continue
                words = known.get(without_tone(captions[0]), [])[:KEYWORDS]
                group, concept = group_of.get(_code(parts), "other"), base_concept(captions[0])
                clips.append(frames)
                info.append(ClipInfo(file, captions[0], group, words, concept))
                if _chosen(concept):
                    (out / "held-out" / file).write_bytes(content)
                if len(info) % 100 == 0:
                    print(f"{len(info)} clips decoded", flush=True)
    if not info:
        raise DataError("the archives hold no clip whose code the emoji package knows")
    data = ClipData(np.stack(clips), info)
    firsts = data.frames[:, 0, ..., :3] * (data.frames[:, 0, ..., 3:] / 255) + 255 - data.frames[:, 0, ..., 3:]
    for clip, held_out in zip(info, _split(firsts.astype(np.uint8), [clip.concept for clip in info]), strict=True):
        clip.held_out = bool(held_out)
        if not held_out:  # one that was chosen may have a twin among the others
            (out / "held-out" / clip.file).unlink(missing_ok=True)
    data.save(out)
    return data


BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (8, 8, 8),
    "grey": (136, 136, 136),
    "red": (216, 40, 40),
    "yellow": (248, 216, 56),
    "green": (56, 168, 72),
    "blue": (56, 104, 216),
    "pink": (248, 152, 200),
}


@dataclass
class View:
    """How a clip is shown: which of its frames, where, how large, how turned, how bright, before which colour.

    Args:
        index: places of the shown frames, [T].
        background: RGB in 0..255, [3].
        warp: per frame the shift in x and y (frame widths, to the right and down), log scale, turn (radians, clockwise),
            log squeeze of the width and added light, [T, 6]; ``None`` for none at all.
        mirrored: left and right exchanged.
    """

    index: np.ndarray
    background: np.ndarray
    warp: np.ndarray | None = None
    mirrored: bool = False


def plain_view(frames: int, background: str = "white") -> View:
    """A clip as it is: ``frames`` evenly spaced ones."""
    return View(np.linspace(0, FRAMES - 1, frames).round().astype(int), np.array(BACKGROUNDS[background], np.float32))


def random_view(frames: int, source: np.random.Generator) -> View:
    """Another part, direction, place, size, motion and background of a clip, drawn from ``source``."""
    start, length = (0.0, 1.0) if source.random() < 0.5 else (source.uniform(0, 0.5), source.uniform(0.4, 1))
    moment = np.linspace(start, min(1.0, start + length), frames)
    time = np.linspace(0, 1, frames)
    if source.random() < 0.35:  # the clip stands still for a while
        begin, hold = source.uniform(-0.1, 0.7), source.uniform(0.3, 0.6)
        time = np.where(time < begin, time, np.maximum(begin, time - hold)).clip(0)
        moment = start + (moment[-1] - start) * time / max(time[-1], 1e-3)
    if source.random() < 0.3:
        moment = moment[::-1]
    if source.random() < 0.25:  # a still picture, so that all motion is the added one
        moment = np.full(frames, moment[0])
    name = list(BACKGROUNDS)[source.integers(len(BACKGROUNDS))] if source.random() < 0.6 else "white"
    background = (np.array(BACKGROUNDS[name]) + source.uniform(-7, 7, 3)).clip(0, 255).astype(np.float32)
    warp = np.tile([*source.uniform(-0.14, 0.14, 2), source.uniform(-0.6, 0.08), 0, 0, 0], (frames, 1))
    for channel in source.permutation(6)[: source.choice([0, 1, 2, 3], p=[0.15, 0.4, 0.3, 0.15])]:
        warp[:, channel] += _course(time, source) * source.choice([-1, 1]) * (0.06, 0.06, 0.1, 0.2, 0.22, 0.08)[channel]
    index = (moment * (FRAMES - 1)).round().astype(int).clip(0, FRAMES - 1)
    return View(index, background, warp, bool(source.random() < 0.5))


def _course(time: np.ndarray, source: np.random.Generator) -> np.ndarray:
    """A way, there and back or to and fro over ``time`` 0..1, in a part of it, of size 0.7 to 4."""
    begin, end = np.sort(source.uniform(-0.3, 1.3, 2)).clip(0, 1) if source.random() < 0.6 else (0.0, 1.0)
    part = ((time - begin) / max(end - begin, 0.2)).clip(0, 1)
    turns = source.choice([0.5, 1, 1.5, 2, 3, 4], p=[0.4, 0.25, 0.12, 0.12, 0.06, 0.05])
    return source.uniform(0.7, 3) ** 1.3 * (1 - np.cos(2 * np.pi * turns * part)) / 2


def show(clip: np.ndarray, view: View) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of a ``clip`` [64, H, W, 4] as ``view`` says."""
    frames = torch.from_numpy(np.ascontiguousarray(clip[view.index])).permute(0, 3, 1, 2).float()
    alpha = frames[:, 3:] / 255
    colour = frames[:, :3] * alpha
    if view.mirrored:
        colour, alpha = colour.flip(-1), alpha.flip(-1)
    if view.warp is not None:
        warp = torch.from_numpy(view.warp).float()
        scale, turn = torch.exp(-warp[:, 2]), warp[:, 3]
        squeeze, sine, cosine = torch.exp(warp[:, 4]), turn.sin(), turn.cos()
        rows = torch.stack([cosine * squeeze, sine * squeeze, -sine, cosine], 1).view(-1, 2, 2) * scale[:, None, None]
        shift = -(rows @ (2 * warp[:, :2, None]))
        grid = torch.nn.functional.affine_grid(torch.cat([rows, shift], 2), list(colour.shape), align_corners=False)
        both = torch.nn.functional.grid_sample(torch.cat([colour, alpha], 1), grid, align_corners=False)
        colour, alpha = both[:, :3], both[:, 3:]
        colour = (colour + 255 * warp[:, 5, None, None, None] * alpha).clamp(min=0).minimum(255 * alpha)
    shown = colour + torch.from_numpy(view.background)[:, None, None] * (1 - alpha)
    return shown.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
