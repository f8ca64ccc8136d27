"""Clips on disk: saved pipelines, weights in eight bits, files with records, verification, commands."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import hushed, one_clear_line, saved, seeded
from tiny_video import CLIP, FRAME, FRAMES, SIZE, clip_pipeline, picture, tokens_of

import arsd
from arsd.cli import main
from arsd.clip_files import frames_of, mp4_bytes, webp_bytes, xmp_record
from arsd.decoding import SJD
from arsd.errors import CheckpointError, InputError
from arsd.provenance import read_record
from arsd.training.ship_video import pack_float8, ship_video

PROMPTS = ["red apple", "a pear", "dog face"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(clip_pipeline(), tmp_path_factory.mktemp("models") / "clips")


def test_a_saved_pipeline_makes_the_same_clips(folder):
    pipe, again = hushed(clip_pipeline()), hushed(arsd.AutoARPipeline.from_pretrained(folder))
    assert isinstance(again, arsd.CosmosARPipeline) and isinstance(again.decoder, SJD)
    assert again.decoder.config["init"] == "previous-frame", "the default of clips"
    assert torch.equal(*(tokens_of(p, PROMPTS) for p in (pipe, again)))
    with pytest.raises(CheckpointError, match="CosmosARPipeline"):
        arsd.LlamaGenPipeline.from_pretrained(folder)


def test_a_folder_without_a_text_encoder_reads_with_that_of_another_model(folder, tmp_path):
    pipe = clip_pipeline()
    bare = arsd.CosmosARPipeline(pipe.transformer, pipe.vq, captions=str(folder))
    bare.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "text_encoder").exists()
    again = hushed(arsd.AutoARPipeline.from_pretrained(tmp_path / "a"))
    assert torch.equal(*(tokens_of(p, PROMPTS) for p in (hushed(pipe), again)))
    assert again.model_hash != hushed(arsd.AutoARPipeline.from_pretrained(folder)).model_hash
    again.save_pretrained(tmp_path / "whole")
    whole = hushed(arsd.AutoARPipeline.from_pretrained(tmp_path / "whole"))
    assert torch.equal(*(tokens_of(p, PROMPTS) for p in (whole, again)))
    ship_video(pipe, tmp_path / "shipped")
    assert not (tmp_path / "shipped" / "text_encoder").exists()
    assert json.loads((tmp_path / "shipped" / "model_index.json").read_text())["captions"] == "emoji-128"


def test_weights_in_eight_bits_are_read_into_any_dtype(folder, tmp_path):
    """As emoji-video is shipped: matrices in float8 (e4m3), computed in what is asked for."""
    copy = tmp_path / "eight"
    shutil.copytree(folder, copy)
    pack_float8(copy / "transformer" / "diffusion_pytorch_model.safetensors")
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(copy))
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    double = hushed(arsd.AutoARPipeline.from_pretrained(copy, dtype=torch.float64))
    assert torch.equal(tokens_of(double, PROMPTS, decoder="ar"), tokens_of(double, PROMPTS))
    for old, new in zip(clip_pipeline().transformer.parameters(), pipe.transformer.parameters(), strict=True):
        assert (old - new).abs().max() <= 0.07 * old.abs().max()


def test_a_clip_carries_its_record_and_is_verified(folder, tmp_path):
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(folder))
    out = pipe(PROMPTS, generator=seeded(2), batch_size=2, num_frames=4)
    paths = []
    for i, frames in enumerate(out.frames):
        paths.append(tmp_path / f"{i}.webp")
        arsd.save_webp(frames, paths[-1], pipe.record(out, i), pipe.frame_rate)
    results = pipe.verify(paths)
    assert [r.result for r in results] == ["verified"] * 3 and all(r.pixels_match for r in results)
    assert pipe.verify(paths[0]).result == "verified", "alone as well"
    frames, record = read_record(paths[0])
    assert len(frames) == 4 and all(np.array_equal(a, b) for a, b in zip(frames, out.frames[0], strict=True))
    frames[2].putpixel((0, 0), (1, 2, 3))
    forged = tmp_path / "forged.webp"
    arsd.save_webp(frames, forged, record)
    assert pipe.verify(forged).result == "refuted"
    arsd.save_webp(out.frames[0], forged, record | {"prompt": "blue heart"}, overwrite=True)
    assert pipe.verify(forged).result == "refuted"
    arsd.save_webp(out.frames[0][:3], forged, record, overwrite=True)
    assert pipe.verify(forged).result == "refuted", "a frame is missing"
    for damage in ({"num_frames": 99}, {"num_frames": "4"}, {"num_frames": -1}, {"given_tokens": 5}):
        arsd.save_webp(out.frames[0], forged, record | damage, overwrite=True)
        assert pipe.verify(forged).result == "unknown", damage


def test_a_clip_behind_given_frames_is_verified_as_far_as_it_was_made(folder, tmp_path):
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(folder))
    out = pipe(PROMPTS[0], frames=picture(), generator=seeded(2))
    arsd.save_webp(out.frames[0], tmp_path / "a.webp", pipe.record(out, 0))
    result = pipe.verify(tmp_path / "a.webp")
    assert result.result == "verified" and result.given_tokens == FRAME and "behind a given beginning" in result.reason


@pytest.mark.parametrize("numbers", [[0], [0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 0, 1]])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (96, 96)])
def test_frames_that_are_equal_stay_apart(numbers, size):
    """libwebp's encoder of animations would join them."""
    frames = [Image.new("RGB", size, (40 * n, 7, 255 - n)) for n in numbers]
    with Image.open(io.BytesIO(webp_bytes(frames, {"n": numbers}, 8))) as image:
        assert image.size == size and json.loads(xmp_record(image)) == {"n": numbers}
        assert all(np.array_equal(a, b) for a, b in zip(frames_of(image), frames, strict=True))
    with Image.open(io.BytesIO(webp_bytes(frames, None, 8))) as image:
        assert getattr(image, "n_frames", 1) == len(numbers) and xmp_record(image) is None


