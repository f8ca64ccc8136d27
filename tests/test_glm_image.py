"""GLM-Image: positions, prompts and laws are transformers' own, pictures diffusers' own, and requests never meet."""

from __future__ import annotations

from typing import Any

import family_glm_image as published
import pytest
import test_diffusers_manners as manners
import test_families as asked
import torch
from families import CODES, PROMPTS
from family_glm_image import GlmImageSample, own_logits
from PIL import Image
from tiny_pipeline import one_clear_line, seeded
from transformers.generation import logits_process as hf

import arsd
from arsd.errors import ArsdError
from arsd.models.eagle import EagleDrafter
from arsd.models.glm_image import codes_of, places_of
from arsd.pipelines.glm_image import GLMImagePipeline

KIND = "glm-image"
SIZE = {"height": 64, "width": 96}


class One:
    """The sample and its pipeline, as the questions of :mod:`test_families` take them."""

    def __init__(self, folder: Any) -> None:
        self.only: GlmImageSample = published.write_sample(KIND, folder)
        self.loaded: Any = self.only.load()

    def sample(self, kind: str) -> GlmImageSample:
        return self.only

    def pipe(self, kind: str) -> Any:
        return self.loaded


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return One(tmp_path_factory.mktemp("glm") / "GLM-Image")


@pytest.fixture(scope="module")
def pipe(one):
    return one.loaded


@pytest.fixture(scope="module")
def network(one):
    """Transformers' own, in float64."""
    return one.only.parts["network"]


