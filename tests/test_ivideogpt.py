"""iVideoGPT: logits and clips are those of independent networks, decoding is lossless, every sequence is a whole clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_ivideogpt as reference
import reference_llama
import torch
from reference_ivideogpt import CHANGES, CODES, EACH, GRID, SCF, SDF, SIZE
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import arsd
from arsd.decoding.laws import LawConfig, Laws
from arsd.errors import ArsdError, InputError
from arsd.models.ivideogpt import ContextVolume
from arsd.pipelines.ivideogpt import IVideoGPTPipeline

FRAMES = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """By the number of context pictures."""
    root = tmp_path_factory.mktemp("ivideogpt")
    for context in (1, 2):
        reference.write_folder(root / str(context), context)
    return {context: root / str(context) for context in (1, 2)}


@pytest.fixture(scope="module")
def pipes(folders) -> dict[int, Any]:
    made = {n: IVideoGPTPipeline.from_pretrained(folders[n], dtype=torch.float64, num_frames=FRAMES) for n in folders}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def clip(count: int, frames: int, seed: int = 1) -> Tensor:
    """[count, frames, 3, SIZE, SIZE] in [0, 1]."""
    return torch.rand(count, frames, 3, SIZE, SIZE, generator=seeded(seed), dtype=torch.float64)


def made(pipe: Any, decoder: str = "ar", count: int = 2, seed: int = 3, **options: Any) -> Any:
    frames = options.pop("frames", None)
    frames = clip(count, pipe.vq.context_length) if frames is None else frames
    return pipe(frames=frames, decoder=decoder, generator=seeded(seed), **{"output_type": "latent"} | options)


def legal(tokens: list[int], context: int, frames: int = FRAMES) -> bool:
    """Token by token, by upstream's rules."""
    allowed: list[range] = []
    for n in range(context):
        allowed += ([range(SCF, SCF + 1)] if n else []) + [range(CODES)] * GRID**2
    for _ in range(frames - context):
        allowed += [range(SDF, SDF + 1)] + [range(CODES, CODES + CHANGES)] * EACH
    return len(tokens) == len(allowed) and all(token in one for token, one in zip(tokens, allowed, strict=True))


# -------------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_layout_is_upstreams(context):
    """[codes, mark, codes ...], and then a mark and 16 codes for each later picture."""
    raster = ContextVolume(context + 2, context)
    tokens = [*[7] * 256, *[16384, *[7] * 256] * (context - 1), *[16385, *[8192] * 16] * 2]
    assert raster.num_tokens == len(tokens) == 257 * context - 1 + 2 * 17 and raster.vocab == 16386
    assert raster.forced == {n: t for n, t in enumerate(tokens) if t >= 16384}
    codes = torch.tensor([[t for t in tokens if t < 16384]])
    assert raster.from_codes(codes)[0].tolist() == tokens
    assert torch.equal(raster.to_codes(torch.tensor([tokens])), codes)
    assert raster.from_codes(codes[:, :-16])[0].tolist() == tokens[:-17]
    beginnings = [n for n in range(raster.num_tokens + 1) if raster.begins(n)]
    assert beginnings == [257 * context - 1, 257 * context - 1 + 17]
    law = Laws(LawConfig(), raster.grammar())(torch.zeros(1, 1, len(tokens), 16386), torch.arange(len(tokens))[None])
    support = (law.probs[0] > 0).sum(-1).tolist()
    assert support == [1 if t >= 16384 else 8192 for t in tokens]
    assert bool((law.probs[0].argmax(-1)[-16:] == 8192).all())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: r.to_codes(torch.zeros(1, 5).long()), "tokens must be [B, 547]"),
        (lambda r: r.to_codes(torch.ones(1, 547).long()), "behind the context have codes from 8192"),
        (lambda r: r.to_codes(torch.full((1, 547), 9000)), "context pictures have codes from 0 to 8191"),
        (lambda r: r.from_codes(torch.zeros(1, 256).long()), "codes must be [B, 512 + up to 2 * 16]"),
        (lambda r: r.from_codes(torch.zeros(1, 512 + 48).long()), "codes must be"),
        (lambda r: r.from_codes(torch.zeros(1, 2, 16, 16).long()), "codes must be"),
    ],
)
def test_what_is_no_clip_of_this_layout_is_refused(call, says):
    with pytest.raises(InputError) as error:
        call(ContextVolume(4))
    one_clear_line(error.value, says)


