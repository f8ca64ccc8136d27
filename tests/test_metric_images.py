"""Sets of pictures read the same from a folder, a zip and an npz; what cannot be read is named in one line."""

from __future__ import annotations

import io
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from arsd.errors import DataError, InputError
from arsd.metrics import Pictures, Resizer
from arsd.metrics.images import check_pictures


def make(count: int, height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, format: str = "png", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@pytest.fixture(params=["folder", "zip", "npz", "compressed npz", "npz in Fortran's order"])
def source(request, tmp_path):
    rows = make(5)
    if request.param == "folder":
        for i in (3, 0, 4, 1, 2):
            (tmp_path / f"{i}.png").write_bytes(encoded(rows[i]))
        (tmp_path / ".0.png.part").write_bytes(b"")
        (tmp_path / ".hidden.png").write_bytes(b"")
        (tmp_path / "prompts.txt").write_text("no picture")
        (tmp_path / "deeper.png").mkdir()
        return tmp_path, rows, "png"
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.mkdir("set")
            for i in (3, 0, 4, 1, 2):
                archive.writestr(f"set/{i}.webp", encoded(rows[i], "webp", lossless=True))
            archive.writestr("__MACOSX/._0.png", b"")
            archive.writestr("record.json", "{}")
        return tmp_path / "a.zip", rows, "webp"
    save = np.savez_compressed if request.param == "compressed npz" else np.savez
    save(tmp_path / "a.npz", np.asfortranarray(rows) if "Fortran" in request.param else rows, np.arange(5))
    return tmp_path / "a.npz", rows, "npz"


def test_every_kind_of_source_gives_the_same_pictures_in_order(source):
    path, rows, format = source
    pictures = Pictures.open(path)
    assert len(pictures) == len(pictures.names) == 5 and pictures.names == sorted(pictures.names)
    assert pictures.format == format and pictures.size() == (6, 8)
    for found, expected in zip(pictures, rows, strict=True):
        assert found.dtype == np.uint8 and found.flags.writeable and np.array_equal(found, expected)
    assert np.array_equal(pictures[-1], rows[-1])
    with pytest.raises(IndexError):
        pictures[5]


def test_batches_and_limits(source):
    path, rows, _ = source
    sizes = [len(batch) for batch in Pictures.open(path).batches(2)]
    assert sizes == [2, 2, 1]
    assert np.array_equal(np.stack([picture for batch in Pictures.open(path).batches(2) for picture in batch]), rows)
    limited = Pictures.open(path, limit=3)
    assert len(limited) == 3 and np.array_equal(np.stack(list(limited)), rows[:3])
    assert len(Pictures.open(path, limit=9)) == 5
    with pytest.raises(InputError, match="limit of 0"):
        Pictures.open(path, limit=0)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(make(1)[0]) if i != 1 else b"damaged")
    pictures = Pictures.open(tmp_path)
    assert len(pictures) == 3 and pictures[2].shape == (6, 8, 3)
    with pytest.raises(DataError, match=r"1\.png cannot be read as a picture"):
        pictures[1]


def test_an_uncompressed_npz_is_mapped_and_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", make(5))
    assert isinstance(Pictures.open(tmp_path / "a.npz")._rows, np.memmap)


def test_jpeg_and_png_together_are_mixed(tmp_path):
    (tmp_path / "a.JPG").write_bytes(encoded(make(1)[0], "jpeg"))
    assert Pictures.open(tmp_path).format == "jpeg"
    (tmp_path / "b.jpeg").write_bytes(encoded(make(1)[0], "jpeg"))
    assert Pictures.open(tmp_path).format == "jpeg"
    (tmp_path / "c.png").write_bytes(encoded(make(1)[0]))
    assert Pictures.open(tmp_path).format == "mixed"


def with_alpha(mode: str) -> Image.Image:
    """One opaque red or dark pixel, one transparent."""
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        image.info["transparency"] = 1
        return image
    image = Image.new(mode, (2, 1), (255, 0, 0, 255) if mode == "RGBA" else (80, 255))
    image.putpixel((1, 0), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    return image


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (255, 0, 0)), ("LA", (80, 80, 80)), ("P", (255, 0, 0))])
def test_transparent_parts_show_white(tmp_path, mode: str, colour: tuple[int, int, int]):
    with_alpha(mode).save(tmp_path / "a.png")
    assert Pictures.open(tmp_path)[0].tolist() == [[list(colour), [255, 255, 255]]]


def test_half_transparent_parts_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert Pictures.open(tmp_path)[0].tolist() == [[[204, 224, 244]]]


def test_grey_and_indexed_pictures_become_rgb(tmp_path):
    Image.new("L", (1, 1), 7).save(tmp_path / "a.png")
    indexed = Image.new("P", (1, 1))
    indexed.putpalette([1, 2, 3])
    indexed.save(tmp_path / "b.png")
    Image.new("1", (1, 1), 1).save(tmp_path / "c.png")
    assert [picture.tolist() for picture in Pictures.open(tmp_path)] == [[[[7, 7, 7]]], [[[1, 2, 3]]], [[[255, 255, 255]]]]


