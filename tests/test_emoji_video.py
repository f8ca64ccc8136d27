"""emoji-video as it ships: small, loads without a network, legal clips, plain AR's tokens in few passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_pipeline import hushed, seeded

import arsd
from arsd.metrics.video_frames import Changes
from arsd.pipelines.auto import CHECKPOINTS

FOLDER = CHECKPOINTS / "emoji-video"
PROMPTS = ["clapping hands", "waving hand"]


@pytest.fixture(scope="module")
def pipe():
    return hushed(arsd.AutoARPipeline.from_pretrained("emoji-video"))


@pytest.fixture(scope="module")
def out(pipe):
    return pipe(PROMPTS, generator=seeded(0))


def test_the_folder_is_small_and_reads_captions_with_emoji_128():
    sizes = {path.relative_to(FOLDER).as_posix(): path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 5e6 and not any(name.startswith("text_encoder") for name in sizes)
    assert json.loads((FOLDER / "model_index.json").read_text())["captions"] == "emoji-128"


def test_clips_have_eight_frames_of_96_pixels_and_move(pipe, out):
    assert isinstance(pipe, arsd.CosmosARPipeline) and "emoji-video" in arsd.shipped_models()
    for clip in out.frames:
        assert len(clip) == 8 and all(frame.size == (96, 96) and frame.mode == "RGB" for frame in clip)
        assert Changes.of(np.stack([np.asarray(frame) for frame in clip])).motion > 0.02
    assert out.tokens.shape == (2, 1152) and out.stats.tokens == [1152, 1152]


def test_the_default_takes_at_least_four_tokens_per_pass(out):
    assert out.stats.tokens_per_pass >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder", ["sjd:window=16,init=previous-frame", "sjd:window=256", "frame-copy:draft_length=31,guess=law"]
)
def test_tokens_are_those_of_plain_ar(decoder):
    pipe = hushed(arsd.AutoARPipeline.from_pretrained("emoji-video", dtype=torch.float64))
    plain, ours = (pipe(PROMPTS[0], generator=seeded(3), decoder=d, output_type="latent").tokens for d in ("ar", decoder))
    assert torch.equal(plain, ours)


def test_a_picture_of_emoji_128_begins_a_clip(pipe):
    painter = hushed(arsd.AutoARPipeline.from_pretrained("emoji-128"))
    picture = painter("clapping hands", generator=seeded(1)).images[0]
    made = pipe("clapping hands", frames=picture, generator=seeded(1))
    begin = pipe.encode_clips(picture, pipe.make_raster())
    assert torch.equal(made.tokens[0, :144], begin.flatten()) and made.stats.tokens == [1152 - 144]


def test_a_clip_is_verified(pipe, out, tmp_path):
    arsd.save_webp(out.frames[1], tmp_path / "clip.webp", pipe.record(out, 1), pipe.frame_rate)
    assert pipe.verify(tmp_path / "clip.webp").result == "verified"