# -------------------------------------------------------------------------------------------------------------- the logits


@pytest.mark.parametrize("context", [1, 2])
def test_logits_are_the_published_ones_however_long_the_passes_are(folders, context):
    """Of tokens behind given ones, in float32, within 1e-5 of an independent forward in float64."""
    pipe = IVideoGPTPipeline.from_pretrained(folders[context], num_frames=FRAMES)
    tokens = made(pipe).tokens
    state = reference_llama.llama_state(SDF + 1, 32, 2, 2, 2, 16, 48, qk_norm=False)
    first = int(tokens.shape[1] - (FRAMES - context) * (1 + EACH))
    want = [reference_llama.logits(state, row, 2, 2, theta=1e4, eps=1e-6)[first - 1 : -1] for row in tokens]
    assert torch.stack(want).std() > 0.5
    conditions = pipe.encode_inputs(given=tokens[:, :first])
    for width in (1, 3, 8):
        target, found = pipe.target_maker(conditions)(width, 2), []
        with torch.inference_mode():
            target.prefill([-target.unread] * 2, width)
            for start in range(first, tokens.shape[1], width):
                lengths = torch.full((2,), start)
                fed = torch.nn.functional.pad(tokens, (1, width))[:, start : start + width]
                for junk in (True, False):
                    target.rollback(lengths)
                    logits = target.forward((fed + 5 * junk) % CODES if junk else fed, lengths, lengths.tolist())
                found.append(logits)
        part = torch.cat(found, dim=2)[0, :, : tokens.shape[1] - first]
        torch.testing.assert_close(part.double(), torch.stack(want), atol=1e-5, rtol=0)


def test_greedy_clips_are_those_of_transformers(pipes, folders):
    """Token for token, as long as its model, which nothing keeps from it, writes legal tokens."""
    pipe = pipes[2]
    out = made(pipe, "sjd:window=8", temperature=0)
    first = 2 * (GRID**2 + 1)  # with the first mark
    told = {"do_sample": False, "max_new_tokens": EACH, "pad_token_id": 50256, "eos_token_id": None}
    allowed = list(range(CODES, CODES + CHANGES))
    expected = pipe.transformer.generate(out.tokens[:, :first], prefix_allowed_tokens_fn=lambda *_: allowed, **told)
    assert torch.equal(expected, out.tokens[:, : first + EACH])
    assert torch.equal(made(pipe, "ar", temperature=0).tokens, out.tokens)


# ------------------------------------------------------------------------------------------------- seed-exact, whole clips


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_sjd_gives_the_tokens_of_plain_ar(pipes, context, window):
    pipe = pipes[context]
    plain = made(pipe)
    total = (FRAMES - context) * (1 + EACH)
    for init in ("uniform", "above", "previous-frame"):
        out = made(pipe, f"sjd:window={window},init={init}")
        assert torch.equal(out.tokens, plain.tokens) and out.stats.tokens == [total] * 2
        assert out.stats.forward_passes < plain.stats.forward_passes == total


LOSSY = ("sjd:window=8,acceptance=cool-sd:delta=1", "sjd:window=8,acceptance=lantern:k=4", "sjd:window=8,acceptance=grouped")
EXACT = ("sjd:window=7,coupling=maximal", "sjd:window=7,coupling=independent", "prompt-lookup", "ar:pass_tokens=8")


@pytest.mark.parametrize("decoder", EXACT + LOSSY)
def test_every_sequence_is_a_whole_clip_whatever_the_decoder(pipes, decoder):
    for context, pipe in pipes.items():
        out = made(pipe, decoder, temperature=3.0, top_k=0)
        assert all(legal(row, context) for row in out.tokens.tolist())
        assert out.tokens[:, GRID**2 :].float().std() > 0
    assert not legal(out.tokens[0].tolist()[:-1], context) and not legal([0] * out.tokens.shape[1], context)


