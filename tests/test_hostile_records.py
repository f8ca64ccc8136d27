"""A record is somebody else's word: made-up ones are refuted or unknown, and never stop the others or eat the memory."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tiny_pipeline import TOKENS, class_pipeline, hushed, seeded, text_pipeline, tiny_vq

import arsd
from arsd.provenance import pack_tokens, tokens_sha256, unpack_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    root = tmp_path_factory.mktemp("hostile")
    class_pipeline().save_pretrained(root / "class")
    text_pipeline().save_pretrained(root / "text")
    found = {}
    for name, call in (("class", {"class_labels": [2]}), ("text", {"prompt": ["red apple"]})):
        pipe = hushed(arsd.AutoARPipeline.from_pretrained(root / name))
        found[name] = pipe, pipe(**call, generator=seeded(1), decoder="sjd:window=4")
    return found


def judged(made: Any, kind: str, folder: Path, **changes: Any) -> Any:
    """What is said of a genuine picture beside one whose record was changed: the genuine one's must not suffer."""
    pipe, out = made[kind]
    honest, forged = folder / "honest.png", folder / "forged.png"
    record = pipe.record(out, 0)
    arsd.save_png(out.images[0], honest, record, overwrite=True)
    arsd.save_png(out.images[0], forged, record | changes, overwrite=True)
    first, second, third = pipe.verify([honest, forged, honest])
    assert (first.result, third.result) == ("verified", "verified")
    return second


FIELDS = ["slots", "height", "width", "given_tokens", "noise_seed", "image_index"]
FIELDS += ["batch", "pass_tokens", "probe", "tokens", "sampling"]
SAMPLING = ["guidance_scale", "temperature", "top_p", "top_k", "guidance_interval", "image_guidance_scale"]
TINY = (1e-300, 5e-324)
LAWS_THAT_THERE_ARE = [("top_k", 10**400), *((f"{name}_scale", x) for name in ("guidance", "image_guidance") for x in TINY)]
LAWS_THAT_THERE_ARE += [("top_p", x) for x in TINY]
ODD: list[Any] = [None, [], {}, "x", -1, 2**70, 1e300, True, float("nan"), [[1]]]


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("field", FIELDS)
def test_no_odd_value_is_believed_or_stops_the_others(made, kind, field, tmp_path):
    optional = field in ("slots", "height", "width", "given_tokens")
    for value in ODD:
        if optional and value is None:
            continue
        result = judged(made, kind, tmp_path, **{field: value})
        if field == "slots" and value in (2**70, -1):
            continue  # LlamaGen has no slots
        assert result.result in ("refuted", "unknown"), value


@pytest.mark.parametrize("kind", ["class", "text"])
def test_inputs_of_another_type_are_not_followed(made, kind, tmp_path):
    field = "class_label" if kind == "class" else "prompt"
    for value in [5 if kind == "text" else "5", None, [1, 2], [[1]], True, {}, ["red apple"]]:
        assert judged(made, kind, tmp_path, **{field: value}).result in ("refuted", "unknown")


@pytest.mark.parametrize("name", SAMPLING)
def test_odd_sampling_is_not_followed(made, name, tmp_path):
    pipe, out = made["class"]
    sampling = pipe.record(out, 0)["sampling"]
    for value in ["x", None, [], 10**400, 1e-300, 1e200, 5e-324, -3, float("inf"), True]:
        if (name, value) in LAWS_THAT_THERE_ARE:
            continue
        assert judged(made, "class", tmp_path, sampling=sampling | {name: value}).result in ("refuted", "unknown"), value


@pytest.mark.parametrize("given", [1, TOKENS - 1, TOKENS, 5])
def test_given_tokens_are_whole_rows_and_never_all(made, given, tmp_path):
    assert judged(made, "class", tmp_path, given_tokens=given).result == "unknown"


