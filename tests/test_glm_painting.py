"""GLM-Image: pictures are those of diffusers with the same codes, and are verified; mistakes are said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_glm_image as published
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import GlmImagePipeline
from diffusers.hooks import apply_group_offloading
from PIL import Image
from safetensors.torch import load_file, save_file
from test_glm_image import picture
from tiny_pipeline import class_pipeline, one_clear_line, seeded

import arsd
from arsd.app.painting import cells
from arsd.errors import ArsdError
from arsd.pipelines.glm_image import GLMImagePipeline, _noise

SIZE = {"height": 64, "width": 96}
PROMPTS = ["a cat", "a red apple with 'hello' on it"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return published.write_sample("glm-image", tmp_path_factory.mktemp("glm") / "GLM-Image")


@pytest.fixture(scope="module")
def pipe(sample):
    return sample.load()


@pytest.fixture(scope="module")
def stock(sample):
    """Diffusers' own."""
    found = GlmImagePipeline.from_pretrained(str(sample.folder), dtype=torch.float64)
    found.set_progress_bar_config(disable=True)
    return found


# --------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("images", [None, [picture(1), picture(2, 64, 64)]])
def test_pictures_are_those_of_diffusers_with_these_codes(pipe, stock, images):
    """Bit for bit, each painted by itself with the noise of its seed and index."""
    call: dict[str, Any] = {"prompt_images": images, "generator": seeded(3), "num_images_per_prompt": 2}
    out = pipe(PROMPTS, **SIZE, **call)
    codes = pipe(PROMPTS, **SIZE, **call | {"generator": seeded(3)}, output_type="latent").images
    extra = pipe.encode_inputs(PROMPTS, images, **SIZE).extra
    for i, found in enumerate(out.images):
        held: dict[str, Any] = {}
        if images is not None:
            ids, grids = extra[i // 2].prior()
            held = {"image": images, "prior_token_image_ids": [ids], "source_image_grid_thw": [grids]}
        noise = _noise({"noise_seed": out.seeds[i], "image_index": out.image_indices[i]})
        steps = {"num_inference_steps": 2, "guidance_scale": 1.5, "generator": noise}
        theirs = stock(
            PROMPTS[i // 2], **SIZE, prior_token_ids=stock._upsample_token_ids(codes[i], 2, 3), **steps, **held
        ).images[0]
        assert found.tobytes() == theirs.tobytes()
    assert len({image.tobytes() for image in out.images}) == 4
    drawn = [
        _noise({"noise_seed": a, "image_index": b}).initial_seed() for a, b in ((1, 2), (1, 3), (2, 2), (12, 3), (1, 2))
    ]
    assert len(set(drawn)) == 4 and drawn[0] == drawn[4]


def test_pictures_of_prompts_may_have_other_modes(pipe):
    held = [picture(1).convert(mode) for mode in ("RGBA", "L")]
    out = pipe(PROMPTS[0], prompt_images=held, **SIZE, generator=seeded(4))
    plain = pipe(PROMPTS[0], prompt_images=[image.convert("RGB") for image in held], **SIZE, generator=seeded(4))
    assert torch.equal(out.tokens, plain.tokens) and out.images[0].tobytes() == plain.images[0].tobytes()


def test_codes_become_the_same_pictures_later(pipe):
    """What an evaluation keeps is codes; what a page shows of a run is their shades, where they are in the picture."""
    latent, drawn = (pipe(PROMPTS, **SIZE, generator=seeded(4), output_type=form) for form in ("latent", "pil"))
    assert [one.tobytes() for one in pipe.pictures_of(latent)] == [one.tobytes() for one in drawn.images]
    raster = pipe.make_raster(64, 96)
    shades = pipe.sketch(latent.tokens, raster)
    assert len(shades) == 2 and shades[0].size == (96, 64)
    for row, column in ((0, 0), (1, 2)):
        code = int(latent.images[1, row, column])
        assert shades[1].getpixel((32 * column + 7, 32 * row + 9)) == (round(255 * code / 31),) * 3
    assert (cells(raster, latent.tokens[1].numpy()) == latent.images[1].numpy()).all()


def test_the_scheduler_is_part_of_the_model(sample, tmp_path):
    again = published.write_sample("glm-image", tmp_path / "GLM-Image").load()
    assert again.model_hash == sample.load().model_hash
    path = tmp_path / "GLM-Image" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 500}))
    assert arsd.AutoARPipeline.from_pretrained(tmp_path / "GLM-Image", image_size=64).model_hash != again.model_hash


