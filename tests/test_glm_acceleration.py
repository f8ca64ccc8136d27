"""Diffusers' ``GlmImagePipeline`` with our prior tokens: the user's call stays as it is, and requests do not meet."""

from __future__ import annotations

import threading
from typing import Any

import family_glm_image as published
import pytest
import torch
from diffusers import DiffusionPipeline, GlmImagePipeline
from test_glm_image import picture
from tiny_pipeline import one_clear_line, seeded

import arsd
from arsd.errors import ArsdError
from arsd.pipelines.glm_acceleration import accelerate
from arsd.pipelines.glm_image import GLMImagePipeline

SIZE = {"height": 64, "width": 96}
PROMPTS = ["a cat", "a red apple with 'hello' on it"]
STATE = ("_cached_decode_position_ids", "_prefill_len", "rope_deltas")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return published.write_sample("glm-image", tmp_path_factory.mktemp("glm") / "GLM-Image")


@pytest.fixture
def pipe(sample):
    """Diffusers' own, as a user loads it; its model would draw other words than codes, were they not suppressed."""
    found = GlmImagePipeline.from_pretrained(str(sample.folder), dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    found.vision_language_encoder.generation_config.suppress_tokens = list(range(published.CODES, published.HEAD))
    return found


def painted(pipe: Any, prompt: Any = PROMPTS, **options: Any) -> torch.Tensor:
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded(3), **SIZE}
    images: torch.Tensor = pipe(prompt, **call | options).images
    return images


def prior_of(pipe: Any, images: Any = None, prompts: Any = PROMPTS, seed: int = 3) -> dict[str, Any]:
    """What a call is given to have the codes of our own pipeline."""
    own = GLMImagePipeline.of(pipe)
    noise = torch.Generator().manual_seed(seeded(seed).initial_seed())
    options: dict[str, Any] = {"prompt_images": images, "output_type": "latent", "progress": False, **SIZE}
    out = own(prompts, generator=noise, decoder="ar", **options)
    found: dict[str, Any] = {"prior_token_ids": torch.cat([pipe._upsample_token_ids(codes, 2, 3) for codes in out.images])}
    if images is not None:
        ids, grids = zip(*(r.prior() for r in own.encode_inputs(prompts, images, **SIZE).extra), strict=True)
        found |= {"image": images, "prior_token_image_ids": list(ids), "source_image_grid_thw": list(grids)}
    return found


IMAGES = [[picture(1), picture(2, 64, 64)], [picture(3, 64, 64), picture(4, 96, 64)]]  # diffusers wants as many codes


@pytest.mark.parametrize("images", [None, IMAGES])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_users_call_paints_what_diffusers_paints_with_these_tokens(pipe, images, repeats):
    """Bit for bit; several prompts, pictures of each, condition images of several sizes."""
    given: dict[str, Any] = {} if images is None else {"image": images}
    expected = painted(pipe, num_images_per_prompt=repeats, **prior_of(pipe, images))
    fast = accelerate(pipe, arsd.SJD(window=16))
    found = painted(pipe, num_images_per_prompt=repeats, **given)
    assert torch.equal(found, expected) and len(found) == 2 * repeats
    assert fast.stats is not None and fast.tokens is not None
    assert fast.stats.pass_tokens == 16 and fast.tokens.shape[1] == (254 if images is None else 7)
    assert images is not None or fast.stats.forward_passes < 254


def test_what_it_returns_has_the_form_that_diffusers_gives(pipe):
    stock = pipe.generate_prior_tokens(PROMPTS, 64, 96)
    try:
        held = pipe.generate_prior_tokens(PROMPTS, 64, 96, image=IMAGES)
    except RuntimeError:  # diffusers 0.42 hands over features as transformers 5.17 wants them, which 5.23 refuses
        held = None
    with accelerate(pipe):
        ours = pipe.generate_prior_tokens(PROMPTS, 64, 96, device=torch.device("cpu"))
        ids, codes, grids = pipe.generate_prior_tokens(PROMPTS, 64, 96, image=IMAGES)
    assert ours[0].shape == stock[0].shape and ours[0].dtype == stock[0].dtype and ours[1:] == stock[1:] == (None, None)
    if held is not None:
        assert all(torch.equal(a, b) for pair in ((codes, held[1]), (grids, held[2])) for a, b in zip(*pair, strict=True))
    assert ids.shape == (2, 24) and [len(one) for one in codes] == [40, 40]
    assert [grid.tolist() for grid in grids] == [[[1, 4, 6], [1, 4, 4]], [[1, 4, 4], [1, 6, 4]]]


def test_it_is_reversible_and_belongs_to_one_pipeline(pipe, sample):
    """Neither the class nor the components are touched."""
    before = dict(vars(GlmImagePipeline)), dict(vars(pipe.vision_language_encoder))
    stock = painted(pipe)
    other = GlmImagePipeline(**pipe.components)
    fast = accelerate(pipe, "sjd:window=8")
    ours = painted(pipe)
    assert (dict(vars(GlmImagePipeline)), dict(vars(pipe.vision_language_encoder))) == before
    assert "generate_prior_tokens" not in vars(other)
    second = accelerate(pipe, "ar")
    assert torch.equal(painted(pipe), ours) and second.stats.pass_tokens == 1
    fast.undo()  # it is the second one's now
    assert pipe.generate_prior_tokens == second.generate_prior_tokens
    second.undo()
    second.undo()
    assert "generate_prior_tokens" not in vars(pipe) and torch.equal(painted(pipe), stock)
    with pytest.raises(ZeroDivisionError), accelerate(pipe):
        raise ZeroDivisionError
    assert "generate_prior_tokens" not in vars(pipe)
    assert isinstance(pipe, DiffusionPipeline) and pipe.save_pretrained(sample.folder.parent / "again") is None


