"""Figures of clips: each formula against plain numpy, what every extractor sees, and what it is blind to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_clips import Plain, Stub, moving, noise, script, shuffled
from tiny_clip import Colours, saved_clip

from arsd.errors import CheckpointError, InputError
from arsd.metrics import frechet_distance, video
from arsd.metrics.video import FrameFeatures, I3DFeatures, VideoChatFeatures, VideoFeatures, find_video_extractor
from arsd.metrics.video_frames import MOVED, Changes, Consistency

# ---------------------------------------------------------------------------------------------- from frame to frame


def test_changes_equal_their_definition():
    (clip,) = noise(frames=7)
    values = clip.astype(np.float64) / 255
    apart = np.abs(values[1:] - values[:-1])
    found = Changes.of(clip)
    assert found.flicker == pytest.approx(apart.mean(), rel=1e-12)
    assert found.motion == pytest.approx((apart.max(-1) > 0.05).mean(), rel=1e-12)
    assert found.loop_gap == pytest.approx(np.abs(values[-1] - values[0]).mean(), rel=1e-12)


def test_a_pixel_moves_when_one_channel_changes_by_more_than_the_threshold():
    clip = np.full((3, 2, 5, 3), 100, np.uint8)
    below, above = int(255 * MOVED), int(255 * MOVED) + 1
    clip[1:, 0, 0, 2] += above
    clip[1:, 1, 1] += below
    clip[2, 1, 1, 0] -= above  # from 112 to 99: a fall counts as a rise does, and does not wrap around
    assert Changes.of(clip).motion == pytest.approx(2 / 20)
    assert Changes.of(clip).flicker == pytest.approx((above + 3 * below + above) / (2 * 30) / 255)


def test_consistency_equals_vbench_frame_by_frame():
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 9, 9)[:, None]
    rows = [row / np.linalg.norm(row) for row in features.double().numpy()]
    before = [float(rows[t] @ rows[t - 1]) for t in range(1, 9)]
    first = [float(rows[t] @ rows[0]) for t in range(1, 9)]
    subject = np.mean([(max(0, b) + max(0, f)) / 2 for b, f in zip(before, first, strict=True)])
    assert min(before) < 0 and min(first) < 0, "nothing is clamped: the test shows less"
    found = Consistency.of(features)
    assert (found.subject, found.before, found.first) == pytest.approx((subject, np.mean(before), np.mean(first)), rel=1e-12)


def test_a_still_clip_is_perfectly_consistent_and_has_no_motion():
    clip = np.repeat(noise()[0][:1], 6, axis=0)
    found = Consistency.seen_by(Colours(), clip)
    assert (found.subject, found.before, found.first) == pytest.approx((1, 1, 1))
    assert Changes.of(clip) == Changes(0, 0, 0)


@pytest.mark.parametrize("of", [Changes.of, lambda clip: Consistency.seen_by(Colours(), clip)])
def test_one_frame_does_not_change(of):
    with pytest.raises(InputError, match="1 frames.* needs 2"):
        of(noise(frames=1)[0])


# ------------------------------------------------------------------------------------------------------- extractors


@pytest.fixture(scope="module")
def chat() -> VideoChatFeatures:
    return VideoChatFeatures()


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [moving(seed, frames=8) for seed in range(10)]


@pytest.fixture(scope="module")
def seen(chat, clips) -> torch.Tensor:
    return chat.features(clips)


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    return script(Stub(), tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt")


def test_the_video_llm_gives_mean_and_change_of_its_middle_states(chat, clips, seen):
    """By a hook on the third of six layers, in float64, with the prompt that ``apply_chat_template`` makes of the clip."""
    from arsd.pipelines.video_llm import VideoLLMPipeline

    pipe = VideoLLMPipeline.from_pretrained("emoji-video-chat", dtype=torch.float64)
    kept: list[torch.Tensor] = []
    pipe.model.model.language_model.layers[2].register_forward_hook(lambda _, __, out: kept.append(out))
    for clip, found in list(zip(clips, seen, strict=True))[:3]:
        parts = [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]  # what is asked comes behind, unseen
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        fed = pipe.processor.apply_chat_template(
            [[{"role": "user", "content": parts}]], processor_kwargs={"do_sample_frames": False}, **how
        )
        pixels = fed["pixel_values_videos"].double()
        with torch.no_grad():
            pipe.model.model(input_ids=fed["input_ids"], pixel_values_videos=pixels)
        begin = fed["input_ids"][0].tolist().index(4)
        tokens = kept[-1][0, begin : begin + 36 * len(clip)].numpy()
        tokens = np.array([token / np.sqrt(np.mean(token**2)) for token in tokens])
        frames = [tokens[36 * t : 36 * t + 36].mean(0) for t in range(len(clip))]
        look = np.mean(frames, axis=0)
        move = 4 * np.mean([np.abs(a - b) for a, b in zip(frames, frames[1:], strict=False)], axis=0)
        assert np.abs(found.numpy() - np.concatenate([look, move])).max() < 1e-5
    assert found.shape == (chat.dim,) == (384,) and found.dtype == torch.float32


def test_batches_orders_and_shapes_make_no_difference(chat, clips, seen):
    mixed = [clips[0], moving(3, frames=6), clips[1], moving(4, side=30), clips[2]]
    alone = torch.cat([chat.features([clip]) for clip in mixed])
    assert torch.allclose(chat.features(mixed), alone, atol=1e-5)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(chat.features([clips[i] for i in order]), seen[order], atol=1e-5)
    half = len(clips) // 2
    value = frechet_distance(seen[:half], seen[half:])
    assert frechet_distance(seen[:half].flip(0), seen[half:].roll(2, 0)) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(seen, seen[order]) == pytest.approx(0, abs=1e-9 * float(seen.var(0).sum()))


def test_the_order_of_frames_is_seen_by_the_video_llm_and_by_flicker_and_not_frame_by_frame(chat, clips, seen):
    other = [shuffled(clip) for clip in clips]
    apart, spread = frechet_distance(seen, chat.features(other)), float(seen.var(0).sum())
    assert apart > 0.05 * spread
    frames = FrameFeatures(Colours())
    assert frechet_distance(frames.features(clips), frames.features(other)) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(frames.features(clips), frames.features(other), atol=1e-6)
    flicker = [np.mean([Changes.of(clip).flicker for clip in some]) for some in (clips, other)]
    assert flicker[1] > 1.2 * flicker[0]
    frozen = [np.repeat(clip[:1], len(clip), axis=0) for clip in clips]
    assert frechet_distance(seen, chat.features(frozen)) > apart
    assert torch.allclose(chat.course(frozen[:1])[0, 0], chat.course(clips[:1])[0, 0], atol=1e-4)  # nothing looks ahead


def test_frame_features_are_the_mean_over_frames():
    clips = noise(2)
    for row, clip in zip(FrameFeatures(Colours()).features(clips), clips, strict=True):
        means = [np.concatenate([frame.mean((0, 1)), frame.std((0, 1))]) / 255 for frame in clip]
        assert np.allclose(row, np.mean(means, axis=0), atol=1e-6)


def test_the_i3d_is_called_as_fvd_calls_it(stub):
    clips = noise(3, frames=9) + noise(2, frames=9, height=8) + noise(1, frames=11)
    found = I3DFeatures(stub, batch=2).features(clips)
    weight = Stub().weight.double().numpy()
    for row, clip in zip(found, clips, strict=True):
        x = clip[:, : clip.shape[1] // 2].astype(np.float64) / 255 * 2 - 1
        halves = np.concatenate([x[:4].mean((0, 1, 2)), x[4:].mean((0, 1, 2))])
        assert np.abs(row.numpy() - halves @ weight).max() < 1e-5
    assert found.shape == (6, 400) and found.dtype == torch.float32


def test_only_the_i3d_is_called_fvd(stub, chat, monkeypatch):
    other = I3DFeatures(stub)
    assert video.distance_name(other) == f"FVD ({other.name})" and other.name == f"I3D ({other._hash[:8]})"
    monkeypatch.setattr(video, "I3D_SHA256", other._hash)
    assert video.distance_name(I3DFeatures(stub)) == "FVD (I3D)" and I3DFeatures(stub).describe()["published_file"]
    for extractor in (chat, FrameFeatures(Colours())):
        assert video.distance_name(extractor) == f"Frechet video distance ({extractor.name})"


def test_extractors_are_found_by_name_and_describe_themselves(stub, tmp_path):
    clip = saved_clip(tmp_path / "clip")
    for text in ("emoji-video-chat", f"i3d:{stub}", f"frames:clip:{clip}", "frames:emoji-clip"):
        found = find_video_extractor(text)
        assert isinstance(found, VideoFeatures)
        about = found.describe()
        assert about["name"] == found.name and about["dim"] == found.dim and len(about["weights_sha256"]) == 64
        assert about["features"] and json.dumps(about)
        assert found.features([moving(0)]).shape == (1, found.dim)
    for text in ("i3d", "i3d:", "frames", "frames:", "videomae", "inception", ""):
        with pytest.raises(InputError, match="no extractor of clips"):
            find_video_extractor(text)


def test_files_that_are_no_i3d_are_refused_in_one_line(tmp_path, stub):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    (tmp_path / "cut.pt").write_bytes(stub.read_bytes()[:-700])
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    script(Plain(), tmp_path / "plain.pt")
    wrong = {"absent": "no file", "state": "no TorchScript", "cut": "no TorchScript", "text": "no TorchScript"}
    for name, says in (wrong | {"plain": "takes no rescale"}).items():
        with pytest.raises(CheckpointError, match=says) as caught:
            I3DFeatures(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value) and "download http" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"gives \[1, 512\] and the I3D of FVD \[1, 400\]"):
        I3DFeatures(script(Stub(512), tmp_path / "wide.pt")).features(noise(frames=9))


def test_what_is_no_clip_is_refused(stub, chat):
    i3d = I3DFeatures(stub)
    for extractor in (i3d, chat, FrameFeatures(Colours())):
        for wrong in (
            [],
            [np.zeros((9, 4, 4, 3))],
            [np.zeros((4, 4, 3), np.uint8)],
            [np.zeros((9, 0, 4, 3), np.uint8)],
            ["a"],
        ):
            with pytest.raises(InputError, match="give"):
                extractor.features(wrong)
    with pytest.raises(InputError, match="clip 0 has 1 frames, emoji-video-chat needs 2"):
        chat.features(noise(frames=1))
    with pytest.raises(InputError, match="clip 1 has 8 frames, .* needs 9"):
        i3d.features(noise(frames=9) + noise(frames=8))
    with pytest.raises(CheckpointError):
        VideoChatFeatures("nobody/nothing-of-that-name")
