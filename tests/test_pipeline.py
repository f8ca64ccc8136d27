"""The pipelines behave as diffusers users expect: outputs, seeds, batches, callbacks, offloading, threads, bad input.

Saving and loading are in ``test_provenance.py``.
"""

from __future__ import annotations

import random
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import (
    CAPTION_DIM,
    CONDITION_TOKENS,
    SIDE,
    TOKENS,
    VOCAB,
    class_pipeline,
    codes,
    hushed,
    one_clear_line,
    seeded,
    text_pipeline,
)

from arsd import SJD, Autoregressive
from arsd.errors import ArsdError, NonFiniteLogitsError
from arsd.pipelines import ARPipelineOutput


@pytest.fixture(scope="module")
def text():
    return hushed(text_pipeline())


@pytest.fixture(scope="module")
def labels():
    return hushed(class_pipeline())


# ---------------------------------------------------------------- outputs


def test_class_labels_give_one_picture_each(labels):
    out = labels(class_labels=[0, 3, 3], generator=seeded(0))
    assert isinstance(out, ARPipelineOutput) and len(out.images) == 3 and out.tokens.shape == (3, TOKENS)
    assert len(labels(class_labels=2).images) == len(labels(class_labels=torch.tensor([2])).images) == 1


def test_prompts_give_one_picture_each(text):
    out = text(["red apple", "dog face"], generator=seeded(0))
    assert len(out.images) == 2 and int(out.tokens.min()) >= 0 and int(out.tokens.max()) < VOCAB
    assert not torch.equal(out.tokens[0], out.tokens[1])


