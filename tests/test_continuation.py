"""Pictures that begin as a given one: the kept rows are the given ones, the rest is plain AR's own continuation of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drafting import drafting
from PIL import Image
from tiny_pipeline import GRID, TOKENS, class_pipeline, hushed, one_clear_line, seeded, text_pipeline, tiny_transformer

import arsd
from arsd.errors import ArsdError
from arsd.pipelines.prefix import kept_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def picture(side: int = 8, seed: int = 0, width: int | None = None) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, width or side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=["class", "text"])
def tiny(request) -> Any:
    pipe = hushed(class_pipeline() if request.param == "class" else text_pipeline()).to(torch.float64)
    return pipe, {"class_labels": [1, 3]} if request.param == "class" else {"prompt": ["red apple", "dog face"]}


def run(tiny: Any, decoder: Any, **options: Any) -> Any:
    pipe, inputs = tiny
    return pipe(**inputs | options, decoder=decoder, generator=seeded(4), output_type="latent")


# ------------------------------------------------------------------------------------------------------------ LlamaGen


def test_the_kept_rows_are_the_pictures_and_the_rest_is_new(tiny):
    pipe, _ = tiny
    image = picture()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 127.5 - 1
    codes = pipe.vq.encode(pixels)[0]
    for strength, rows in ((0.25, 3), (0.5, 2), (0.75, 1), (1.0, 0)):
        out = run(tiny, "ar", image=image, strength=strength)
        assert torch.equal(out.images[:, :rows], codes[:rows].expand(2, -1, -1))
        assert out.stats.tokens == [TOKENS - rows * GRID] * 2
        assert out.stats.forward_passes == TOKENS - rows * GRID
        assert all(entry.get("given_tokens", 0) == rows * GRID for entry in out.inputs)
    whole, none = run(tiny, "ar", image=image, strength=1), run(tiny, "ar")
    assert torch.equal(whole.tokens, none.tokens)


@pytest.mark.parametrize("decoder", ["sjd:window=3", "sjd:window=5,init=above", "sjd:window=16,init=left", "sjd:window=40"])
@pytest.mark.parametrize("rows_at_a_time", [None, 1])
def test_every_decoder_continues_with_the_tokens_of_plain_ar(tiny, decoder, rows_at_a_time):
    plain = run(tiny, "ar", image=picture(), strength=0.6)
    out = run(tiny, decoder, image=picture(), strength=0.6, batch_size=rows_at_a_time)
    assert torch.equal(out.tokens, plain.tokens)
    assert out.stats.forward_passes <= plain.stats.forward_passes * (1 if rows_at_a_time is None else 2)


@pytest.mark.parametrize(
    "decoder", ["eagle:draft_length=3", "eagle:tree=2x2", "hybrid:window=6", "speculative:drafter=draft-model,window=4"]
)
@pytest.mark.parametrize("kind", ["eagle", "small"])
def test_draft_models_read_what_is_given_and_do_not_show(decoder, kind):
    pipe = drafting(text_pipeline().to(torch.float64))
    if kind == "small":
        pipe.register_modules(drafter=tiny_transformer("text", seed=1).double())
    call = {"prompt": ["red apple", "dog face", "blue heart"], "image": picture(), "strength": 0.5, "output_type": "latent"}
    plain = pipe(**call, decoder="ar", generator=seeded(4))
    for rows in (None, 2):
        out = pipe(**call, decoder=decoder, generator=seeded(4), batch_size=rows)
        assert torch.equal(out.tokens, plain.tokens)


def test_a_drafter_that_is_the_model_itself_is_always_right_about_continuations():
    """So it must have read the condition, what is given, and every committed token, in the right places."""
    pipe = drafting(text_pipeline().to(torch.float64))
    pipe.register_modules(drafter=pipe.transformer)
    call = {"prompt": ["red apple", "dog face"], "image": picture(), "strength": 0.5, "output_type": "latent"}
    out = pipe(**call, decoder="speculative:drafter=draft-model,window=4", generator=seeded(4))
    assert out.stats.forward_passes == TOKENS // 2 // 4
    queued = pipe(**call, decoder="speculative:drafter=draft-model,window=4", generator=seeded(4), batch_size=1)
    assert torch.equal(out.tokens, queued.tokens) and queued.stats.row_passes == [TOKENS // 2 // 4] * 2


def test_the_law_of_a_continuation_is_the_models_own(tiny):
    """Log-probabilities equal those of teacher forcing the whole picture."""
    pipe, inputs = tiny
    out = run(tiny, "sjd:window=4,coupling=maximal", image=picture(), strength=0.5, log_probs=True)
    conditions = pipe.encode_inputs(**inputs, guided=True)
    condition, padding = conditions.condition, conditions.padding
    logits = [
        pipe.transformer(part, out.tokens, None if padding is None else ~padding[s]) for s, part in enumerate(condition)
    ]
    guided = logits[1] + 2.0 * (logits[0] - logits[1])
    expected = torch.log_softmax(guided, -1).gather(-1, out.tokens[..., None])[..., 0]
    new = slice(TOKENS // 2, None)
    torch.testing.assert_close(out.log_probs[:, new].double(), expected[:, new], atol=1e-5, rtol=0)


def test_one_picture_for_all_prompts_or_one_for_each(tiny):
    images = [picture(seed=1), picture(seed=2)]
    each = run(tiny, "sjd", image=images, num_images_per_prompt=2)
    for i, image in enumerate(images):
        alone = run(tiny, "ar", image=image, num_images_per_prompt=2)
        assert torch.equal(alone.tokens[2 * i : 2 * i + 2], each.tokens[2 * i : 2 * i + 2])
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image in images]
    tensors = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    plain = [np.asarray(image) for image in images]
    for given in (arrays, np.stack(arrays), tensors, plain, np.stack(plain), (tensors * 255).round().to(torch.uint8)):
        assert torch.equal(run(tiny, "sjd", image=given, num_images_per_prompt=2).tokens, each.tokens)


def test_codes_of_rows_are_kept_as_they_are(tiny):
    pipe, _ = tiny
    codes = pipe.vq.encode(2 * torch.rand(2, 3, 8, 8, generator=seeded(3), dtype=torch.float64) - 1)
    whole = [Image.fromarray(np.uint8(255 * np.ones((8, 8, 3))))] * 2
    for rows in (1, 3):
        out = run(tiny, "sjd:window=5", image=codes[:, :rows], strength=0.1)
        assert torch.equal(out.images[:, :rows], codes[:, :rows]) and out.inputs[0]["given_tokens"] == rows * GRID
        assert torch.equal(out.tokens, run(tiny, "ar", image=codes[:, :rows]).tokens)
    one = run(tiny, "ar", image=codes[:1, :2])
    assert torch.equal(one.images[:, :2], codes[:1, :2].expand(2, -1, -1))
    assert run(tiny, "ar", image=whole).tokens.shape == one.tokens.shape


def test_lumina_continues_the_upper_panel_of_a_dual_one_and_takes_its_instruction(samples):
    """The panel is encoded by itself, as upstream does; the instruction is not wrapped in another."""
    pipe = samples.pipe("lumina-mgpt-2")
    panel = pipe.make_raster(32, 64).to_codes(pipe.encode_image(picture(32, 5, 64), 32, 64))
    text = "Generate a dual-panel image of 64x64 where the <lower half> displays a <depth map>:\n"
    call = {"prompt": text, "image": panel, "height": 64, "width": 64, "output_type": "latent"}
    out = pipe(**call, generator=seeded(1), decoder="sjd:window=12")
    assert torch.equal(out.images[:, :4], panel) and out.images.shape == (1, 8, 8)
    assert torch.equal(out.tokens, pipe(**call, generator=seeded(1), decoder="ar").tokens)
    words = pipe.protocol.prompt_ids(text, 64, 64)
    assert pipe.tokenizer.decode(words[1 : 1 + len(text)]) == text
    assert len(pipe.protocol.prompt_ids("a cat", 64, 64)) > len("a cat") + 40


def test_a_picture_of_another_shape_is_cropped_around_its_centre(tiny):
    pixels = np.asarray(picture(8))
    wide = Image.fromarray(
        np.concatenate([np.zeros((8, 4, 3), np.uint8), pixels, np.full((8, 4, 3), 255, np.uint8)], axis=1)
    )
    assert torch.equal(run(tiny, "ar", image=wide).tokens, run(tiny, "ar", image=picture(8)).tokens)
    assert torch.equal(run(tiny, "ar", image=picture(8).convert("RGBA")).tokens, run(tiny, "ar", image=picture(8)).tokens)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image": "cat.png"}, "image"),
        ({"image": 3}, "image"),
        ({"image": []}, "image"),
        ({"image": [picture()] * 3}, "3 pictures for 2 prompts"),
        ({"image": np.zeros((2, 2))}, "image"),
        ({"image": torch.zeros(2, 4, 4, dtype=torch.long)}, "codes of shape"),
        ({"image": torch.zeros(2, 2, 5, dtype=torch.long)}, "codes of shape"),
        ({"image": torch.zeros(4, 4, dtype=torch.long)}, "codes of shape"),
        ({"image": torch.full((2, 2, 4), 99)}, "codes outside"),
        ({"image": torch.full((1, 3, 8, 8), torch.nan)}, "outside [0, 1]"),
        ({"image": np.full((8, 8, 3), 200.0)}, "outside [0, 1]"),
        ({"image": torch.zeros(3, 2, 4, dtype=torch.long)}, "3 pictures for 2 prompts"),
        ({"image": picture(), "strength": 0}, "strength"),
        ({"image": picture(), "strength": 1.5}, "strength"),
        ({"image": picture(), "strength": "half"}, "strength"),
        ({"image": picture(), "strength": float("nan")}, "strength"),
    ],
)
def test_what_cannot_be_continued_is_said_in_one_line(tiny, options, says):
    with pytest.raises(ArsdError) as error:
        run(tiny, "sjd", **options)
    one_clear_line(error.value, says)


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
def test_something_is_always_made_anew(rows):
    assert kept_rows(1e-9, rows) == rows - 1 and kept_rows(1, rows) == 0
    kept = [kept_rows(strength, rows) for strength in np.linspace(0.01, 1, 50)]
    assert kept == sorted(kept, reverse=True)


def test_a_picture_is_given_out_when_it_is_finished_and_callbacks_see_its_beginning(tiny):
    pipe, inputs = tiny
    seen, finished = [], []

    def step(pipe: Any, number: int, done: int, tensors: dict) -> dict:
        seen.append((done, tensors["tokens"]))
        return {}

    out = pipe(
        **inputs,
        image=picture(),
        decoder="sjd:window=3",
        generator=seeded(4),
        batch_size=1,
        output_type="latent",
        callback_on_step_end=step,
        on_picture=lambda number, one: finished.append((number, one.tokens, one.stats.tokens)),
    )
    half = TOKENS // 2
    assert all(torch.equal(tokens[:, :half], out.tokens[:, :half]) for _, tokens in seen)
    assert seen[-1][0] == TOKENS  # of the two new halves
    assert [number for number, *_ in finished] == [0, 1]
    assert all(torch.equal(tokens[0], out.tokens[number]) and count == [half] for number, tokens, count in finished)


# ------------------------------------------------------------------------------------------- other families, provenance


@pytest.mark.parametrize(("kind", "size"), [("lumina-mgpt", (64, 96)), ("lumina-mgpt-2", (64, 64)), ("anole", (64, 64))])
def test_families_with_marks_keep_whole_lines(samples, kind, size):
    pipe = samples.pipe(kind)
    call = {"prompt": "a cat", "height": size[0], "width": size[1], "image": picture(size[0], width=size[1])}
    plain = pipe(**call, decoder="ar", generator=seeded(2), output_type="latent")
    out = pipe(**call, decoder="sjd:window=9", generator=seeded(2), output_type="latent")
    assert torch.equal(out.tokens, plain.tokens)
    pixels = torch.from_numpy(np.array(call["image"])).permute(2, 0, 1)[None].double() / 127.5 - 1
    codes, rows = pipe.vq.encode(pixels), out.images.shape[1] // 2
    assert torch.equal(out.images[:, :rows], codes[:, :rows])
    raster = pipe.make_raster(*size)
    assert torch.equal(raster.from_codes(out.images), out.tokens)


@pytest.mark.parametrize(("kind", "size"), [("lumina-mgpt", (64, 96)), ("anole", (64, 64))])
def test_pictures_become_tokens_and_tokens_pictures(samples, kind, size):
    """The codes are the tokenizer's own, the marks stand where they belong, and what is decoded is encoded alike."""
    pipe, images = samples.pipe(kind), [picture(size[0], seed, size[1]) for seed in (1, 2)]
    tokens = pipe.encode_image(images, *size)
    raster = pipe.make_raster(*size)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).double() / 127.5 - 1
    assert torch.equal(raster.to_codes(tokens), pipe.vq.encode(pixels))
    assert all((tokens[:, n] == mark).all() for n, mark in raster.forced.items())
    painted = pipe.to_pil(tokens, raster)
    assert [image.size for image in painted] == [(size[1], size[0])] * 2


