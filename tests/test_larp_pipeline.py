"""LARP from class labels and from frames: clips are the published ones, decoding is lossless, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_larp as reference
import torch
from PIL import Image
from reference_larp import CLASSES, CODES, FRAMES, SIDE, TOKENS
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor

import arsd
from arsd import EagleDrafter
from arsd.errors import ArsdError, CheckpointError, InputError
from arsd.models.larp import LARPTransformer
from arsd.models.larp_files import load_larp_tokenizer
from arsd.pipelines.larp import LARPPipeline

KINDS = ("larp", "larp-frames")
pytestmark = pytest.mark.filterwarnings("ignore:this model was trained to go on from")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("larp")
    reference.write_tokenizer(root / "tokenizer")
    for kind in KINDS:
        reference.write_transformer(root / kind, frames=kind == "larp-frames")
    return root


def load(root: Path, kind: str, **options: Any) -> Any:
    options = {"vq": root / "tokenizer", "dtype": torch.float64} | options
    pipe = LARPPipeline.from_pretrained(root / kind, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(root) -> dict[str, Any]:
    return {kind: load(root, kind) for kind in KINDS}


def beginning(count: int = 2, frames: int = 5) -> Tensor:
    """[count, frames, 3, SIDE, SIDE] in [0, 1]."""
    return torch.rand(count, frames, 3, SIDE, SIDE, generator=seeded(1), dtype=torch.float64)


INPUTS: dict[str, dict[str, Any]] = {"larp": {"class_labels": [3, 0]}, "larp-frames": {"frames": beginning()}}


def made(pipes: dict[str, Any], kind: str, decoder: str = "ar", seed: int = 3, **options: Any) -> Any:
    call = INPUTS[kind] | {"output_type": "latent"} | options
    return pipes[kind](**call, decoder=decoder, generator=seeded(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_sjd_gives_the_tokens_of_plain_ar(pipes, kind, window):
    plain, out = made(pipes, kind), made(pipes, kind, f"sjd:window={window}")
    assert torch.equal(plain.tokens, out.tokens) and out.stats.forward_passes < plain.stats.forward_passes == TOKENS
    assert out.frames.shape == (2, 1, 1, TOKENS) and not torch.equal(plain.tokens[0], plain.tokens[1])


@pytest.mark.parametrize(
    "decoder", ["sjd:window=6,coupling=maximal", "sjd:window=6,acceptance=cool-sd:delta=1", "prompt-lookup"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_strategies_decode_whole_clips(pipes, kind, decoder):
    out = made(pipes, kind, decoder, output_type="np")
    assert out.frames.shape == (2, FRAMES, SIDE, SIDE, 3) and int(out.tokens.max()) < CODES


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_what_the_published_tokenizer_decodes(pipes, kind):
    out = made(pipes, kind, "sjd", output_type="pt")
    expected = reference.decode(reference.tokenizer_state(), out.tokens).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(out.frames.double(), expected, atol=1e-6, rtol=0)
    assert out.frames.shape == (2, FRAMES, 3, SIDE, SIDE) and out.frames.std() > 0.1
    pictures = made(pipes, kind, "sjd", output_type="pil").frames
    assert len(pictures) == 2 and len(pictures[0]) == FRAMES and pictures[0][0].size == (SIDE, SIDE)
    assert (np.asarray(pictures[1][3]) == (out.frames[1, 3].permute(1, 2, 0) * 255).round().numpy()).all()


def test_the_law_is_guided_by_the_null_class_as_published(pipes):
    out = made(pipes, "larp", "sjd:window=4", log_probs=True)
    assert (out.law_config.guidance_scale, out.law_config.top_k, out.law_config.top_p) == (1.25, 0, 1.0)
    state = reference.transformer_state()
    for label, row, found in zip((3, 0), out.tokens.tolist(), out.log_probs, strict=True):
        c, u = (reference.logits(state, reference.class_prompt(state, one), row) for one in (label, CLASSES))
        law = torch.log_softmax(u + 1.25 * (c - u), -1)
        torch.testing.assert_close(found.double(), law[torch.arange(TOKENS), row], atol=1e-5, rtol=0)
    assert out.inputs == [{"class_label": 3}, {"class_label": 0}]


def test_a_model_of_frames_is_told_a_clip_that_begins_as_asked_and_then_stands_still(pipes):
    out = made(pipes, "larp-frames", "sjd:window=4", log_probs=True)
    clips = beginning().transpose(1, 2)  # [n, 3, 5, H, W]
    still = torch.cat([clips, clips[:, :, -1:].expand(-1, -1, FRAMES - 5, -1, -1)], dim=2)
    told, state = reference.encode(reference.tokenizer_state(), still).tolist(), reference.transformer_state(True)
    assert told[0] != told[1]
    for prompt, row, found in zip(told, out.tokens.tolist(), out.log_probs, strict=True):
        law = torch.log_softmax(reference.logits(state, reference.frames_prompt(state, prompt), row), -1)
        torch.testing.assert_close(found.double(), law[torch.arange(TOKENS), row], atol=1e-5, rtol=0)
    assert out.law_config.guidance_scale == 1.0 and out.stats.tokens == [TOKENS] * 2
    assert torch.equal(made(pipes, "larp-frames", frames=torch.tensor(told)[:, None, None]).tokens, out.tokens)


def test_frames_come_as_pictures_arrays_and_tensors(pipes):
    pixels = (beginning(1)[0] * 255).round().byte()
    array = pixels.permute(0, 2, 3, 1).numpy()
    first = made(pipes, "larp-frames", frames=pixels).tokens
    for frames in (
        [Image.fromarray(one) for one in array],
        array,
        array[None],
        pixels[None],
        [array],
        array / np.float32(255),
    ):
        assert torch.equal(made(pipes, "larp-frames", frames=frames).tokens, first)
    several = made(pipes, "larp-frames", frames=[pixels, pixels.flip(0)], num_videos_per_prompt=2).tokens
    assert several.shape == (4, TOKENS) and len({tuple(row) for row in several.tolist()}) == 4


def test_another_number_of_frames_than_was_trained_is_warned_of(pipes):
    with pytest.warns(UserWarning, match="this model was trained to go on from 5 frames"):
        made(pipes, "larp-frames", frames=beginning(1, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_does_not_depend_on_the_others_of_its_batch(pipes, kind):
    call = {"class_labels": [1, 2, 4]} if kind == "larp" else {"frames": beginning(3)}
    seeds = [seeded(n) for n in (5, 6, 7)]
    together = pipes[kind](**call, generator=seeds, batch_size=2, decoder="sjd:window=6", output_type="latent")
    for n in range(3):
        alone = {name: value[n] for name, value in call.items()}
        out = pipes[kind](**alone, generator=seeded(5 + n), decoder="ar", output_type="latent")
        assert torch.equal(out.tokens[0], together.tokens[n])


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_drafts_and_one_that_is_the_model_itself_is_always_right(root, kind):
    pipe, plain = load(root, kind), made({kind: load(root, kind)}, kind).tokens
    pipe.register_modules(drafter=pipe.transformer)
    out = made({kind: pipe}, kind, "speculative:drafter=draft-model,window=5")
    assert torch.equal(out.tokens, plain) and out.stats.forward_passes == -(-TOKENS // 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = LARPTransformer.from_config({**pipe.transformer.config, "num_layers": 1}).eval().double()
    pipe.register_modules(drafter=small)
    assert torch.equal(made({kind: pipe}, kind, "speculative:drafter=draft-model,window=4").tokens, plain)
    assert made({kind: pipe}, kind, "cool-sd:draft_length=4").tokens.shape == (2, TOKENS)
    pipe.register_modules(drafter=EagleDrafter.for_transformer(pipe.transformer.lm))
    with pytest.raises(InputError) as error:
        made({kind: pipe}, kind, "eagle")
    one_clear_line(error.value, "cannot read this model's positions")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again_it_makes_the_same_clip(pipes, kind, tmp_path):
    pipes[kind].save_pretrained(tmp_path / "saved")
    again = LARPPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    first, second = (made({kind: pipe}, kind, output_type="pt") for pipe in (pipes[kind], again))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.frames, second.frames)
    assert again.sampling == pipes[kind].sampling and again.takes_classes == (kind == "larp")
    other = LARPPipeline.from_pretrained(tmp_path / "saved", vq=tmp_path / "saved" / "vq", dtype=torch.float64)
    assert torch.equal(made({kind: other}, kind).tokens, first.tokens)


def test_the_tokenizer_is_part_of_the_model(root, tmp_path):
    pipe = load(root, "larp")
    assert pipe.model_hash is not None and pipe.model_hash != load(root, "larp-frames").model_hash
    reference.write_tokenizer(tmp_path, state=reference.tokenizer_state(seed=1))
    assert load(root, "larp", vq=tmp_path).model_hash != pipe.model_hash
    given = load(root, "larp", vq=load_larp_tokenizer(root / "tokenizer", dtype=torch.float64))
    assert torch.equal(made({"larp": given}, "larp").tokens, made({"larp": pipe}, "larp").tokens)


def test_a_clip_of_a_class_is_verified_and_a_forged_one_refuted(root, tmp_path):
    pipe = load(root, "larp", dtype=torch.float32)
    out = made({"larp": pipe}, "larp", "sjd:window=4", output_type="pil")
    for index, name in enumerate(("a", "b")):
        arsd.save_webp(out.frames[index], tmp_path / f"{name}.webp", pipe.record(out, index), pipe.frame_rate)
    assert [found.result for found in pipe.verify([tmp_path / "a.webp", tmp_path / "b.webp"])] == ["verified"] * 2
    arsd.save_webp(out.frames[0], tmp_path / "c.webp", pipe.record(out, 0) | {"noise_seed": 9}, pipe.frame_rate)
    assert pipe.verify(tmp_path / "c.webp").result == "refuted"
    arsd.save_webp(out.frames[1], tmp_path / "d.webp", pipe.record(out, 0), pipe.frame_rate)
    assert pipe.verify(tmp_path / "d.webp").result == "refuted"


def test_the_record_of_a_clip_does_not_hold_the_frames_that_it_was_made_of(root, tmp_path):
    pipe = load(root, "larp-frames", dtype=torch.float32)
    out = made({"larp-frames": pipe}, "larp-frames", "sjd:window=4", output_type="pil")
    arsd.save_webp(out.frames[0], tmp_path / "a.webp", pipe.record(out, 0), pipe.frame_rate)
    found = pipe.verify(tmp_path / "a.webp")
    assert found.result == "unknown" and "the record does not hold" in found.reason


def test_guidance_may_end_early_as_upstreams_does(pipes):
    out = made(pipes, "larp", "sjd:window=5", temperature=0, guidance_scale=6.0, guidance_interval=3)
    state = reference.transformer_state()
    for label, row in zip((3, 0), out.tokens.tolist(), strict=True):
        c, u = (reference.logits(state, reference.class_prompt(state, one), row) for one in (label, CLASSES))
        assert torch.cat([(u + 6 * (c - u))[:5], c[5:]]).argmax(-1).tolist() == row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_clips_can_be_made_in_other_dtypes(root, kind, dtype):
    out = made({kind: load(root, kind, dtype=dtype)}, kind, "sjd:window=4", output_type="np")
    assert out.frames.shape == (2, FRAMES, SIDE, SIDE, 3) and np.isfinite(out.frames).all()


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("larp", {"vq": None}, "holds no video tokenizer: give vq=..., the folder of huggingface.co/hywang66"),
        ("larp", {"vq": "nowhere"}, "no model 'nowhere'"),
        ("tokenizer", {}, "is the video tokenizer of LARP"),
        ("larp", {"vq": "larp"}, "holds a transformer of LARP"),
        ("empty", {}, "is no folder of LARP's autoregressive models"),
    ],
)
def test_what_is_missing_is_said_in_one_line(root, path, options, says):
    (root / "empty").mkdir(exist_ok=True)
    if options.get("vq") == "larp":
        options = {"vq": root / "larp"}
    with pytest.raises(CheckpointError) as error:
        load(root, path, **options)
    one_clear_line(str(error.value).replace(str(root), ""), says)


def test_files_that_do_not_belong_together_are_refused(root, tmp_path):
    state = reference.tokenizer_state()
    state["bottleneck.regularizer.embedding.weight"] = torch.randn(CODES + 1, 4)
    reference.write_tokenizer(tmp_path, state=state)
    with pytest.raises(CheckpointError) as error:
        load(root, "larp", vq=tmp_path)
    one_clear_line(error.value, "the model has 24 codes, the video tokenizer 25")


@pytest.mark.parametrize(
    ("kind", "call", "says"),
    [
        ("larp", {"class_labels": None}, "this model needs class_labels"),
        ("larp", {"class_labels": 6}, "class labels must be whole numbers in 0..5"),
        ("larp", {"class_labels": "cat"}, "must be one class id"),
        ("larp", {"frames": beginning()}, "whole clips of a class: leave out frames"),
        ("larp", {"prompt": "a cat"}, "knows no prompt"),
        ("larp", {"actions": [1]}, "knows no actions"),
        ("larp", {"height": 64}, "clips of 8 frames of 16 x 16 pixels only"),
        ("larp", {"num_frames": 9}, "clips of 8 frames"),
        ("larp", {"num_videos_per_prompt": 0}, "at least 1"),
        ("larp-frames", {"frames": None}, "goes on from frames: give some"),
        ("larp-frames", {"class_labels": 3}, "goes on from frames: give some, and no class_labels"),
        ("larp-frames", {"frames": beginning(1, FRAMES)}, "frames fill 8 of 8 frames"),
        (
            "larp-frames",
            {"frames": torch.zeros(1, 2, 3).long()},
            "frames holds codes of shape (1, 2, 3): give [n, 1, 1, 16]",
        ),
        ("larp-frames", {"frames": torch.full((1, 1, 1, TOKENS), CODES)}, "must be [B, 16] below 24"),
        ("larp-frames", {"frames": "clip.mp4"}, "frames must be pictures"),
        ("larp-frames", {"guidance_scale": 2.0}, "no unconditional stream"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(pipes, kind, call, says):
    with pytest.raises(ArsdError) as error:
        made(pipes, kind, **call)
    one_clear_line(error.value, says)