def test_a_picture_whose_codes_are_all_given_is_not_proven(samples, tmp_path):
    """What is left behind them are marks, which prove nothing."""
    sample = samples.sample("lumina-mgpt")
    pipe, size = sample.load(dtype=torch.float32), {"height": 64, "width": 96}
    out = pipe("a cat", generator=seeded(1), **size)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    tokens, raster = pipe.encode_image(noise, 64, 96), pipe.make_raster(64, 96)
    for given in range(raster.num_tokens - 3, raster.num_tokens + 1):
        record = pipe.record(out, 0) | {"given_tokens": given, "tokens": pack_tokens(tokens[0])}
        record["tokens_sha256"] = tokens_sha256(tokens[0])
        arsd.save_png(pipe.to_pil(tokens, raster)[0], tmp_path / "a.png", record, overwrite=True)
        assert pipe.verify(tmp_path / "a.png").result == "unknown"


def test_marks_at_the_places_of_codes_are_refuted(samples, tmp_path):
    pipe = samples.sample("anole").load(dtype=torch.float32)
    out = pipe("a cat", generator=seeded(1))
    tokens = out.tokens[0].clone()
    tokens[0] = pipe.make_raster().vocab - 1
    record = pipe.record(out, 0) | {"tokens": pack_tokens(tokens), "tokens_sha256": tokens_sha256(tokens), "given_tokens": 4}
    arsd.save_png(out.images[0], tmp_path / "a.png", record)
    assert pipe.verify(tmp_path / "a.png").result == "refuted"


def test_what_is_shown_must_be_what_is_compared(made, tmp_path):
    """Not a genuine picture under an alpha channel, or in front of other frames."""
    pipe, out = made["class"]
    arsd.save_png(out.images[0], tmp_path / "a.png", pipe.record(out, 0))
    with Image.open(tmp_path / "a.png") as image:
        text, clear = image.text["arsd"], image.convert("RGBA")  # type: ignore[attr-defined]
    info = PngImagePlugin.PngInfo()
    info.add_itxt("arsd", text)
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png", pnginfo=info)
    others = [Image.new("RGB", out.images[0].size, colour) for colour in ("red", "blue")]
    out.images[0].save(tmp_path / "frames.png", pnginfo=info, save_all=True, append_images=others)
    out.images[0].save(tmp_path / "keyed.png", pnginfo=info, transparency=out.images[0].getpixel((0, 0)))
    for name in ("clear", "frames", "keyed"):
        assert pipe.verify(tmp_path / f"{name}.png").result == "refuted", name


def test_packed_tokens_are_unpacked_no_further_than_they_may_be():
    bomb = base64.b64encode(zlib.compress(b"\0" * 50_000_000)).decode()
    with pytest.raises(arsd.ArsdError, match="more than"):
        unpack_tokens(bomb)
    assert unpack_tokens(pack_tokens(torch.arange(9))).tolist() == list(range(9))


@pytest.mark.parametrize("shape", [{"batch": 4096, "pass_tokens": 4096}, {"batch": 4096, "pass_tokens": 2048}])
def test_a_pass_shape_beyond_reason_is_not_followed(made, shape, tmp_path):
    assert judged(made, "class", tmp_path, **shape).result == "unknown"


def test_nested_text_and_giant_pictures_are_unknown(made, tmp_path):
    pipe, out = made["class"]
    info = PngImagePlugin.PngInfo()
    info.add_itxt("arsd", "[" * 200_000)
    out.images[0].save(tmp_path / "deep.png", pnginfo=info)
    assert pipe.verify(tmp_path / "deep.png").result == "unknown"


def test_another_image_tokenizer_is_another_model(tmp_path):
    """A picture of the one is unknown to the other, not refuted; a folder that is gone has no hash."""
    class_pipeline().save_pretrained(tmp_path / "model")
    first = hushed(arsd.LlamaGenPipeline.from_pretrained(tmp_path / "model"))
    other = hushed(arsd.LlamaGenPipeline.from_pretrained(tmp_path / "model", vq=tiny_vq(9)))
    assert first.model_hash != other.model_hash
    out = first(class_labels=[1], generator=seeded(1))
    arsd.save_png(out.images[0], tmp_path / "a.png", first.record(out, 0))
    assert (first.verify(tmp_path / "a.png").result, other.verify(tmp_path / "a.png").result) == ("verified", "unknown")


def test_a_relative_path_is_remembered_where_it_was(tmp_path, monkeypatch):
    class_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pipe, known = (arsd.AutoARPipeline.from_pretrained("model") for _ in range(2))
    wanted = known.model_hash
    monkeypatch.chdir("/")
    assert pipe.model_hash == wanted is not None