def test_other_forms_and_numbers_of_steps(pipe, monkeypatch):
    call, plain, steps = {"prompt": PROMPTS[0], **SIZE}, type(pipe).paint, []
    (image,) = pipe(**call, generator=seeded(1)).images
    array, tensor = (pipe(**call, generator=seeded(1), output_type=form).images for form in ("np", "pt"))
    assert array.shape == (1, 64, 96, 3) and tensor.shape == (1, 3, 64, 96) and 0 <= array.min() < array.max() <= 1
    assert Image.fromarray((array[0] * 255).round().astype("uint8")).tobytes() == image.tobytes()
    heard: list[Any] = []
    monkeypatch.setattr(type(pipe), "paint", lambda *given: steps.append(1) or plain(*given))
    both = pipe(PROMPTS, **SIZE, generator=seeded(1), batch_size=1, on_picture=lambda n, one: heard.append(one.images[0]))
    assert [one.tobytes() for one in heard] == [one.tobytes() for one in both.images] and len(steps) == 2  # painted once
    assert heard[0].tobytes() == image.tobytes()
    pipe.num_inference_steps = 3
    out = pipe(**call, generator=seeded(1))
    assert out.inputs[0]["num_inference_steps"] == 3 == pipe.config["num_inference_steps"]
    assert out.images[0].tobytes() != image.tobytes()
    pipe.num_inference_steps, pipe.dit_guidance_scale = 2, 4.0
    assert pipe(**call, generator=seeded(1)).images[0].tobytes() != image.tobytes()
    pipe.dit_guidance_scale = 1.5


def test_the_scheduler_of_the_pipeline_is_not_used_up(pipe):
    before = pipe.scheduler.__dict__.copy()
    pipe(PROMPTS[0], **SIZE, generator=seeded(1))
    assert pipe.scheduler.__dict__.keys() == before.keys() and pipe.scheduler.timesteps is before["timesteps"]


def test_how_a_picture_was_painted_is_verified(pipe, tmp_path, monkeypatch):
    out = pipe(PROMPTS[0], **SIZE, generator=seeded(4))
    path, record = tmp_path / "a.png", pipe.record(out, 0)
    assert record["num_inference_steps"] == 2 and record["dit_guidance_scale"] == 1.5

    def judged(image: Image.Image, changed: dict[str, Any]) -> Any:
        arsd.save_png(image, path, record | changed, overwrite=True)
        return pipe.verify(path)

    found = judged(out.images[0], {})
    assert found.result == "verified" and found.pixels_match and found.same_arithmetic
    assert judged(out.images[0], {"num_inference_steps": 3}).result == "refuted"
    assert judged(out.images[0].rotate(180), {}).reason == "its pixels are not what its tokens decode to"
    for odd in ({"num_inference_steps": 10**9}, {"num_inference_steps": None}, {"dit_guidance_scale": float("inf")}):
        assert judged(out.images[0], odd).result == "unknown"
    for name in ("guidance_scale", "image_guidance_scale"):  # the model has none
        assert judged(out.images[0], {"sampling": record["sampling"] | {name: 3.0}}).result == "unknown"
    assert judged(out.images[0], {"negative_prompt": "no cats"}).result == "refuted"
    assert judged(out.images[0], {"given_tokens": 3}).result == "unknown"
    assert judged(out.images[0], {"prompt": "a cat " * 20_000}).reason == "its prompt is too long to be followed"
    assert judged(out.images[0], {"prompt": "a cat " * 5_000}).result == "refuted"
    monkeypatch.setattr(pipe, "paint", None)  # what has other tokens is not painted
    assert judged(out.images[0], {"noise_seed": 1, "num_inference_steps": 1000}).result == "refuted"
    monkeypatch.undo()
    monkeypatch.setattr(pipe, "arithmetic_probe", lambda *shape: "0" * 16)  # as on another machine
    assert judged(out.images[0], {}).result == "verified"
    elsewhere = judged(out.images[0].rotate(180), {})
    assert elsewhere.result == "unknown" and "painted its pixels" in elsewhere.reason and elsewhere.mismatches == 0
    assert judged(out.images[0], {"noise_seed": 1}).result == "refuted"
    monkeypatch.undo()
    held = pipe(PROMPTS[0], prompt_images=[picture(1)], **SIZE, generator=seeded(4))
    arsd.save_png(held.images[0], path, pipe.record(held, 0), overwrite=True)
    assert "prompt held pictures" in pipe.verify(path).reason