def test_every_output_type_has_its_shape_and_range_and_shows_one_picture(text):
    outs = {kind: text("red apple", generator=seeded(1), output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert isinstance(outs["pil"][0], Image.Image) and outs["pil"][0].size == (SIDE, SIDE) and outs["pil"][0].mode == "RGB"
    assert isinstance(outs["np"], np.ndarray) and outs["np"].shape == (1, SIDE, SIDE, 3) and outs["np"].dtype == np.float32
    assert outs["pt"].shape == (1, 3, SIDE, SIDE) and outs["pt"].is_floating_point()
    assert outs["latent"].shape == (1, 4, 4) and outs["latent"].dtype == torch.int64
    assert 0 <= outs["np"].min() < outs["np"].max() <= 1
    np.testing.assert_array_equal(outs["np"], outs["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(outs["pil"][0]), np.round(outs["np"][0] * 255).astype(np.uint8))
    pixels = text.vq.decode(outs["latent"])
    torch.testing.assert_close((pixels.clamp(-1, 1) + 1) / 2, outs["pt"])


def test_return_dict_false_gives_a_tuple_with_the_pictures(text):
    out = text("red apple", return_dict=False, generator=seeded(0))
    assert isinstance(out, tuple) and len(out) == 1 and isinstance(out[0][0], Image.Image)


def test_output_carries_figures_seeds_and_sampling(text):
    out = text("red apple", generator=seeded(0), num_images_per_prompt=2, log_probs=True, trace=True, top_k=7)
    assert out.stats.tokens == [TOKENS] * 2 and out.stats.forward_passes == len(out.trace) == text.num_timesteps
    assert out.image_indices == [0, 1] and len(set(out.seeds)) == 1
    assert out.law_config.top_k == 7 and out.law_config.guidance_scale == text.guidance_scale == 2.0
    assert out.log_probs.shape == out.entropies.shape == (2, TOKENS) and bool((out.log_probs <= 0).all())


def test_output_tokens_can_be_trained_on(labels):
    """They leave inference mode behind, or autograd refuses to save them."""
    tokens = labels(class_labels=[1], generator=seeded(0)).tokens
    model = labels.transformer
    try:
        model(model.embed_classes(torch.tensor([1])), tokens).sum().backward()
    finally:
        model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- seeds and batches


def test_one_seed_gives_one_picture_and_the_next_call_of_a_generator_another(text):
    generator = seeded(5)
    first, second = (text("red apple", generator=generator, output_type="latent").tokens for _ in range(2))
    assert torch.equal(first, codes(text, "red apple", seed=5)) and not torch.equal(first, second)


def test_without_a_generator_every_call_differs(text):
    first, second = (text("red apple", output_type="latent") for _ in range(2))
    assert first.seeds != second.seeds and not torch.equal(first.tokens, second.tokens)


def test_a_list_of_generators_gives_each_picture_as_in_a_call_of_its_own(text):
    generators = [seeded(s) for s in (3, 4, 3, 9)]
    out = text(["red apple", "dog face"], num_images_per_prompt=2, generator=generators, output_type="latent").tokens
    solo = [codes(text, p, seed=s) for p, s in zip(["red apple"] * 2 + ["dog face"] * 2, (3, 4, 3, 9), strict=True)]
    assert torch.equal(out, torch.cat(solo))


def test_one_generator_gives_different_pictures_of_one_prompt(text):
    out = codes(text, "red apple", num_images_per_prompt=3)
    assert len({tuple(row.tolist()) for row in out}) == 3
    assert torch.equal(out[:1], codes(text, "red apple"))


def test_pictures_come_prompt_by_prompt(text):
    prompts = ["red apple", "dog face"]
    out = codes(text, prompts, num_images_per_prompt=2)
    repeated = codes(text, [prompts[0], prompts[0], prompts[1], prompts[1]])
    assert torch.equal(out, repeated)


@pytest.mark.parametrize("decoder", ["ar", "sjd", "sjd:coupling=independent", "sjd:window=3,coupling=maximal"])
def test_a_call_never_touches_the_global_random_state(text, decoder):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    text("red apple", decoder=decoder, generator=seeded(0), output_type="latent")
    text("red apple", decoder=decoder, output_type="latent")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


# ---------------------------------------------------------------- conditions


def test_guidance_scale_1_runs_one_stream_and_others_change_the_picture(text, monkeypatch):
    rows = []
    original = text.transformer.lm.model.forward

    def spy(*args, **kwargs):
        rows.append(len(kwargs["inputs_embeds"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(text.transformer.lm.model, "forward", spy)
    default = codes(text, "red apple")
    assert set(rows) == {2}
    rows.clear()
    off = codes(text, "red apple", guidance_scale=1)
    assert set(rows) == {1}
    strong = codes(text, "red apple", guidance_scale=9.0)
    assert not torch.equal(default, off) and not torch.equal(default, strong)
    assert torch.equal(default, codes(text, "red apple", guidance_scale=2.0))  # the model's published scale


def test_prompt_embeds_give_what_the_prompt_gives(text):
    features, mask = text.encode_prompt(["red apple", "green pear"])
    assert features.shape == (2, CONDITION_TOKENS, CAPTION_DIM) and mask.tolist()[0][-1] == 1 and mask.tolist()[0][0] == 0
    given = codes(text, prompt_embeds=features, prompt_attention_mask=mask, num_images_per_prompt=2)
    assert torch.equal(given, codes(text, ["red apple", "green pear"], num_images_per_prompt=2))


def test_unknown_words_warn_by_name_at_the_callers_line_and_known_ones_do_not(text):
    with pytest.warns(UserWarning, match=r"zebra") as seen:
        text("red zebra", output_type="latent")
    assert "red" not in str(seen[0].message).split(":")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes(text, "Red APPLE, dog!")
    assert Path(seen[0].filename) == Path(__file__)


# ---------------------------------------------------------------- decoders


def test_the_decoder_swaps_like_a_scheduler_and_seed_exact_ones_agree():
    pipe = hushed(class_pipeline())
    assert isinstance(pipe.decoder, SJD)
    fast = pipe(class_labels=[1], generator=seeded(0))
    pipe.decoder = Autoregressive.from_config(pipe.decoder.config)
    slow = pipe(class_labels=[1], generator=seeded(0))
    assert slow.stats.forward_passes == TOKENS > fast.stats.forward_passes
    assert torch.equal(slow.tokens, fast.tokens)
    pipe.decoder = SJD.from_config(pipe.decoder.config, window=4)
    assert pipe.decoder.config["window"] == 4 and pipe.config["decoder"] == ("arsd.decoding.strategies", "SJD")
    for decoder in ("ar", "sjd:window=7", SJD(window=3, init="above"), None):
        assert torch.equal(codes(pipe, class_labels=[1], decoder=decoder), slow.tokens)


def test_progress_advances_by_committed_tokens_to_exactly_all_of_them(text, monkeypatch):
    updates, totals = [], []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            updates.append(count)

    monkeypatch.setattr(text, "progress_bar", lambda total: totals.append(total) or Bar())
    out = text(["red apple", "dog face", "pear"], generator=seeded(0), output_type="latent")
    assert totals == [3 * TOKENS] == [sum(updates)] and len(updates) == out.stats.forward_passes and min(updates) > 0
    text("pear", progress=False, output_type="latent")
    assert len(totals) == 1


def test_the_callback_sees_every_pass_and_the_tokens_so_far(text):
    seen = []

    def callback(pipe, step, done, tensors):
        assert pipe is text and set(tensors) == {"tokens"}
        seen.append((step, done, tensors["tokens"].clone()))
        return tensors

    out = text(["red apple", "dog face"], generator=seeded(0), callback_on_step_end=callback, output_type="latent")
    assert [step for step, _, _ in seen] == list(range(out.stats.forward_passes))
    done = [d for _, d, _ in seen]
    assert done == sorted(done) and done[-1] == 2 * TOKENS and torch.equal(seen[-1][2], out.tokens)
    first = seen[0][2]  # one pass in, at least the first token of each row is final
    assert torch.equal(first[:, 0], out.tokens[:, 0])


def test_tokens_kept_by_a_callback_do_not_change_later(text):
    kept, copies = [], []

    def callback(pipe, step, done, tensors):
        kept.append(tensors["tokens"])
        copies.append(tensors["tokens"].clone())
        return {}

    codes(text, "red apple", callback_on_step_end=callback)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_a_callback_gets_only_the_tensors_that_it_asked_for(text):
    names = []
    options = {"callback_on_step_end": lambda p, i, t, x: names.append(set(x)) or {}}
    codes(text, "pear", callback_on_step_end_tensor_inputs=[], **options)
    assert names and set().union(*names) == set()


def test_interrupt_stops_after_the_present_pass_and_the_next_call_is_whole(text):
    def callback(pipe, step, done, tensors):
        pipe._interrupt = step == 2
        return tensors

    out = text("red apple", generator=seeded(0), decoder="ar", callback_on_step_end=callback)
    whole = text("red apple", generator=seeded(0), decoder="ar")
    assert out.stats.forward_passes == 3 and out.stats.tokens == [3] and len(out.images) == 1
    assert torch.equal(out.tokens[:, :3], whole.tokens[:, :3]) and whole.stats.tokens == [TOKENS]


# ---------------------------------------------------------------- placement and threads


@pytest.mark.parametrize("kind", ["class", "text"])
def test_group_offloading_keeps_the_tokens(kind):
    pipe, whole = (hushed(class_pipeline() if kind == "class" else text_pipeline()) for _ in range(2))
    given = {"class_labels": [1, 2]} if kind == "class" else {"prompt": ["red apple", "pear"]}
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(codes(pipe, **given), codes(whole, **given))
    other = hushed(class_pipeline() if kind == "class" else text_pipeline())
    other.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    for _ in range(2):
        assert torch.equal(codes(other, **given), codes(whole, **given))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what happens without an accelerator")
def test_model_offloading_needs_an_accelerator():
    with pytest.raises(RuntimeError, match="requires accelerator"):
        class_pipeline().enable_model_cpu_offload()


def test_two_threads_on_one_pipeline_get_what_they_get_alone(text):
    jobs = [("red apple", 1, "sjd"), ("dog face", 2, "ar"), ("blue heart", 3, "sjd:coupling=maximal")]
    alone = [codes(text, p, seed=s, decoder=d) for p, s, d in jobs]
    together: list = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(i):
        prompt, seed, decoder = jobs[i]
        barrier.wait()
        together[i] = [codes(text, prompt, seed=seed, decoder=decoder) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, alone[i]) for i in range(len(jobs)) for one in together[i])


def test_a_call_in_another_thread_does_not_disturb_the_step_count_of_this_one(text):
    steps = []

    def callback(pipe, step, done, tensors):
        steps.append(step)
        if step == 2:  # another thread runs a whole call in the middle of this pass
            other = threading.Thread(target=codes, args=(text, "dog face"))
            other.start()
            other.join()
        return tensors

    codes(text, "red apple", decoder="ar", callback_on_step_end=callback)
    assert steps == list(range(TOKENS))


# ---------------------------------------------------------------- bad input: one clear line each

EMBEDS, MASK = torch.zeros(1, CONDITION_TOKENS, CAPTION_DIM), torch.ones(1, CONDITION_TOKENS)
BAD_CALLS = {
    "empty prompt": ({"prompt": " "}, "the prompt is empty"),
    "empty list": ({"prompt": []}, "the prompt is empty"),
    "one empty prompt of two": ({"prompt": ["red apple", ""]}, "the prompt is empty"),
    "prompt is a number": ({"prompt": 3}, "prompt"),
    "nothing": ({"prompt": None}, "exactly one of prompt, class_labels"),
    "prompt and labels": ({"class_labels": 1}, "exactly one of prompt, class_labels"),
    "labels for a text model": ({"prompt": None, "class_labels": 1}, "text-conditional: give a prompt"),
    "embeds without mask": ({"prompt": None, "prompt_embeds": EMBEDS}, "prompt_attention_mask"),
    "embeds too short": (
        {"prompt": None, "prompt_embeds": EMBEDS[:, 1:], "prompt_attention_mask": MASK[:, 1:]},
        "[B, 6, 32]",
    ),
    "embeds too wide": (
        {"prompt": None, "prompt_embeds": EMBEDS.repeat(1, 1, 2), "prompt_attention_mask": MASK},
        "[B, 6, 32]",
    ),
    "no pictures": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, not 0"),
    "half a picture": ({"num_images_per_prompt": 1.5}, "num_images_per_prompt"),
    "wrong height": ({"height": 9}, "8 x 8 pixels only"),
    "wrong width": ({"width": 16}, "8 x 8 pixels only"),
    "output type": ({"output_type": "jpg"}, "one of pil, np, pt, latent, not 'jpg'"),
    "decoder name": ({"decoder": "warp"}, "unknown decoder 'warp': choose from ar, sjd"),
    "decoder option": ({"decoder": "sjd:speed=9"}, "sjd has no option 'speed=9'"),
    "decoder window": ({"decoder": "sjd:window=-3"}, "window must be a whole number >= 1 or auto, not -3"),
    "decoder coupling": ({"decoder": "sjd:coupling=glue"}, "unknown coupling 'glue'"),
    "decoder object": ({"decoder": 3}, "decoder must be a decoding strategy"),
    "top_k": ({"top_k": -1}, "top_k must be a whole number >= 0"),
    "top_k infinite": ({"top_k": float("inf")}, "top_k must be a whole number >= 0"),
    "top_p": ({"top_p": 0}, "top_p must lie in (0, 1], not 0"),
    "temperature": ({"temperature": -1}, "temperature must be >= 0, not -1"),
    "temperature nan": ({"temperature": float("nan")}, "temperature must be >= 0, not nan"),
    "guidance": ({"guidance_scale": -0.5}, "guidance_scale must be >= 0"),
    "guidance infinite": ({"guidance_scale": float("inf")}, "guidance_scale"),
    "too few generators": ({"generator": [seeded(0)], "num_images_per_prompt": 2}, "got 1 generators for 2 pictures"),
    "generator is a seed": ({"generator": 7}, "generator"),
    "callback tensor": ({"callback_on_step_end_tensor_inputs": ["latents"]}, "can hold ['tokens']"),
}
BAD_LABELS = {
    "too high": ({"class_labels": 6}, "class labels must lie in 0..5"),
    "negative": ({"class_labels": [0, -1]}, "class labels must lie in 0..5"),
    "none": ({"class_labels": []}, "class"),
    "a fraction": ({"class_labels": 1.5}, "class"),
    "a word": ({"class_labels": "cat"}, "class"),
    "a prompt": ({"prompt": "red apple"}, "this model needs class_labels"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_one_clear_line(text, case):
    options, says = BAD_CALLS[case]
    with pytest.raises(ArsdError) as error:
        text(**{"prompt": "red apple", **options})
    one_clear_line(error.value, says)


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_class_labels_are_one_clear_line(labels, case):
    options, says = BAD_LABELS[case]
    with pytest.raises(ArsdError) as error:
        labels(**options)
    one_clear_line(error.value, says)


def test_broken_weights_say_so_and_hand_over_the_tokens_before(text):
    pipe = hushed(class_pipeline(Autoregressive()))
    whole = codes(pipe, class_labels=[1, 2])
    pipe.transformer.lm.model.rotary_emb.cos[9:] = torch.nan  # everything up to token 8 is computed as before
    with pytest.raises(NonFiniteLogitsError) as error:
        codes(pipe, class_labels=[1, 2])
    one_clear_line(error.value, "NaN or infinite logits in picture 0 after 9 tokens")
    assert error.value.lengths == [9, 9] and torch.equal(error.value.tokens[:, :9], whole[:, :9])