def test_a_continuation_is_verified_and_its_beginning_cannot_be_exchanged(tmp_path):
    pipe: Any = arsd.AutoARPipeline.from_pretrained(text_saved(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    out = pipe("red apple", image=picture(), generator=seeded(1), decoder="sjd:window=4")
    record = pipe.record(out, 0)
    assert record["given_tokens"] == TOKENS // 2
    arsd.save_png(out.images[0], tmp_path / "a.png", record)
    found = pipe.verify(tmp_path / "a.png")
    assert (found.result, found.given_tokens) == ("verified", TOKENS // 2)
    assert "the last 8 of its 16 tokens" in found.reason and "given beginning" in found.reason  # of the rest nothing is said
    whole = pipe("red apple", generator=seeded(1), decoder="sjd:window=4")
    arsd.save_png(whole.images[0], tmp_path / "whole.png", pipe.record(whole, 0))
    assert "given" not in pipe.verify(tmp_path / "whole.png").reason
    arsd.save_png(out.images[0], tmp_path / "b.png", record | {"given_tokens": 0})
    assert pipe.verify(tmp_path / "b.png").result == "refuted"
    for damaged in (-1, TOKENS, 2.5, True):
        arsd.save_png(out.images[0], tmp_path / "c.png", record | {"given_tokens": damaged}, overwrite=True)
        assert pipe.verify(tmp_path / "c.png").result == "unknown"


def text_saved(folder: Any) -> Any:
    text_pipeline().save_pretrained(folder / "model")
    return folder / "model"


def test_the_command_line_continues_a_picture(tmp_path, command):
    picture(64).save(tmp_path / "seed.png")
    model = text_saved(tmp_path)
    words = ("generate", "red apple", "--model", model, "--image", tmp_path / "seed.png", "--dtype", "float32")
    status, out, _ = command(*words, "--strength", 0.25, "--compare", "--out", tmp_path / "out")
    assert status == 0 and "same tokens" in out
    status, out, _ = command("verify", *(tmp_path / "out").glob("*.png"))
    assert status == 0 and "verified" in out
    status, _, err = command(*words[:5], tmp_path / "none.png", "--out", tmp_path / "out2")
    assert status == 2 and len(err) == 1 and "none.png" in err[0]


def test_the_shipped_model_continues_a_picture():
    pipe: Any = arsd.AutoARPipeline.from_pretrained("emoji-128")
    pipe.set_progress_bar_config(disable=True)
    apple = pipe("red apple", generator=seeded(1)).images[0]
    again = pipe("red apple", image=apple, strength=0.5, generator=seeded(2), output_type="latent")
    plain = pipe("red apple", image=apple, strength=0.5, generator=seeded(2), output_type="latent", decoder="ar")
    assert torch.equal(again.tokens, plain.tokens)
    drafted = pipe("red apple", image=apple, strength=0.5, generator=seeded(2), output_type="latent", decoder="eagle")
    assert torch.equal(drafted.tokens, plain.tokens)