def test_a_clip_that_stands_still_is_verified(folder, tmp_path):
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(folder))
    out = pipe(PROMPTS[0], frames=[picture(), picture()], generator=seeded(2))
    arsd.save_webp(out.frames[0], tmp_path / "a.webp", pipe.record(out, 0))
    assert pipe.verify(tmp_path / "a.webp").result == "verified"


def test_a_clip_of_a_model_without_captions_is_verified(tmp_path):
    folder = saved(clip_pipeline(False), tmp_path / "bare")
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(folder))
    out = pipe(frames=picture(), generator=seeded(2), num_videos_per_prompt=2)
    for i, frames in enumerate(out.frames):
        arsd.save_webp(frames, tmp_path / "a.webp", pipe.record(out, i), overwrite=True)
        result = pipe.verify(tmp_path / "a.webp")
        assert (result.result, result.given_tokens) == ("verified", FRAME), result
    arsd.save_webp(out.frames[0], tmp_path / "a.webp", pipe.record(out, 1), overwrite=True)
    assert pipe.verify(tmp_path / "a.webp").result == "refuted"


def test_files_that_would_fill_the_memory_are_not_read(folder, tmp_path):
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(folder))
    bomb = webp_bytes([Image.new("RGB", (3000, 3000))] * 16, {"seed_exact": True}, 8)
    assert len(bomb) < 1e5
    (tmp_path / "bomb.webp").write_bytes(bomb)
    (tmp_path / "cut.webp").write_bytes(webp_bytes([picture(n) for n in range(4)], {"a": 1}, 8)[:-200])
    for name, says in (("bomb", "pixels"), ("cut", "")):
        result = pipe.verify(tmp_path / f"{name}.webp")
        assert result.result == "unknown" and says in result.reason
    with Image.open(tmp_path / "bomb.webp") as image:
        assert pipe.verify(image).result == "unknown"