# ------------------------------------------------------------------------------------------------------------- components


def test_a_saved_folder_is_also_one_of_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["num_inference_steps"] == 2
    pipe.diffusers.save_pretrained(tmp_path / "published")
    again = GLMImagePipeline.from_pretrained(tmp_path / "published", num_inference_steps=2, image_size=64)
    again.set_progress_bar_config(disable=True)
    first, second = (p(PROMPTS[0], **SIZE, generator=seeded(1)).images[0] for p in (pipe, again))
    assert again.dtype == torch.float64 and first.tobytes() == second.tobytes()


@pytest.mark.parametrize("option", [{}, {"dtype": "float64"}, {"torch_dtype": torch.float64}])
def test_weights_are_in_the_dtype_of_the_files_unless_told_otherwise(sample, option):
    pipe = GLMImagePipeline.from_pretrained(sample.folder, **option)
    expected = torch.float64 if option else torch.bfloat16
    parts = (pipe.transformer, pipe.dit, pipe.vae, pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {expected} and pipe.dtype == expected


def test_the_language_model_alone_writes_codes(sample, pipe):
    parts: dict[str, Any] = {"dit": None, "vae": None, "text_encoder": None}
    alone = sample.load(**parts)
    call: dict[str, Any] = {"prompt": PROMPTS[0], **SIZE, "output_type": "latent"}
    assert torch.equal(alone(**call, generator=seeded(1)).images, pipe(**call, generator=seeded(1)).images)
    with pytest.raises(ArsdError) as error:
        alone(PROMPTS[0], **SIZE)
    one_clear_line(error.value, "pictures need dit, vae, text_encoder, loaded as None")


def test_codes_are_compared_by_their_directions(pipe):
    """As the quantiser does it; the end mark is like none of them."""
    vectors, weight = pipe.codebook, pipe.transformer.model.vqmodel.quantize.embedding.weight
    torch.testing.assert_close(vectors[:-1].norm(dim=-1), torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(vectors[:-1] * weight.norm(dim=-1, keepdim=True), weight)
    assert torch.cdist(vectors[-1:], vectors[:-1]).amin() > 100


def test_the_parts_are_offloaded_in_diffusers_order():
    ours = GLMImagePipeline.model_cpu_offload_seq.replace("dit", "DIT").replace("transformer", "vision_language_encoder")
    assert ours.replace("DIT", "transformer") == GlmImagePipeline.model_cpu_offload_seq


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_groups_of_layers_on_disk_give_the_same_tokens(sample, pipe, how, tmp_path, monkeypatch):
    """What diffusers leaves in the place of weights on disk is as empty as it claims: NaN, not what stood there before."""

    def nothing(like: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.full_like(like, torch.nan if like.is_floating_point() else 0, **options)

    call: dict[str, Any] = {"prompt": PROMPTS, "prompt_images": [picture(1)], **SIZE, "output_type": "latent"}
    call |= {"decoder": "sjd:window=4,acceptance=lantern:k=3"}
    other = sample.load()
    group = {"num_blocks_per_group": 1} if how == "block_level" else {}
    place = {"offload_type": how, "offload_to_disk_path": str(tmp_path), **group}
    monkeypatch.setattr(torch, "empty_like", nothing)
    apply_group_offloading(other.transformer, torch.device("cpu"), **place)
    assert torch.equal(other.codebook, pipe.codebook)
    assert torch.equal(other(**call, generator=seeded(3)).tokens, pipe(**call, generator=seeded(3)).tokens)


def test_whole_models_are_brought_before_any_part_of_them_is_used(sample, pipe):
    """Between calls the weights are NaN, and the hook puts them back: what was not asked for would show."""
    call: dict[str, Any] = {"prompt": PROMPTS, "prompt_images": [picture(1)], **SIZE, "output_type": "pt"}
    other, brought = sample.load(), []

    class Bring(ModelHook):
        def __init__(self, module: torch.nn.Module) -> None:
            self.kept = {name: p.detach().clone() for name, p in module.named_parameters()}
            for p in module.parameters():
                p.data.fill_(torch.nan)

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            brought.append(type(module).__name__)
            for name, p in module.named_parameters():
                p.data.copy_(self.kept[name])
            return args, kwargs

    for part in (other.transformer, other.dit, other.text_encoder):  # diffusers calls encode of the vae
        add_hook_to_module(part, Bring(part))
    assert torch.equal(other(**call, generator=seeded(3)).images, pipe(**call, generator=seeded(3)).images)
    assert brought[0] == "GlmImageForConditionalGeneration" and len(set(brought)) == 3


# --------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"guidance_scale": 3.0}, "no guidance: leave out guidance_scale"),
        ({"image_guidance_scale": 3.0}, "no guidance"),
        ({"negative_prompt": "ugly"}, "leave out negative_prompt"),
        ({"height": 65}, "multiples of 32"),
        ({"height": 32, "width": 32 * 257}, "multiples of 32"),
        ({"prompt": " "}, "empty"),
        ({"class_labels": 3}, "leave out class_labels"),
        ({"image": torch.zeros(1, 3, 64, 96)}, "preview of its own"),
        ({"image": torch.zeros(1, 1, 3).long()}, "preview of its own"),
        ({"prompt_images": []}, "prompt_images must be PIL pictures"),
        ({"prompt_images": ["cat.png"]}, "prompt_images must be PIL pictures"),
        ({"prompt_images": torch.zeros(1, 3, 64, 64)}, "prompt_images must be PIL pictures"),
        ({"prompt_images": [[picture(1)], [picture(1)]]}, "a list of as many for each"),
        ({"prompt_images": [picture(1, 64, 80)]}, "multiples of 32"),
        ({"prompt_images": [picture(1, 64, 512)]}, "cannot be read"),
        ({"decoder": "eagle"}, "drafter"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(pipe, call, says):
    with pytest.raises(ArsdError) as error:
        pipe(**{"prompt": "a", **SIZE} | call)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda pipe: pipe.decode_pixels(torch.zeros(1, 5).long()), "no picture without their prompt"),
        (lambda pipe: pipe.encode_image(picture(1)), "preview of its own"),
        (lambda pipe: GLMImagePipeline(pipe.dit, pipe.processor), "language model of GLM-Image, not a GlmImageTransformer"),
        (lambda pipe: GLMImagePipeline.of(pipe.diffusers, num_inference_steps=0), "num_inference_steps must be"),
        (lambda pipe: GLMImagePipeline.of(pipe.diffusers, dit_guidance_scale=float("nan")), "dit_guidance_scale must be"),
        (lambda pipe: GLMImagePipeline.of(pipe.diffusers, sampling={"heat": 1}), "sampling has options"),
    ],
)
def test_bad_parts_and_uses_are_answered_in_one_line(pipe, make, says):
    with pytest.raises(ArsdError) as error:
        make(pipe)
    one_clear_line(error.value, says)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(path: Path, key: str | None, reshaped: str | None = None) -> None:
    state = load_file(path)
    save_file({k: v[:-1].clone() if k == reshaped else v for k, v in state.items() if k != key}, path, {"format": "pt"})


LANGUAGE = "vision_language_encoder"
HARM: list[tuple[str, Any, str]] = [
    (LANGUAGE, lambda f: cut(f / "model.safetensors"), "truncated, corrupt or no weight file"),
    (LANGUAGE, lambda f: (f / "model.safetensors").unlink(), "has no weights: download them"),
    (LANGUAGE, lambda f: without(f / "model.safetensors", "lm_head.weight"), "lacks 1 weights, such as lm_head.weight"),
    (LANGUAGE, lambda f: without(f / "model.safetensors", None, "lm_head.weight"), "no pipeline of GLM-Image"),
    (LANGUAGE, lambda f: (f / "config.json").unlink(), "has no config.json"),
    (
        LANGUAGE,
        lambda f: edited(f / "config.json", image_start_token_id=3),
        "the processor's bos_token has the id 32, not 3",
    ),
    (LANGUAGE, lambda f: edited(f / "config.json", image_token_id="x"), "no pipeline of GLM-Image"),
    ("transformer", lambda f: cut(f / "diffusion_pytorch_model.safetensors"), "truncated"),
    ("transformer", lambda f: without(f / "diffusion_pytorch_model.safetensors", "proj_out.bias"), "proj_out.bias"),
    ("vae", lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "has no weights"),
    ("text_encoder", lambda f: without(f / "model.safetensors", "shared.weight"), "text_encoder lacks"),
    ("processor", lambda f: [file.unlink() for file in f.iterdir()] and f.rmdir(), "has no processor: download the whole"),
    ("processor", lambda f: (f / "tokenizer.json").write_text("{"), "no pipeline of GLM-Image"),
    ("scheduler", lambda f: (f / "scheduler_config.json").write_text("{"), "no pipeline of GLM-Image"),
    (".", lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    (".", lambda f: (f / "model_index.json").write_text("{"), "damaged"),
]


@pytest.mark.parametrize("number", range(len(HARM)))
def test_damaged_folders_are_answered_in_one_line(number, tmp_path, quiet_transformers):
    where, harm, says = HARM[number]
    published.write_sample("glm-image", tmp_path / "GLM")
    harm(tmp_path / "GLM" / where)
    for load in (GLMImagePipeline.from_pretrained, arsd.AutoARPipeline.from_pretrained):
        with pytest.raises(ArsdError) as error:
            load(tmp_path / "GLM")
        one_clear_line(error.value, says)


def test_folders_and_parts_of_others_are_refused(sample, pipe, tmp_path):
    class_pipeline().save_pretrained(tmp_path / "classes")
    with pytest.raises(ArsdError) as error:
        GLMImagePipeline.from_pretrained(tmp_path / "classes")
    one_clear_line(error.value, "needs the pipeline LlamaGenPipeline, not GLMImagePipeline")
    with pytest.raises(ArsdError) as error:
        sample.load(vq=pipe.vq)
    one_clear_line(error.value, "leave out vq")
    other = published.make_pipeline()
    other.transformer.register_to_config(prior_vq_quantizer_codebook_size=7)
    with pytest.raises(ArsdError) as error:
        GLMImagePipeline.of(other)
    one_clear_line(error.value, "knows 7 codes, the language model 32")
    with pytest.raises(ArsdError) as error:
        arsd.AnolePipeline.from_pretrained(sample.folder)
    one_clear_line(error.value, "GlmImagePipeline")