def picture(seed: int, height: int = 64, width: int = 96) -> Image.Image:
    values = torch.randint(0, 256, (height // 8, width // 8, 3), generator=seeded(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BILINEAR)


def processed(pipe: Any, prompts: list[str], images: list[list[Image.Image]] | None = None, **size: int) -> Any:
    """What transformers' processor makes of a batch, as diffusers asks for it."""
    held = images or [[]] * len(prompts)
    content = [
        [*({"type": "image", "image": image} for image in some), {"type": "text", "text": text}]
        for text, some in zip(prompts, held, strict=True)
    ]
    wanted = {"target_h": size.get("height", 64), "target_w": size.get("width", 96), "padding": len(prompts) > 1}
    chats = [[{"role": "user", "content": one}] for one in content]
    options: Any = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": wanted}
    return pipe.processor.apply_chat_template(chats, **options)


# ------------------------------------------------------------------------------------------ what is asked of every family


@pytest.mark.parametrize(
    "question",
    [
        asked.test_logits_of_both_streams_are_the_published_ones_however_long_the_passes_are,
        asked.test_what_was_fed_and_rolled_back_leaves_no_trace,
        asked.test_every_sequence_is_a_whole_picture_by_upstreams_rules,
        asked.test_a_folder_is_recognised_by_its_content,
        manners.test_from_pipe_shares_the_components,
    ],
)
def test_what_is_asked_of_every_family(one, question):
    question(one, KIND)


@pytest.mark.parametrize(
    "question",
    [
        asked.test_saved_and_loaded_again_it_paints_the_same_picture,
        asked.test_a_picture_is_verified_and_a_forged_one_refuted,
    ],
)
def test_what_is_asked_of_every_family_with_files(one, question, tmp_path):
    question(one, KIND, tmp_path)


@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_sjd_gives_the_tokens_of_plain_ar(one, pipe, window):
    plain = asked.drawn(pipe, one.only)
    for init in ("uniform", "above"):
        out = asked.drawn(pipe, one.only, f"sjd:window={window},init={init}")
        assert torch.equal(out.tokens, plain.tokens)
        assert out.stats.forward_passes < plain.stats.forward_passes == plain.tokens.shape[1]


def test_prompts_are_those_of_the_description(one, pipe):
    for text in ("a cat", "Gala: 10\n apples, 'ripe'"):
        conditions = pipe.encode_inputs([text], **SIZE)
        assert asked.stream_ids(conditions)[0][0] == one.only.streams(text, (64, 96))[0]
        assert processed(pipe, [text])["input_ids"][0].tolist() == pipe.protocol.prompt_ids(text, 64, 96)


def test_layouts_of_many_sizes_are_the_processors(pipe):
    for rows in (*range(1, 40), 64, 255, 256):
        for columns in (1, 2, 7, 31, 32, 33, 48, 256):
            raster = pipe.make_raster(32 * rows, 32 * columns)
            *target, high, wide = pipe.processor._get_target_shape(height=32 * rows, width=32 * columns)
            assert ((raster.rows, raster.columns), raster.preview) == (tuple(target), (high, wide))
            assert raster.num_tokens == rows * columns + high * wide + 1


# ------------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (32, 256), (320, 64)])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_positions_are_those_of_transformers(pipe, network, size, images):
    """Of prompts with pictures of different sizes, each of a batch of two that is padded."""
    many = [[picture(n, 64, 96 + 64 * n) for n in range(images)], [picture(n, 128, 64) for n in range(images)]]
    height, width = size
    inputs = processed(pipe, PROMPTS, many if images else None, height=height, width=width)
    places, _ = network.model.get_rope_index(**{name: inputs[name] for name in inputs if name != "pixel_values"})
    behind = network.model._cached_decode_position_ids
    for b, text in enumerate(PROMPTS):
        given = {"prompt_images": many[b]} if images else {}
        reading = pipe.encode_inputs([text], height=height, width=width, **given).extra[0]
        real = inputs["attention_mask"][b] == 1
        expected = torch.cat([places[:, b, real], behind[b]], dim=1)
        assert torch.equal(reading.places, expected)


def test_positions_by_hand():
    """A word, a picture of 1 x 2 codes, a word; then 1 x 1, 2 x 1, and the end."""
    raster = arsd.models.raster.Raster(2, 1, 9, ("end",), None, ("end",), preview=(1, 1))
    found = places_of([70, 99, 99, 71], 99, [(1, 2)], raster)
    assert found.tolist() == [[0, 1, 1, 3, 4, 5, 5, 7], [0, 1, 1, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 5, 7]]


def test_logits_behind_pictures_in_the_prompt_are_transformers_own(one, network):
    """Each of a batch has other pictures; in passes of every length, and across a queue where a row gets the next one."""
    pipe = one.only.load(dtype=torch.float32)
    images = [[picture(1), picture(2, 64, 64)], [picture(3, 128, 64), picture(4)]]
    conditions = pipe.encode_inputs(PROMPTS, images, **SIZE)
    assert conditions.raster.preview == (0, 0)
    tokens = torch.randint(0, CODES, (2, 7), generator=seeded(2))
    tokens[:, -1] = CODES
    ids = asked.stream_ids(conditions)[0]
    wanted = []
    for b, row in enumerate(ids):
        inputs = processed(pipe, [PROMPTS[b]], [images[b]])
        grids = inputs["image_grid_thw"]
        codes = torch.cat([c.flatten() for c in codes_of(network, inputs["pixel_values"], grids[:2])])
        right = inputs["input_ids"][0].clone()
        right[right == network.config.image_token_id] = codes
        assert row == right.tolist() and len(set(codes.tolist())) > 2
        wanted.append(own_logits(network, row, pipe.protocol.local_ids[tokens[b]].tolist(), grids.tolist()))
    for width in (1, 3, 7):
        found = asked.forced_logits(pipe, conditions, tokens, width)[0, :, :-1, :CODES]
        torch.testing.assert_close(found.double(), torch.stack(wanted)[:, :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("images", [None, [[picture(1)], [picture(2, 128, 64)]]])
def test_greedily_it_writes_what_transformers_generate_writes(pipe, network, images):
    inputs = processed(pipe, PROMPTS, images)
    length = pipe.encode_inputs(PROMPTS, images, **SIZE).raster.num_tokens
    words = list(range(CODES, published.HEAD))  # which transformers might draw in the place of codes
    theirs = network.generate(**inputs, do_sample=False, max_new_tokens=length - 1, suppress_tokens=words)
    call = {"prompt": PROMPTS, "prompt_images": images, "temperature": 0, "output_type": "latent", "progress": False}
    for decoder in ("ar", "sjd:window=12"):
        ours = pipe(**call, **SIZE, decoder=decoder)
        assert torch.equal(ours.tokens[:, :-1], theirs[:, inputs["input_ids"].shape[1] :])
        assert bool((ours.tokens[:, -1] == CODES).all()) and ours.images.shape == (2, 2, 3)


def test_laws_are_those_of_generate(one, pipe, network):
    """Temperature, top-k, top-p in this order, of the codes; what a model does not say is what generate() takes."""
    assert pipe.sampling == {"temperature": 0.9, "top_k": 50, "top_p": 0.75}
    out = asked.drawn(pipe, one.only, "sjd:window=4", top_k=20, log_probs=True)
    picture = pipe.protocol.local_ids[out.tokens[0]].tolist()
    scores = one.only.logits(pipe.protocol.prompt_ids(PROMPTS[0], 64, 96), picture)
    for warp in (hf.TemperatureLogitsWarper(0.9), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.75)):
        scores = warp(None, scores)
    expected = scores.log_softmax(-1).gather(1, out.tokens[0, :, None].clamp_max(CODES - 1))[:-1, 0]
    torch.testing.assert_close(out.log_probs[0, :-1].double(), expected, atol=1e-5, rtol=0)
    network.generation_config.temperature = None
    network.generation_config.top_k = 0
    changed = GLMImagePipeline(network, pipe.processor).sampling
    network.generation_config.temperature, network.generation_config.top_k = 0.9, None
    assert changed == {"temperature": 1.0, "top_k": 0, "top_p": 0.75}


# ------------------------------------------------------------------------------------------------------- rows, drafters


@pytest.mark.parametrize("images", [None, [[picture(n, 64 + 64 * (n % 2))] for n in range(3)]])
def test_a_picture_does_not_depend_on_the_others_of_its_batch(pipe, images):
    prompts, seeds = [*PROMPTS, "x" * 90], [seeded(n) for n in (5, 6, 7)]
    call: dict[str, Any] = {"output_type": "latent", "progress": False, **SIZE}
    together = pipe(prompts, prompt_images=images, generator=seeds, batch_size=2, decoder="sjd:window=6", **call)
    for n, prompt in enumerate(prompts):
        some = None if images is None else images[n]
        alone = pipe(prompt, prompt_images=some, generator=seeded(5 + n), decoder="ar", **call)
        assert torch.equal(alone.tokens[0], together.tokens[n])


@pytest.mark.parametrize("images", [None, [picture(1)]])
def test_a_smaller_model_drafts(one, pipe, network, images):
    """One that is as good as the model itself is believed in every guess, so that it knows prompts and positions, too."""
    plain = asked.drawn(pipe, one.only, prompt_images=images)
    passes = []
    try:
        for pipe.drafter in (published.make_network(seed=5, width=32).double(), network):
            out = asked.drawn(pipe, one.only, "speculative:drafter=draft-model,window=5", prompt_images=images)
            assert torch.equal(out.tokens, plain.tokens)
            passes.append(out.stats.forward_passes)
    finally:
        pipe.drafter = None
    total = plain.tokens.shape[1]
    assert passes[1] == -(-total // 5) < passes[0] <= total


def test_drafters_of_another_kind_are_refused(one, pipe):
    other, head = published.make_network(width=32), EagleDrafter.__new__(EagleDrafter)
    other.config.image_token_id += 1
    torch.nn.Module.__init__(head)
    head.fc = torch.nn.Linear(1, 1)
    try:
        for pipe.drafter, decoder in ((other, "speculative:drafter=draft-model,window=4"), (head, "eagle")):
            with pytest.raises(ArsdError) as error:
                asked.drawn(pipe, one.only, decoder)
            one_clear_line(error.value, "smaller model with the same words")
    finally:
        pipe.drafter = None
