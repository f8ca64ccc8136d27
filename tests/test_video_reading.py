"""``arsd.video.read_video``: the frames it keeps are the ones asked for, whatever holds them; what is no clip is refused."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import arsd.video
from arsd.errors import InputError
from arsd.video import read_video, sampled

av = pytest.importorskip("av")
FRAMES, FPS, SIZE = 45, 10, 64
FORMATS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "m4v": "mpeg4"}


def ramp(frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
    """Frame i has the grey 20 + 4 i in its upper half and is dark below."""
    video = np.zeros((frames, size, size, 3), dtype=np.uint8)
    video[:, : size // 2] = (20 + 4 * np.arange(frames))[:, None, None, None]
    return video


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of :func:`ramp` these are."""
    grey = frames[:, 4 : SIZE // 2 - 4, 8:-8].astype(float).mean((1, 2, 3))
    return [round((x - 20) / 4) for x in grey]


def write(path: Path, video: np.ndarray, codec: str = "", rate: int = FPS, gop: int = 9, sound: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or FORMATS[path.suffix[1:]], rate=rate)
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = gop, 4_000_000
        heard = container.add_stream("aac", rate=8000) if sound else None
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
        if heard is not None:
            for _ in range(40):
                noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
                noise.rate = 8000
                container.mux(heard.encode(noise))
            container.mux(heard.encode())
    return path


def animation(path: Path, video: np.ndarray, **options) -> Path:
    first, *rest = [Image.fromarray(frame) for frame in video]
    exact = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, loop=0, **{"duration": 100, **exact, **options})
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("clips") / "ramp.mp4", ramp())


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("count", [None, 1, 2, 7, 44, 45, 1000])
def test_a_video_file_gives_the_frames_that_lie_evenly_over_it(tmp_path, suffix: str, count: int | None):
    path = write(tmp_path / f"ramp.{suffix}", ramp(), sound=suffix in ("mp4", "mkv"))
    frames, told = read_video(path, count)
    wanted = np.linspace(0, FRAMES - 1, min(count or FRAMES, FRAMES)).round().astype(int).tolist()
    assert frames.dtype == np.uint8 and frames.shape == (len(wanted), SIZE, SIZE, 3)
    assert numbers(frames) == wanted == told.frames_indices
    assert (told.total_num_frames, told.width, told.height) == (FRAMES, SIZE, SIZE)
    assert told.fps == pytest.approx(FPS, rel=0.03) and told.duration == pytest.approx(FRAMES / FPS, rel=0.03)
    assert told.timestamps == pytest.approx([i / FPS for i in wanted], rel=0.03)


def test_stretches_between_the_frames_are_not_decoded(mp4, monkeypatch):
    """Of 5 groups of 9 frames, two frames are kept: no more than two groups are decoded."""
    read, original = [], arsd.video._decoded

    class Counting:
        def __init__(self, container) -> None:
            self.seek, self.all = container.seek, container.decode

        def decode(self, stream):
            for frame in self.all(stream):
                read.append(frame.pts)
                yield frame

    monkeypatch.setattr(arsd.video, "_decoded", lambda container, *rest: original(Counting(container), *rest))
    assert numbers(read_video(mp4, 2)[0]) == [0, 44] and len(read) <= 18
    read.clear()
    assert numbers(read_video(mp4, 45)[0]) == list(range(45)) and len(read) == 45


