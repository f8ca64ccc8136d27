"""Clips: the layout, the call, what they begin with, and that every strategy gives plain AR's tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import VOCAB, hushed, one_clear_line, seeded
from tiny_video import CLIP, COLUMNS, FRAME, FRAMES, ROWS, SIZE, clip_pipeline, picture, tiny_transformer, tokens_of

from arsd.errors import InputError
from arsd.models.rotary import volume_rotary_angles
from arsd.models.volume import Volume
from arsd.pipelines.video import clips_of

PROMPTS = ["red apple", "a pear", "dog face"]
EXACT = (
    *(f"sjd:window={w},init={init}" for w in (2, 7, 24, 25, 64, 256) for init in ("uniform", "previous-frame")),
    "sjd:window=9,init=left",
    "sjd:window=9,init=above",
    *(f"frame-copy:draft_length={n},guess={guess}" for n in (3, 24, 47, 255) for guess in ("token", "law")),
    "prompt-lookup:draft_length=5",
    "speculative:drafter=frame-copy:guess=law,window=30",
    "ucb-spec:arms=ar+sjd:window=8:init=previous-frame+frame-copy:draft_length=5",
)


@pytest.fixture(scope="module")
def pipe():
    return hushed(clip_pipeline().to(torch.float64))


@pytest.fixture(scope="module")
def bare():
    return hushed(clip_pipeline(False).to(torch.float64))


# --- layout and positions --------------------------------------------------------------------------------------------


def test_a_volume_is_frames_of_rows_of_codes():
    volume = Volume(3, 2, 5, 7)
    codes = torch.arange(30).view(1, 3, 2, 5) % 7
    tokens = volume.from_codes(codes)
    assert torch.equal(tokens, codes.flatten(1)) and torch.equal(volume.to_codes(tokens), codes)
    assert torch.equal(volume.from_codes(codes[:, :2]), tokens[:, :20])
    assert (volume.row_length, volume.frame_length, volume.num_tokens, volume.vocab) == (5, 10, 30, 7)
    assert [n for n in range(31) if volume.begins(n)] == [0, 10, 20]
    for wrong in (codes[:, :, :1], codes[0], torch.cat([codes, codes], 1)):
        with pytest.raises(InputError):
            volume.from_codes(wrong)
    with pytest.raises(InputError):
        volume.to_codes(tokens[:, 1:])


def test_rotary_angles_are_those_of_the_formula():
    """A head of 128 channels: 42 for y, 42 for x, 44 for t; every token by itself, in float64."""
    angles = volume_rotary_angles(3, 4, 5, 128, 5e5)
    space, time = ([5e5 ** (-2 * k / d) for k in range(d // 2)] for d in (42, 44))
    n = 0
    for t in range(3):
        for y in range(4):
            for x in range(5):
                wanted = [t * f for f in time] + [y * f for f in space] + [x * f for f in space]
                assert torch.allclose(angles[n], torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)
                n += 1
    assert n == len(angles)
    with pytest.raises(InputError):
        volume_rotary_angles(3, 4, 5, 4)


@pytest.mark.parametrize("captions", [True, False])
def test_passes_of_any_length_give_the_logits_of_one_long_pass(captions):
    pipe = hushed(clip_pipeline(captions).to(torch.float64))
    codes = torch.randint(VOCAB, (2, CLIP), generator=torch.Generator().manual_seed(1))
    if captions:
        features, mask = pipe.encode_prompt(PROMPTS[:2])
        condition = pipe.transformer.embed_captions(features.double(), mask)
        wanted = pipe.transformer(codes, condition, mask)
        conditions = pipe.encode_inputs(PROMPTS[:2], guided=False)
    else:
        wanted = pipe.transformer(codes)
        given = codes[:, :FRAME]
        conditions = pipe.encode_inputs(given=given)
    for width in (1, 3, 8, CLIP):
        target = pipe.target_maker(conditions)(width, 2)
        found, first = [], target.first
        with torch.inference_mode():
            target.prefill([-target.unread] * 2, width)
            for n in range(first, CLIP, width):
                lengths = torch.full((2,), n)
                target.rollback(lengths)
                fed = torch.nn.functional.pad(torch.cat([codes.new_zeros(2, 1), codes], 1), (0, width))[:, n : n + width]
                found.append(target.forward(fed, lengths, lengths.tolist())[0])
        logits = torch.cat(found, 1)[:, : CLIP - first]
        assert (logits - (wanted if captions else wanted[:, first - 1 : -1])).abs().max() < 1e-10, width


# --- every strategy gives plain AR's tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", EXACT)
def test_tokens_of_prompts_are_those_of_plain_ar(pipe, decoder):
    plain = tokens_of(pipe, PROMPTS, decoder="ar")
    assert torch.equal(tokens_of(pipe, PROMPTS, decoder=decoder), plain)
    assert torch.equal(tokens_of(pipe, PROMPTS, decoder=decoder, batch_size=2), plain), "rows that take a waiting clip"


@pytest.mark.parametrize("decoder", EXACT)
def test_tokens_behind_given_frames_are_those_of_plain_ar(bare, decoder):
    given = torch.randint(VOCAB, (3, 2, ROWS, COLUMNS), generator=torch.Generator().manual_seed(3))
    plain = tokens_of(bare, frames=given, decoder="ar")
    ours = tokens_of(bare, frames=given, decoder=decoder, batch_size=2)
    assert torch.equal(ours, plain)
    assert torch.equal(ours[:, : 2 * FRAME], given.flatten(1)), "what is given stays as it is"
    assert ours.shape == (3, CLIP)


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.0}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"temperature": 0.0}]
)
def test_every_law(pipe, options):
    plain = tokens_of(pipe, PROMPTS, decoder="ar", **options)
    for decoder in ("sjd:window=30,init=previous-frame", "frame-copy:draft_length=30,guess=law"):
        assert torch.equal(tokens_of(pipe, PROMPTS, decoder=decoder, **options), plain)


def test_a_clip_does_not_depend_on_its_batch(pipe):
    generators = [seeded(seed) for seed in (1, 2, 3)]
    together = pipe(PROMPTS, generator=generators, decoder="sjd:window=20,init=previous-frame").tokens
    for prompt, seed, row in zip(PROMPTS, (1, 2, 3), together, strict=True):
        alone = pipe(prompt, generator=[seeded(seed)], decoder="ar").tokens[0]
        assert torch.equal(alone, row)


@pytest.mark.parametrize(
    "name",
    [
        "sjd:coupling=maximal,init=previous-frame",
        "speculative:drafter=frame-copy,rule=cool-sd",
        "speculative:drafter=frame-copy:guess=law,rule=lantern:k=8",
        "speculative:drafter=jacobi:init=previous-frame,rule=grouped",
    ],
)
def test_other_rules_make_legal_clips(pipe, name):
    out = pipe(PROMPTS, generator=seeded(1), decoder=name, frames=picture())
    assert len(out.frames) == 3 and all(len(clip) == FRAMES for clip in out.frames)
    assert torch.equal(out.tokens[:, :FRAME], pipe.encode_clips(picture(), pipe.make_raster()).flatten(1).expand(3, -1))


def test_a_smaller_model_of_the_same_codes_drafts(pipe):
    pipe.register_modules(drafter=tiny_transformer(True, seed=4).double())
    try:
        plain = tokens_of(pipe, PROMPTS, decoder="ar")
        assert torch.equal(tokens_of(pipe, PROMPTS, decoder="hybrid:window=9,init=previous-frame"), plain)
    finally:
        pipe.register_modules(drafter=None)


def test_a_drafter_of_other_clips_is_refused(pipe):
    pipe.register_modules(drafter=tiny_transformer(True, seed=4, frames=3).double())
    try:
        with pytest.raises(InputError, match="must be the same"):
            pipe(PROMPTS[0], decoder="hybrid:window=9")
    finally:
        pipe.register_modules(drafter=None)


# --- what goes in and comes out ---------------------------------------------------------------------------------------


def test_output_types_show_the_same_clips(pipe):
    outs = {kind: pipe(PROMPTS[:2], generator=seeded(1), output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert outs["np"].frames.shape == (2, FRAMES, *SIZE, 3) and outs["pt"].frames.shape == (2, FRAMES, 3, *SIZE)
    assert outs["latent"].frames.shape == (2, FRAMES, ROWS, COLUMNS)
    assert torch.equal(outs["latent"].frames.flatten(1), outs["pil"].tokens)
    for clip, array, tensor in zip(outs["pil"].frames, outs["np"].frames, outs["pt"].frames, strict=True):
        for frame, one, other in zip(clip, array, tensor, strict=True):
            assert np.array_equal(np.asarray(frame), np.round(one * 255).astype(np.uint8))
            assert np.array_equal(one, other.permute(1, 2, 0).numpy())
    assert isinstance(pipe(PROMPTS[0], return_dict=False), tuple)
    assert pipe(PROMPTS[0], num_videos_per_prompt=3, generator=seeded(1)).tokens.shape == (3, CLIP)


def test_exports_of_diffusers_take_a_clip(pipe, tmp_path):
    from diffusers.utils import export_to_gif

    frames = pipe(PROMPTS[0], generator=seeded(1)).frames[0]
    path = export_to_gif(frames, str(tmp_path / "clip.gif"))
    with Image.open(path) as image:
        assert image.n_frames == FRAMES and image.size == SIZE[::-1]


def test_shorter_clips_are_beginnings_of_longer_ones(pipe):
    long, short = (pipe(PROMPTS, generator=seeded(1), num_frames=n).tokens for n in (None, 3))
    assert short.shape == (3, 3 * FRAME) and torch.equal(long[:, : 3 * FRAME], short)


@pytest.mark.parametrize("kind", ["pil", "list", "array", "tensor", "bytes", "several"])
def test_frames_may_be_given_in_many_forms(pipe, kind):
    frames = [picture(1), picture(2)]
    array = np.stack([np.asarray(frame) for frame in frames])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    forms = {"list": frames, "array": array.astype(np.float32) / 255, "tensor": tensor, "bytes": array, "pil": frames[0]}
    forms["several"] = [frames, frames, frames]
    wanted = pipe.encode_clips(frames, pipe.make_raster())
    out = pipe(PROMPTS, frames=forms[kind], generator=seeded(1))
    count = FRAME if kind == "pil" else 2 * FRAME
    assert torch.equal(out.tokens[:, :count], wanted.flatten(1)[:, :count].expand(3, -1))
    assert out.inputs[0]["given_tokens"] == count and out.stats.tokens == [CLIP - count] * 3


def test_a_picture_without_a_prompt_goes_on_under_the_null_caption(pipe):
    out = pipe(frames=picture(), generator=seeded(1))
    other = pipe(frames=[[picture()], [picture(1)]], generator=seeded(1), decoder="ar")
    assert torch.equal(out.tokens[0], other.tokens[0]) and "prompt" not in out.inputs[0]


def test_every_frame_has_its_size_and_given_frames_their_tokens(bare):
    out = bare(frames=[picture(1), picture(2)], generator=seeded(1), num_videos_per_prompt=2)
    assert all(len(clip) == FRAMES and all(frame.size == SIZE[::-1] for frame in clip) for clip in out.frames)
    assert not torch.equal(out.tokens[0], out.tokens[1]), "two clips of one beginning"
    assert torch.equal(out.tokens[0, : 2 * FRAME], out.tokens[1, : 2 * FRAME])


def test_a_call_that_is_stopped_shows_what_there_is(pipe):
    out = pipe(PROMPTS, generator=seeded(1), decoder="ar", on_round=lambda turn: int(turn.positions[0, 0]) >= FRAME)
    assert out.stats.tokens == [FRAME + 1] * 3 and all(len(clip) == FRAMES for clip in out.frames)
    assert torch.equal(out.tokens[:, : FRAME + 1], pipe(PROMPTS, generator=seeded(1)).tokens[:, : FRAME + 1])


def test_without_a_prompt_there_is_nothing_to_guide_with(pipe, bare):
    for each in (pipe, bare):
        assert each(frames=picture(), generator=seeded(1)).law_config.guidance_scale == 1
        with pytest.raises(InputError) as error:
            each(frames=picture(), guidance_scale=3.0)
        one_clear_line(error.value, "no prompt to guide with")


def test_clips_of_one_call():
    assert [len(clip) for clip in clips_of(picture())] == [1]
    assert [len(clip) for clip in clips_of([picture(), picture()])] == [2]
    assert [len(clip) for clip in clips_of([[picture()], [picture()]])] == [1, 1]
    assert [clip.shape for clip in clips_of(np.zeros((2, 3, 8, 12, 3)))] == [(3, 8, 12, 3)] * 2
    assert [clip.shape for clip in clips_of(torch.zeros(3, 8, 12))] == [(1, 3, 8, 12)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give a prompt, or frames"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": PROMPTS, "num_frames": 0}, "num_frames"),
        ({"prompt": PROMPTS, "num_frames": FRAMES + 1}, "at most 6 frames"),
        ({"prompt": PROMPTS, "height": 16}, "12 x 8"),
        ({"prompt": PROMPTS, "frames": "clip.webp"}, "frames must be pictures"),
        ({"prompt": PROMPTS, "frames": []}, "frames must be pictures"),
        ({"prompt": PROMPTS, "frames": np.zeros((0, 2, *SIZE, 3))}, "frames must have 4 dimensions"),
        ({"prompt": PROMPTS, "frames": torch.tensor(5)}, "codes of shape"),
        ({"prompt": PROMPTS, "frames": np.zeros((1, 1, 4, 6), dtype=np.int64)}, "codes: a tensor"),
        ({"prompt": PROMPTS, "frames": [picture()] * FRAMES}, "something is left"),
        ({"prompt": PROMPTS, "frames": [[picture()], [picture()]]}, "2 clips to begin with for 3 prompts"),
        ({"prompt": PROMPTS, "frames": [[picture()], [picture()] * 2, [picture()]]}, "different lengths"),
        ({"prompt": PROMPTS, "frames": torch.full((1, 3, 8, 12), float("nan"))}, "outside [0, 1]"),
        ({"prompt": PROMPTS, "frames": torch.zeros(1, 1, 4, 5, dtype=torch.int64)}, "codes of shape"),
        ({"prompt": PROMPTS, "frames": torch.full((1, 1, 4, 6), 99)}, "codes outside"),
        ({"prompt": PROMPTS, "actions": [1]}, "knows no actions"),
        ({"prompt": PROMPTS, "num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1"),
        ({"prompt": PROMPTS, "output_type": "gif"}, "output_type"),
        ({"class_labels": [1]}, "knows no class_labels"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(pipe, arguments, says):
    with pytest.raises(InputError) as error:
        pipe(**arguments)
    one_clear_line(error.value, says)


def test_a_model_without_captions_wants_frames(bare):
    for arguments, says in (({}, "goes on from frames"), ({"prompt": "red apple", "frames": picture()}, "no captions")):
        with pytest.raises(InputError) as error:
            bare(**arguments)
        one_clear_line(error.value, says)