def test_a_smaller_llama_drafts_and_one_that_is_the_model_itself_is_always_right(folders):
    pipe = IVideoGPTPipeline.from_pretrained(folders[2], dtype=torch.float64, num_frames=FRAMES)
    plain = made(pipe)
    pipe.register_modules(drafter=pipe.transformer)
    out = made(pipe, "speculative:drafter=draft-model,window=5")
    assert torch.equal(out.tokens, plain.tokens) and out.stats.forward_passes == -(-4 * (1 + EACH) // 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**{**pipe.transformer.config.to_dict(), "num_hidden_layers": 1})
        pipe.register_modules(drafter=LlamaForCausalLM(config).eval().double())
    assert torch.equal(made(pipe, "speculative:drafter=draft-model,window=4").tokens, plain.tokens)
    assert all(legal(row, 2) for row in made(pipe, "cool-sd:draft_length=4").tokens.tolist())
    pipe.register_modules(drafter=LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "vocab_size": 40})))
    with pytest.raises(InputError) as error:
        made(pipe, "speculative:drafter=draft-model")
    one_clear_line(error.value, "a LlamaForCausalLM with the ids of the model")


def test_published_sampling_and_sizes(pipes, folders):
    out = made(pipes[2])
    assert (out.law_config.top_k, out.law_config.temperature, out.law_config.guidance_scale) == (100, 1.0, 1.0)
    assert IVideoGPTPipeline.from_pretrained(folders[2]).make_raster().frames == 16
    assert pipes[2].make_raster(num_frames=4).num_tokens == 2 * (GRID**2 + 1) - 1 + 2 * (1 + EACH)


# ---------------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.parametrize("context", [1, 2])
def test_clips_are_what_the_published_tokenizer_decodes_and_given_frames_are_kept(pipes, context):
    pipe, state = pipes[context], reference.tokenizer_state(reference.tokenizer_config(context))
    frames = clip(2, context)
    out = made(pipe, "sjd", frames=frames, output_type="pt")
    rows = [reference.encode(state, one, context) for one in frames]
    assert out.tokens[:, : len(rows[0])].tolist() == rows
    expected = torch.stack([reference.decode(state, row, context) for row in out.tokens.tolist()]).clamp(0, 1)
    torch.testing.assert_close(out.frames.double(), expected, atol=2e-6, rtol=0)
    assert out.frames.shape == (2, FRAMES, 3, SIZE, SIZE)
    assert [one["given_tokens"] for one in out.inputs] == [len(rows[0])] * 2


def test_more_frames_than_the_context_may_be_given(pipes):
    pipe = pipes[2]
    out = made(pipe, frames=clip(1, 4), count=1)
    codes = pipe.vq.encode(2 * clip(1, 4) - 1)
    assert torch.equal(out.frames[:, : codes.shape[1]], codes) and out.stats.tokens == [2 * (1 + EACH)]
    assert torch.equal(made(pipe, "sjd:window=6", frames=clip(1, 4)).tokens, out.tokens)
    assert torch.equal(made(pipe, frames=codes).tokens, out.tokens)  # given as codes


def test_frames_come_as_pictures_arrays_and_tensors(pipes):
    pipe = pipes[2]
    pixels = (clip(1, 2)[0] * 255).round().byte()
    array = pixels.permute(0, 2, 3, 1).numpy()
    from PIL import Image

    pictures = [Image.fromarray(one) for one in array]
    calls = [pictures, [pictures], array, array[None], pixels, list(np.float64(array) / 255), array / np.float32(255)]
    first = made(pipe, frames=pixels[None]).tokens
    assert all(torch.equal(made(pipe, frames=frames).tokens[:, : 2 * GRID**2], first[:, : 2 * GRID**2]) for frames in calls)
    out = made(pipe, frames=pictures, output_type="pil", num_videos_per_prompt=2)
    assert len(out.frames) == 2 and len(out.frames[0]) == FRAMES and out.frames[0][0].size == (SIZE, SIZE)
    assert not torch.equal(out.tokens[0], out.tokens[1])