def test_generators_are_neither_seeded_nor_advanced(pipe):
    with accelerate(pipe):
        generator = seeded(3)
        torch.manual_seed(5)
        before = torch.get_rng_state(), generator.get_state()
        first = pipe.generate_prior_tokens(PROMPTS, 64, 96, generator=generator)[0]
        assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(generator.get_state(), before[1])
        assert torch.equal(first, pipe.generate_prior_tokens(PROMPTS, 64, 96, generator=seeded(3))[0])
        free = []
        for _ in range(2):  # without one, torch's own is drawn from, as in diffusers
            torch.manual_seed(5)
            free.append([pipe.generate_prior_tokens(["a cat"], 320, 160, [[picture(1)]])[0] for _ in range(2)])
        assert torch.equal(free[0][0], free[1][0]) and torch.equal(free[0][1], free[1][1])
        assert not torch.equal(free[0][0], free[0][1])


def interrupted(pipe: Any, ask: Any, between: Any, at: int) -> Any:
    """``ask()``, while ``between()`` is asked in the midst of its pass number ``at``."""
    passes = 0

    def hook(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == at:
            between()

    handle = pipe.vision_language_encoder.model.language_model.register_forward_pre_hook(hook)
    try:
        return ask()
    finally:
        handle.remove()


def test_requests_that_interleave_do_not_upset_each_other(pipe):
    """Another request in the midst of one: no matter to ours, but to diffusers' own, whose model remembers positions."""

    def ask(number: int, image: Any = None) -> torch.Tensor:
        found: torch.Tensor = pipe.generate_prior_tokens([PROMPTS[number]], 64, 96, image, generator=seeded(number))[0]
        return found

    def other() -> torch.Tensor:
        pipe.generate_prior_tokens(["x" * 40], 96, 32, generator=seeded(9))
        return ask(1, [[picture(1)]])

    stock = pipe.generate_prior_tokens
    model, alone = pipe.vision_language_encoder.model, ask(0)
    assert torch.equal(ask(0), alone)
    upset = None
    try:
        upset = interrupted(pipe, lambda: ask(0), lambda: stock(["x" * 40], 96, 32), at=9)
    except Exception as error:  # positions of another length do not even fit
        upset = error
    assert isinstance(upset, Exception) or not torch.equal(upset, alone)
    accelerate(pipe, "sjd:window=8")
    kept = [getattr(model, name) for name in STATE]
    ours, theirs = ask(0), other()
    held: list[torch.Tensor] = []
    found = interrupted(pipe, lambda: ask(0), lambda: held.append(other()), at=9)
    assert torch.equal(found, ours) and torch.equal(held[0], theirs)
    assert [getattr(model, name) is one for name, one in zip(STATE, kept, strict=True)] == [True] * 3
    between = interrupted(pipe, lambda: ask(0), lambda: stock(["x" * 40], 96, 32), at=9)
    assert torch.equal(between, ours)  # diffusers' own may come between ours, too


def test_requests_of_threads_do_not_upset_each_other(pipe):
    accelerate(pipe, "sjd:window=8")
    jobs = [(["a cat"], 64, 96, None), (PROMPTS, 96, 32, None), (["x" * 40], 320, 160, [[picture(1)]])]

    def run(number: int) -> list[torch.Tensor]:
        return [pipe.generate_prior_tokens(*jobs[number], generator=seeded(3))[0]]

    alone, found = [run(n) for n in range(3)], {}
    workers = [threading.Thread(target=lambda n=n: found.update({n: run(n)})) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for n in range(3) for a, b in zip(found[n], alone[n], strict=True))


def test_no_picture_ends_before_it_is_whole(pipe):
    """A model that would rather stop is an error in diffusers; here every picture is whole."""
    with torch.no_grad():
        pipe.vision_language_encoder.lm_head.weight[published.END] = 0
        pipe.vision_language_encoder.generation_config.suppress_tokens = None
    with pytest.raises((RuntimeError, IndexError)):
        painted(pipe)
    accelerate(pipe)
    assert painted(pipe).shape == (2, 3, 64, 96)


def test_sampling_options_are_those_of_the_model_now(pipe):
    fast = accelerate(pipe, "ar")
    pipe.vision_language_encoder.generation_config.top_k = 1
    drawn = [pipe.generate_prior_tokens(PROMPTS, 64, 96, generator=seeded(n))[0] for n in range(2)]
    assert torch.equal(*drawn)
    assert pipe.generate_prior_tokens("", 64, 96)[0].shape == (1, 24) and fast.tokens.shape == (1, 254)


def test_a_smaller_model_may_draft(pipe):
    accelerate(pipe, "ar")
    plain = painted(pipe)
    fast = accelerate(pipe, "speculative:drafter=draft-model,window=5", drafter=pipe.vision_language_encoder)
    assert torch.equal(painted(pipe), plain) and fast.stats.forward_passes == -(-254 // 5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda pipe: accelerate(pipe.vae), "accelerate takes diffusers' GlmImagePipeline, not AutoencoderKL"),
        (lambda pipe: accelerate(pipe, "fastest"), "unknown decoder"),
        (lambda pipe: accelerate(pipe, 3), "decoder must be a decoding strategy"),
        (lambda pipe: accelerate(pipe, "eagle").pipe("a", **SIZE), "drafter"),
        (lambda pipe: accelerate(pipe).pipe("a", height=64), "give height and width"),
        (lambda pipe: accelerate(pipe).pipe("a", image=["cat.png"], **SIZE), "PIL pictures"),
    ],
)
def test_mistakes_are_answered_in_one_line(pipe, make, says):
    with pytest.raises(ArsdError) as error:
        make(pipe)
    one_clear_line(error.value, says)