def test_sixteen_bit_pictures_are_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits"):
        Pictures.open(tmp_path)[0]


def refused(path, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=message) as caught:
            Pictures.open(path)[0]
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_missing_empty_and_other_sources_are_refused_in_one_line(tmp_path):
    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no pictures")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "none")
    refused(tmp_path / "empty.zip", "holds no pictures")
    (tmp_path / "a.png").write_bytes(encoded(make(1)[0]))
    refused(tmp_path / "a.png", "is no set of pictures")
    (tmp_path / "b.zip").write_bytes(b"PK no more")
    refused(tmp_path / "b.zip", "cannot be read as a zip")
    (tmp_path / "b.npz").write_bytes(b"PK no more")
    refused(tmp_path / "b.npz", "cannot be read")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_pictures_are_refused_by_name(tmp_path, share: float):
    content = encoded(make(1, 64, 64)[0])
    (tmp_path / "cut.png").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"cut\.png cannot be read") as caught:
        Pictures.open(tmp_path)[0]
    assert "\n" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/cut.png", content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"a\.zip: in/cut\.png cannot be read"):
        Pictures.open(tmp_path / "a.zip")[0]


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.png", encoded(make(1, 32, 32)[0]))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "a.zip").write_bytes(content)
    refused(tmp_path / "a.zip", r"one\.png cannot be read")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": make(2).astype(np.float32)}, r"float32 \[2, 6, 8, 3\]"),
        ({"arr_0": make(2).transpose(0, 3, 1, 2)}, r"uint8 \[2, 3, 6, 8\]"),
        ({"arr_0": make(2)[0]}, r"uint8 \[6, 8, 3\]"),
        ({"images": make(2)}, "cannot be read"),
        ({"arr_0": np.array([None, 1])}, "cannot be read"),
        ({"arr_0": make(0)}, "holds no pictures"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_another_layout_is_refused_in_one_line(tmp_path, arrays, message: str, save):
    save(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", message)


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", make(20))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:700])
    refused(tmp_path / "a.npz", "cannot be read")


# --- resizing


@pytest.mark.parametrize("method", ["lanczos", "bicubic", "bilinear", "box"])
def test_a_resizer_is_pils_filter_of_that_name(method: str):
    picture = make(1, 40, 60)[0]
    expected = Image.fromarray(picture).resize((16, 16), Image.Resampling[method.upper()])
    assert np.array_equal(Resizer(16, method)(picture), np.array(expected))
    square = Image.fromarray(picture[:, 10:50]).resize((16, 16), Image.Resampling[method.upper()])
    assert np.array_equal(Resizer(16, method, "center")(picture), np.array(square))


def test_a_square_is_cut_from_the_middle_of_tall_and_wide_pictures():
    picture = make(1, 4, 7)[0]
    assert np.array_equal(Resizer(crop="center")(picture), picture[:, 1:5])
    assert np.array_equal(Resizer(crop="center")(picture.transpose(1, 0, 2)), picture.transpose(1, 0, 2)[1:5])
    assert np.array_equal(Resizer()(picture), picture)
    assert np.array_equal(Resizer(4, crop="center")(picture), picture[:, 1:5])  # nothing to scale


@pytest.mark.parametrize(
    ("resizer", "text"),
    [
        (Resizer(256), "lanczos-256"),
        (Resizer(224, "bicubic", "center"), "bicubic-224-center"),
        (Resizer(), "none"),
        (Resizer(crop="center"), "center"),
    ],
)
def test_a_resizer_is_named_on_a_card_and_read_back(resizer: Resizer, text: str):
    assert str(resizer) == text and Resizer.parse(text) == resizer


@pytest.mark.parametrize(
    "text", ["", "lanczos", "256", "nearest-256", "lanczos-0", "lanczos-x", "lanczos-256-left", "none-8"]
)
def test_other_resizers_are_refused(text: str):
    with pytest.raises(InputError, match="no resizer .*METHOD-SIZE"):
        Resizer.parse(text)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 1.5}, {"method": "nearest"}, {"crop": "left"}])
def test_resizers_that_cannot_be_are_refused(options):
    with pytest.raises(InputError):
        Resizer(**options)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "no pictures"),
        ([make(1)[0], make(1)[0] / 255], r"picture 1 is float64 \[6, 8, 3\]"),
        ([make(1)[0].transpose(2, 0, 1)], r"picture 0 is uint8 \[3, 6, 8\]"),
        (["a.png"], "picture 0 is str"),
    ],
)
def test_what_is_no_picture_is_refused_by_number(pictures, message: str):
    with pytest.raises(InputError, match=message):
        check_pictures(pictures)