def test_a_clip_does_not_depend_on_the_others_of_its_batch(pipes):
    pipe, frames = pipes[2], clip(3, 2)
    seeds = [seeded(n) for n in (5, 6, 7)]
    together = pipe(frames=frames, generator=seeds, batch_size=2, decoder="sjd:window=6", output_type="latent")
    for n in range(3):
        alone = pipe(frames=frames[n], generator=seeded(5 + n), decoder="ar", output_type="latent")
        assert torch.equal(alone.tokens[0], together.tokens[n])


def test_saved_and_loaded_again_it_makes_the_same_clip(pipes, tmp_path):
    pipes[2].save_pretrained(tmp_path / "saved")
    again = IVideoGPTPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(made(again, num_frames=None).tokens, made(pipes[2]).tokens) and again.config["num_frames"] == FRAMES
    assert again.model_hash is not None


def test_a_clip_carries_its_proof(folders, tmp_path):
    pipe = IVideoGPTPipeline.from_pretrained(folders[2], dtype=torch.float32, num_frames=4)
    out = made(pipe, "sjd:window=4", output_type="pil")
    record = pipe.record(out, 1)
    assert record["given_tokens"] == 2 * (GRID**2 + 1) - 1 and record["probe"] == pipe.arithmetic_probe(2, 4, False)
    arsd.save_webp(out.frames[1], tmp_path / "a.webp", record, pipe.frame_rate)
    found = pipe.verify(tmp_path / "a.webp")
    assert (found.result, found.given_tokens) == ("verified", record["given_tokens"]), found
    arsd.save_webp(out.frames[1], tmp_path / "b.webp", record | {"image_index": 5}, pipe.frame_rate)
    assert pipe.verify(tmp_path / "b.webp").result == "refuted"


def test_a_call_that_is_stopped_shows_what_there_is(pipes):
    for kind in ("pil", "latent"):
        out = made(pipes[2], "ar", on_round=lambda turn: True, output_type=kind)
        assert out.stats.tokens == [1, 1] and len(out.frames[0]) > 0


def test_clips_can_be_made_in_other_dtypes(folders):
    for dtype in (torch.float32, torch.bfloat16):
        pipe = IVideoGPTPipeline.from_pretrained(folders[2], dtype=dtype, num_frames=4)
        out = made(pipe, "sjd:window=4", output_type="np")
        assert out.frames.shape == (2, 4, SIZE, SIZE, 3) and np.isfinite(out.frames).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"frames": None}, "this model goes on from frames: give 2 or more"),
        ({"frames": clip(1, 1)}, "frames must be 2..5 of 6, not 1"),
        ({"frames": clip(1, FRAMES)}, "frames must be 2..5 of 6, not 6"),
        ({"frames": [clip(1, 2)[0], clip(1, 3)[0]]}, "different lengths"),
        ({"frames": torch.zeros(1, 5).long()}, "codes must be [B, 128 + up to 4 * 4]"),
        ({"frames": torch.zeros(1, 128 + 4).long()}, "behind the context have codes from 24 to 43"),
        ({"frames": torch.full((1, 128), 30)}, "context pictures have codes from 0 to 23"),
        ({"frames": torch.full((1, 128 + 16), 30)}, "something is left"),
        ({"frames": "clip.mp4"}, "frames must be pictures"),
        ({"prompt": "a robot"}, "knows no prompt"),
        ({"class_labels": 3}, "knows no class_labels"),
        ({"guidance_scale": 2.0}, "no unconditional stream"),
        ({"height": 32}, "16 x 16 pixels only"),
        ({"num_frames": 2}, "num_frames must be in 3.."),
        ({"num_frames": 1000}, "num_frames must be in 3.."),
        ({"num_frames": True}, "num_frames must be in 3.."),
        ({"num_videos_per_prompt": 0}, "at least 1"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(pipes, call, says):
    with pytest.raises(ArsdError) as error:
        pipes[2](**{"frames": clip(1, 2), "output_type": "latent"} | call)
    one_clear_line(error.value, says)