def test_rates_count_frames_of_each_second(mp4):
    assert numbers(read_video(mp4, fps=2)[0]) == sampled(45, 10, fps=2) == [0, 6, 11, 16, 22, 28, 33, 38, 44]
    assert len(read_video(mp4, fps=1000)[0]) == 45 and len(read_video(mp4, fps=0.01)[0]) == 1
    assert len(read_video(mp4, num_frames=4, fps=2)[0]) == 4  # at most
    assert len(read_video(mp4, num_frames=40, fps=2)[0]) == 9


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_what_a_phone_held_on_its_side_wrote_is_upright(mp4, tmp_path, degrees: int):
    """The matrix of the track header says by how much players turn the picture clockwise."""
    content = bytearray(mp4.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    turns = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    for place, value in zip((0, 1, 3, 4), turns, strict=True):
        content[start + 4 * place : start + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path = tmp_path / "turned.mp4"
    path.write_bytes(content)
    plain, turned = read_video(mp4, 3)[0], read_video(path, 3)[0]
    assert np.array_equal(turned, np.rot90(plain, -degrees // 90, axes=(1, 2)))


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_animations_give_the_same_as_videos_with_their_own_rate(tmp_path, suffix: str):
    path = animation(tmp_path / f"ramp.{suffix}", ramp(), duration=250)
    for count in (None, 1, 6, 99):
        frames, told = read_video(path, count)
        wanted = sampled(FRAMES, None, count)
        assert np.array_equal(frames, ramp()[wanted]) and told.frames_indices == wanted
        assert told.fps == pytest.approx(4) and told.duration == pytest.approx(FRAMES / 4)
    assert len(read_video(path, fps=1)[0]) == 11


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_transparent_parts_show_white_in_every_frame(tmp_path, suffix: str):
    """A red square with a hole moves over nothing."""
    layers = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(4)]
    for t, layer in enumerate(layers):
        layer.paste((200, 0, 0, 255), (8 * t, 8, 8 * t + 8, 24))
        layer.paste((0, 0, 0, 0), (8 * t + 2, 12, 8 * t + 6, 20))
    path, own = tmp_path / f"square.{suffix}", {"webp": {"lossless": True}, "gif": {"disposal": 2}, "png": {"disposal": 1}}
    layers[0].save(path, save_all=True, append_images=layers[1:], duration=100, **own[suffix])
    frames, _ = read_video(path)
    wanted = np.full((4, 32, 32, 3), 255, dtype=np.uint8)
    for t in range(4):
        wanted[t, 8:24, 8 * t : 8 * t + 8] = (200, 0, 0)
        wanted[t, 12:20, 8 * t + 2 : 8 * t + 6] = 255
    assert np.array_equal(frames, wanted)


def test_a_still_picture_is_a_clip_of_one_frame(tmp_path):
    Image.fromarray(ramp()[3]).save(tmp_path / "still.jpg", quality=100)
    frames, told = read_video(tmp_path / "still.jpg", 8)
    assert numbers(frames) == [3] and told.total_num_frames == 1


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for i, frame in enumerate(ramp(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    frames, told = read_video(tmp_path)
    assert numbers(frames) == list(range(12)) and told.fps is None and told.duration is None
    assert numbers(read_video(tmp_path, 3)[0]) == [0, 6, 11]
    assert read_video(tmp_path, fps=1, source_fps=4)[1].frames_indices == [0, 6, 11]
    Image.new("RGB", (8, 8)).save(tmp_path / "frame99.png")
    with pytest.raises(InputError, match="one size"):
        read_video(tmp_path)


def test_frames_in_memory_are_taken_as_they_are():
    video = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    first = torch.from_numpy(video).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(frame) for frame in video]
    for source in (video, video.astype(np.int64), first, first / 255, first.double() / 255, video / 255, pictures):
        frames, told = read_video(source)
        assert np.array_equal(frames, video) and frames.dtype == np.uint8
        assert (told.total_num_frames, told.width, told.height, told.fps) == (5, 30, 20, None)
    assert np.array_equal(read_video(first.permute(0, 2, 3, 1))[0], video)
    assert np.abs(read_video((first / 255).bfloat16())[0].astype(int) - video).max() <= 1
    assert np.array_equal(read_video(video, 2)[0], video[[0, 4]])
    assert read_video(video, fps=5, source_fps=10)[1].timestamps == [0.0, 0.4]


def bad(tmp_path: Path, mp4: Path) -> dict[str, tuple]:
    """What is refused: (source, options, part of the message)."""
    whole, video = mp4.read_bytes(), np.zeros((4, 8, 8, 3), dtype=np.uint8)
    files = {"cut.mp4": whole[: len(whole) // 2], "words.mp4": b"these are words\n" * 50, "empty.mp4": b"", "empty.gif": b""}
    files |= {"words.webp": b"these are words"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    late = write(tmp_path / "late.mov", np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8))
    fast = tmp_path / "fast.mp4"
    with av.open(str(late)) as source, av.open(str(fast), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    (tmp_path / "fast-cut.mp4").write_bytes(fast.read_bytes()[: fast.stat().st_size // 2])
    mkv = write(tmp_path / "all.mkv", np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.mkv").write_bytes(mkv.read_bytes()[: mkv.stat().st_size // 2])
    webm = write(tmp_path / "all.webm", np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.webm").write_bytes(webm.read_bytes()[: webm.stat().st_size // 2])
    (tmp_path / "cut.mov").write_bytes(late.read_bytes()[: late.stat().st_size // 2])
    webp = animation(tmp_path / "all.webp", ramp())
    (tmp_path / "cut.webp").write_bytes(webp.read_bytes()[: webp.stat().st_size // 2])
    gif = animation(tmp_path / "all.gif", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.gif").write_bytes(gif.read_bytes()[: gif.stat().st_size // 2])
    (tmp_path / "nothing").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        heard = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(heard.encode(silence))
        container.mux(heard.encode())
    named = {
        "no file": (tmp_path / "none.mp4", {}, "there is no file"),
        "no moov": (tmp_path / "cut.mp4", {}, "cannot be read as a video"),
        "words": (tmp_path / "words.mp4", {}, "cannot be read as a video"),
        "nothing in it": (tmp_path / "empty.mp4", {}, "cannot be read as a video"),
        "cut behind its header": (tmp_path / "fast-cut.mp4", {}, "of 30 frames"),
        "cut mkv": (tmp_path / "cut.mkv", {}, "of 3.0 seconds"),
        "cut webm": (tmp_path / "cut.webm", {}, "of 3.0 seconds"),
        "cut mov": (tmp_path / "cut.mov", {}, "cannot be read as a video"),
        "cut webp": (tmp_path / "cut.webp", {}, "cannot be read as a picture"),
        "cut gif": (tmp_path / "cut.gif", {}, "cannot be read as a picture"),
        "empty gif": (tmp_path / "empty.gif", {}, "cannot be read as a picture"),
        "words webp": (tmp_path / "words.webp", {}, "cannot be read as a picture"),
        "sound": (tmp_path / "sound.mp4", {}, "no video in it"),
        "empty folder": (tmp_path / "nothing", {}, "has no pictures"),
        "no frames": (np.zeros((0, 8, 8, 3), dtype=np.uint8), {}, "no frames"),
        "empty list": ([], {}, "is empty"),
        "a number": (3, {}, "a clip is a file"),
        "None": (None, {}, "a clip is a file"),
        "grey": (np.zeros((4, 8, 8), dtype=np.uint8), {}, r"of shape|not ndarray"),
        "bright floats": (video + 7.0, {}, "floats in"),
        "nan": (video + np.nan, {}, "floats in"),
        "bool": (video > 0, {}, "of numbers"),
        "num_frames 0": (video, {"num_frames": 0}, "at least 1"),
        "num_frames -1": (video, {"num_frames": -1}, "at least 1"),
        "num_frames 2.0": (video, {"num_frames": 2.0}, "whole number"),
        "num_frames True": (video, {"num_frames": True}, "whole number"),
        "fps 0": (video, {"fps": 0}, "positive"),
        "fps nan": (video, {"fps": float("nan")}, "positive"),
        "no rate": (video, {"fps": 1}, "source_fps"),
    }
    return named


def test_what_is_no_clip_is_refused_in_one_line(tmp_path, mp4):
    for name, (source, options, message) in bad(tmp_path, mp4).items():
        with pytest.raises(InputError, match=message) as caught:
            read_video(source, **options)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, name


def test_without_pyav_the_message_says_what_to_install_and_animations_need_nothing(tmp_path, mp4, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match=r"pip install 'arsd\[video\]'"):
        read_video(mp4)
    assert len(read_video(animation(tmp_path / "ramp.webp", ramp(3)))[0]) == 3


def test_frames_that_come_unevenly_in_time_are_found_by_their_number(tmp_path):
    path, video = tmp_path / "uneven.mkv", ramp(12)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(video):
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            shown.pts, shown.time_base = 40 * i * i, Fraction(1, 1000)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    assert numbers(read_video(path, 5)[0]) == sampled(12, None, 5)