@pytest.mark.parametrize(
    ("frames", "rate", "says"),
    [
        ([], 8, "at least one"),
        (np.zeros((2, 8, 12, 3)), 8, "PIL pictures"),
        ([picture(), Image.new("RGB", (3, 3))], 8, "one size"),
    ]
    + [([picture()], rate, "frame_rate") for rate in (0, 1e-5, -1, float("nan"), 1e4)],
)
def test_what_is_no_clip_is_not_written(frames, rate, says, tmp_path):
    for write in (lambda: webp_bytes(frames, None, rate), lambda: mp4_bytes(frames, rate)):
        with pytest.raises(InputError) as error:
            write()
        one_clear_line(error.value, says)
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path in (blocked / "x.webp", tmp_path / ("x" * 300 + ".webp")):
        with pytest.raises(InputError, match="cannot write"):
            arsd.save_webp([picture()], path, {})
    assert list(tmp_path.iterdir()) == [blocked]


def test_webp_and_mp4_hold_the_frames():
    frames = [picture(n) for n in range(5)]
    content = webp_bytes(frames, {"a": 'q"<&>é'}, 12.5)
    with Image.open(io.BytesIO(content)) as image:
        assert json.loads(xmp_record(image)) == {"a": 'q"<&>é'}
        assert all(np.array_equal(a, b) for a, b in zip(frames_of(image), frames, strict=True))
        assert image.info["duration"] == 80
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(mp4_bytes(frames, 12.5))) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) == 5 and shown[0].shape == (*SIZE, 3)
        assert float(container.streams.video[0].average_rate) == 12.5


def command(capsys, *arguments):
    status = main(list(map(str, arguments)))
    told = capsys.readouterr()
    return status, told.out, told.err


def test_the_command_writes_webp_and_mp4(folder, tmp_path, capsys):
    out = tmp_path / "wink.webp"
    asked = ("generate", "--model", folder, "red apple", "--out", out, "--dtype", "float32")
    status, text, _ = command(capsys, *asked, "--compare", "--json")
    report = json.loads(text)
    assert status == 0 and out.is_file() and (tmp_path / "wink.mp4").is_file()
    entry = report["videos"][0]
    assert entry["path"] == str(out) and entry["mp4"] == str(tmp_path / "wink.mp4") and entry["frames"] == FRAMES
    assert entry["tokens"] == CLIP and entry["ar"]["changed_tokens"] == 0 and report["lossless"]
    status, _, err = command(capsys, *asked)
    assert status == 2 and "exists" in err
    status, text, _ = command(capsys, "verify", out, "--model", folder, "--json")
    assert status == 0 and json.loads(text)[0]["result"] == "verified"
    picture().save(tmp_path / "begin.png")
    status, text, _ = command(
        capsys, *asked, "--image", tmp_path / "begin.png", "--overwrite", "--fps", "5", "--num-frames", 3
    )
    assert status == 0 and "wink.webp" in text
    with Image.open(out) as image:
        image.load()
        assert image.n_frames == 3 and image.info["duration"] == 200
    status, text, _ = command(
        capsys,
        "generate",
        "--model",
        folder,
        "--clip",
        out,
        "--clip-frames",
        2,
        "--out",
        tmp_path / "more",
        "--dtype",
        "float32",
    )
    assert status == 0 and (tmp_path / "more" / "wink-seed0-0.webp").is_file()
    status, _, err = command(capsys, *asked[:3], "red apple", "a pear", "--out", out, "--overwrite")
    assert status == 2 and "one file" in err


def test_commands_for_pictures_say_that_it_makes_clips(folder, tmp_path, capsys):
    for asked in (("evaluate", "--decoders", "ar", "--model", folder), ("app", "--model", folder, "--video-model", "none")):
        status, _, err = command(capsys, *asked)
        assert status == 2 and "makes clips" in err and len(err.strip().splitlines()) == 1, err
    (tmp_path / "prompts.txt").write_text("red apple\n")
    asked = ("bench", "--prompts", tmp_path / "prompts.txt", "--model", folder, "--decoders", "sjd:window=8", "--json")
    status, text, _ = command(capsys, *asked)
    rows = {row["decoder"]: row for row in json.loads(text)["rows"]}
    assert rows["sjd:window=8"]["identical_to_ar_at_w"]
