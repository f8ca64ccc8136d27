"""Every family whose codes are words: published files load as they are, compute what was published, decode and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_vqgan
import torch
from families import CODES, KINDS, PROMPTS
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor

import arsd
from arsd.decoding.laws import LawConfig, Laws
from arsd.errors import ArsdError
from arsd.models.lumina import trained_sizes
from arsd.models.token_images import CodeHead
from arsd.pipelines.families import FAMILIES, pipeline_for, recognise
from arsd.pipelines.outputs import Conditions, to_output
from arsd.shapes import study_shape

CHAMELEONS = [kind for kind in KINDS if kind.startswith("lumina") or kind in ("anole", "anole-meta", "chameleon")]
pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def drawn(pipe: Any, sample: Any, decoder: str = "ar", seed: int = 3, prompts: Any = PROMPTS, **options: Any) -> Any:
    height, width = sample.size
    size = {"height": height, "width": width} | options
    return pipe(prompts, generator=seeded(seed), decoder=decoder, **{"output_type": "latent"} | size)


def stream_ids(conditions: Conditions) -> list[list[list[int]]]:
    """[S][M] the model's own ids of each stream, padding left out."""
    assert conditions.ids is not None and conditions.padding is not None
    return [
        [[n for n, hidden in zip(row, pad, strict=True) if not hidden] for row, pad in zip(*part, strict=True)]
        for part in zip(conditions.ids.tolist(), conditions.padding.tolist(), strict=True)
    ]


def forced_logits(pipe: Any, conditions: Conditions, tokens: Tensor, width: int, junk: bool = False) -> Tensor:
    """[S, M, N, V] of given pictures, in passes of ``width`` tokens; with ``junk`` every pass is done twice, junk first."""
    count, total = tokens.shape
    target = pipe.target_maker(conditions)(width, count)
    found = []
    with torch.inference_mode():
        target.prefill([-target.unread] * count, width)
        for start in range(0, total, width):
            lengths = torch.full((count,), start)
            fed = torch.nn.functional.pad(tokens, (1, width))[:, start : start + width]
            if junk:
                target.rollback(lengths)
                target.forward((fed + 5) % CODES, lengths, lengths.tolist())
            target.rollback(lengths)
            found.append(target.forward(fed, lengths, lengths.tolist()))
    return torch.cat(found, dim=2)[:, :, :total]


# ------------------------------------------------------------------------------------------------------- logits, the law


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_both_streams_are_the_published_ones_however_long_the_passes_are(samples, kind):
    """Prompts and streams of different lengths in one batch; float32 within 1e-5 of an independent forward in float64."""
    sample = samples.sample(kind)
    pipe = sample.load(dtype=torch.float32)
    tokens = drawn(pipe, sample).tokens
    conditions = pipe.encode_inputs(PROMPTS, height=sample.size[0], width=sample.size[1])
    lengths = (~conditions.padding).sum(-1)
    assert lengths[0, 0] != lengths[0, 1]
    code = [n for n in range(tokens.shape[1]) if n not in conditions.raster.forced]
    pictures = pipe.protocol.local_ids[tokens].tolist()
    streams = [[*zip(stream, pictures, strict=True)] for stream in stream_ids(conditions)]
    expected = [torch.stack([sample.logits(*row) for row in stream]) for stream in streams]
    want = torch.stack(expected)[:, :, code]
    assert want.std() > 0.5
    for width in (1, 3, 8, tokens.shape[1]):
        found = forced_logits(pipe, conditions, tokens, width)[:, :, code, :CODES]
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_fed_and_rolled_back_leaves_no_trace(samples, kind):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    tokens = drawn(pipe, sample).tokens
    conditions = pipe.encode_inputs(PROMPTS, height=sample.size[0], width=sample.size[1])
    clean, after = (forced_logits(pipe, conditions, tokens, 4, junk) for junk in (False, True))
    assert torch.equal(clean, after)


def test_the_rows_of_the_codes_are_what_the_whole_head_says_of_them():
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(2, 3, 8, generator=seeded(1))
    for ids in (torch.arange(7, 19), torch.tensor([3, 9, 4, 40])):
        found = CodeHead(head, ids, 2, torch.device("cpu"))(hidden)
        torch.testing.assert_close(found[..., :-2], head(hidden)[..., ids])
        assert found.shape[-1] == len(ids) + 2 and not found[..., -2:].any()
    assert CodeHead(head, torch.arange(7, 19), 0, torch.device("cpu")).rows.data_ptr() == head.weight[7].data_ptr()  # a view


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_both_streams_are_upstreams(samples, kind):
    """Word by word, from the published templates."""
    pipe, sample = samples.pipe(kind), samples.sample(kind)
    for text in ("a cat", "Gala: 10\n apples"):
        found = pipe.protocol.prompt_ids(text, *sample.size)
        wanted = sample.streams(text, sample.size)
        assert (found, pipe.protocol.null_ids(*sample.size, found)) == wanted
        conditions = pipe.encode_inputs([text], **size_of(sample))
        assert [stream[0] for stream in stream_ids(conditions)] == list(wanted)


@pytest.mark.parametrize(("side", "count"), [(512, 49), (768, 73), (1024, 97)])
def test_trained_sizes_keep_the_area_and_the_ratio(side, count):
    """As many as upstream's own list has, which these were once compared with one by one."""
    found = trained_sizes(side)
    assert len(found) == len(set(found)) == count and (side, side) in found
    for height, width in found:
        assert height % 32 == width % 32 == 0 and max(height, width) <= 4 * min(height, width)
        assert height * width <= side * side
    assert {(side // 2, 2 * side), (2 * side, side // 2)} <= set(found)


# ----------------------------------------------------------------------------------------------------- seed-exact, legal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_sjd_gives_the_tokens_of_plain_ar(samples, kind, window):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    plain = drawn(pipe, sample, guidance_scale=2.0)
    for init in ("uniform", "above"):
        out = drawn(pipe, sample, f"sjd:window={window},init={init}", guidance_scale=2.0)
        assert torch.equal(out.tokens, plain.tokens)
        assert out.stats.forward_passes < plain.stats.forward_passes == plain.tokens.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_there_is_one_stream(samples, kind):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    assert len(pipe.encode_inputs(PROMPTS, guided=False, **size_of(sample)).condition) == 1
    plain = drawn(pipe, sample, guidance_scale=1.0)
    assert torch.equal(plain.tokens, drawn(pipe, sample, "sjd:window=7", guidance_scale=1.0).tokens)
    assert not torch.equal(plain.tokens, drawn(pipe, sample, guidance_scale=3.0).tokens)


@pytest.mark.parametrize("kind", ["lumina-mgpt", "lumina-mgpt-2", "anole"])
def test_in_the_dtype_of_the_files_pass_shapes_decide(samples, kind):
    """bfloat16, as published: plain AR in passes of the same shape gives SJD's tokens, where the kernels let it."""
    sample = samples.sample(kind)
    pipe = sample.load(dtype=None)
    assert pipe.transformer.dtype == torch.bfloat16
    plain = drawn(pipe, sample, "ar:pass_tokens=16")
    target = pipe.target_maker(pipe.encode_inputs([PROMPTS[0]] * 2, **size_of(sample)))(16, 2)
    if not study_shape(target, plain.tokens[0], 16, [5, 12]).holds:
        pytest.skip("passes of this shape round differently in different places on this machine")
    for decoder in ("sjd:window=16", "sjd:window=5,pass_tokens=16"):
        assert torch.equal(drawn(pipe, sample, decoder).tokens, plain.tokens)


@pytest.mark.parametrize("kind", ["lumina-mgpt", "anole"])
def test_a_picture_does_not_depend_on_the_others_of_its_batch(samples, kind):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    prompts, seeds = [*PROMPTS, "x" * 90], [seeded(n) for n in (5, 6, 7)]
    together = pipe(prompts, generator=seeds, batch_size=2, decoder="sjd:window=6", output_type="latent", **size_of(sample))
    for n, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(5 + n), decoder="ar", output_type="latent", **size_of(sample))
        assert torch.equal(alone.tokens[0], together.tokens[n])


def size_of(sample: Any) -> dict[str, int]:
    return {"height": sample.size[0], "width": sample.size[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_sequence_is_a_whole_picture_by_upstreams_rules(samples, kind):
    """Whatever the size, the window, the rule or the batch, and for rules that change the law."""
    pipe, sample = samples.pipe(kind), samples.sample(kind)
    for size in sample.sizes or (sample.size,):
        legal_whatever_the_decoder(pipe, sample, size, set() if sample.sizes and size[0] != 64 else RULES_OF_CODES)


RULES_OF_CODES = {"sjd:window=8,acceptance=lantern:k=4", "sjd:window=8,acceptance=grouped"}


def legal_whatever_the_decoder(pipe: Any, sample: Any, size: tuple[int, int], more: set[str]) -> None:
    few = {"ar", "sjd:window=3", "sjd:window=40", "sjd:window=7,coupling=maximal", "sjd:window=8,acceptance=cool-sd:delta=1"}
    for decoder in sorted(few | more):
        out = drawn(pipe, sample, decoder, height=size[0], width=size[1], temperature=2.0, top_p=1.0, top_k=0)
        for row in pipe.protocol.local_ids[out.tokens].tolist():
            assert sample.legal(row, size), (decoder, size)
        assert out.images.shape[1:] == (size[0] // pipe.protocol.factor, size[1] // pipe.protocol.factor)
        assert int(out.images.max()) < CODES


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_what_the_published_image_tokenizer_decodes(samples, kind):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    out = drawn(pipe, sample, "sjd", output_type="pt")
    codes = conditions_raster(pipe, sample).to_codes(out.tokens)
    expected = (sample.decode(codes).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(out.images.double(), expected.double(), atol=2e-6, rtol=0)
    assert out.images.shape == (2, 3, *sample.size)


def conditions_raster(pipe: Any, sample: Any) -> Any:
    return pipe.make_raster(*sample.size)


# ---------------------------------------------------------------------------------------------- round trip, verification


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again_it_paints_the_same_picture(samples, kind, tmp_path):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = arsd.AutoARPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    first, second = (drawn(p, sample, output_type="pil") for p in (pipe, again))
    assert torch.equal(first.tokens, second.tokens)
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
    assert again.config["image_size"] == pipe.config["image_size"] and again.sampling == pipe.sampling


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_verified_and_a_forged_one_refuted(samples, kind, tmp_path):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    out = drawn(pipe, sample, "sjd:window=6", output_type="pil")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        arsd.save_png(out.images[i], path, pipe.record(out, i))
    assert [r.result for r in pipe.verify(paths)] == ["verified", "verified"]
    forged = pipe.record(out, 0) | {"noise_seed": 9}
    arsd.save_png(out.images[0], tmp_path / "forged.png", forged)
    assert pipe.verify(tmp_path / "forged.png").result == "refuted"
    sizes: list[dict[str, Any]] = [{"height": 33}, {"width": "x"}, {"height": 320}, {"given_tokens": 10_000}]
    for changed in [*sizes, {"slots": -3}, {"slots": 10**12}, {"slots": "many"}]:
        arsd.save_png(out.images[0], tmp_path / "odd.png", pipe.record(out, 0) | changed, overwrite=True)
        assert pipe.verify(tmp_path / "odd.png").result in ("refuted", "unknown")


# ------------------------------------------------------------------------------------------------ recognition, the table


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_recognised_by_its_content(samples, kind):
    sample = samples.sample(kind)
    assert recognise(sample.folder) == kind
    assert type(samples.pipe(kind)) is pipeline_for(kind)
    assert {family.kind for family in FAMILIES} >= set(KINDS)


def test_the_other_pipelines_refuse_a_folder_in_one_line(samples):
    with pytest.raises(ArsdError) as error:
        arsd.AnolePipeline.from_pretrained(samples.sample("lumina-mgpt").folder)
    one_clear_line(error.value, "lumina-mgpt weights, not those of AnolePipeline")
    with pytest.raises(ArsdError) as error:
        arsd.LuminaMGPTPipeline.from_pretrained(samples.sample("anole").folder)
    one_clear_line(error.value, "anole weights, not those of LuminaMGPTPipeline")


def test_a_missing_or_wrong_image_tokenizer_is_named(samples, tmp_path):
    import published_chameleon as published

    published.write_lumina(tmp_path / "bare")
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(tmp_path / "bare")
    one_clear_line(error.value, "vq=")
    torch.save({"state_dict": reference_vqgan.vqgan_state(mult=(1, 1), blocks=1, codes=16)}, tmp_path / "small.ckpt")
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(tmp_path / "bare", vq=tmp_path / "small.ckpt")
    one_clear_line(error.value, "32 codes, the image tokenizer 16")
    torch.save({"state_dict": samples.sample("lumina-mgpt").parts["vq"]}, tmp_path / "elsewhere.ckpt")
    pipe: Any = arsd.AutoARPipeline.from_pretrained(tmp_path / "bare", vq=tmp_path / "elsewhere.ckpt")
    assert pipe.model_hash is not None
    torch.save(
        {"state_dict": reference_vqgan.vqgan_state(**{"codes": 32, "mult": (1, 1), "blocks": 1})}, tmp_path / "f2.ckpt"
    )
    other: Any = arsd.AutoARPipeline.from_pretrained(tmp_path / "bare", vq=tmp_path / "f2.ckpt")
    assert other.model_hash != pipe.model_hash  # another image tokenizer is another model


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "no model_index.json"),
        ({"a.pt": b"x", "b.pt": b"y"}, "a.pt, b.pt"),
        ({"model_index.json": b"{"}, "damaged"),
        ({"model_index.json": b'{"_class_name": "Nobody"}'}, "needs the pipeline 'Nobody'"),
        ({"config.json": b'{"model_type": "llama"}'}, "no model_index.json"),
    ],
)
def test_what_is_nothing_is_said_in_one_line(tmp_path, content, says):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(tmp_path)
    one_clear_line(error.value, says)


def test_models_lists_the_families_and_tells_what_a_path_is(samples, command):
    status, out, _ = command("models")
    assert status == 0 and all(family.name in out and family.tested in out for family in FAMILIES)
    sample: Any = samples.sample("anole")
    status, out, _ = command("models", sample.folder, "emoji-128")
    assert status == 0 and "AnolePipeline" in out and "LlamaGenPipeline" in out
    status, _, err = command("models", Path("nowhere"))
    assert status == 2 and len(err) == 1


def test_the_command_line_paints_and_verifies_with_a_published_folder(samples, command, tmp_path):
    sample = samples.sample("lumina-mgpt")
    size = ("--height", 64, "--width", 96, "--dtype", "float32")
    words = ("generate", "a cat", "--model", sample.folder, "--out", tmp_path, *size, "--compare")
    status, out, _ = command(*words)
    assert status == 0 and "same tokens" in out
    status, out, _ = command("verify", *tmp_path.glob("*.png"))
    assert status == 0 and "verified" in out


def test_where_the_codes_of_lumina_2_begin_is_read_from_the_configuration(tmp_path):
    """Without it, they begin at upstream's constant."""
    import published_chameleon as published

    vq = reference_vqgan.movq_state(ch=32, mult=(1, 1), blocks=1, codes=CODES)
    published.write_lumina2(tmp_path / "moved", first_code=4000, vq_state=vq)
    moved: Any = arsd.AutoARPipeline.from_pretrained(tmp_path / "moved")
    assert moved.protocol.code_ids.tolist() == list(range(4000, 4000 + CODES))
    config = moved.transformer.config
    config.vocabulary_map = {word: n for word, n in config.vocabulary_map.items() if not word.startswith("<MOVQGAN")}
    again = arsd.LuminaMGPTPipeline(moved.transformer, moved.vq, moved.tokenizer)
    assert again.protocol.code_ids[0] == 155000


# ----------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("kind", "call", "says"),
    [
        ("lumina-mgpt", {"prompt": " "}, "empty"),
        ("lumina-mgpt", {"prompt": []}, "empty"),
        ("lumina-mgpt", {}, "give a prompt"),
        ("lumina-mgpt", {"class_labels": 3}, "leave out class_labels"),
        ("lumina-mgpt", {"prompt": "a", "height": 65}, "multiples of 32"),
        ("lumina-mgpt", {"prompt": "a", "height": -32}, "pixels"),
        ("lumina-mgpt", {"prompt": "a", "width": 32 * 99}, "multiples of 32"),
        ("lumina-mgpt", {"prompt": "a", "prompt_images": torch.zeros(1, 3, 64, 64)}, "hold no pictures"),
        ("anole", {"prompt": "a", "height": 96}, "64 x 64 pixels only"),
        ("anole", {"prompt": "<image> and <image>", "prompt_images": torch.zeros(1, 3, 64, 64)}, "speaks of 2 pictures"),
        ("anole", {"prompt": "a", "num_images_per_prompt": 0}, "at least 1"),
        ("anole", {"prompt": "a", "decoder": "fastest"}, "unknown decoder"),
        ("anole", {"prompt": "a", "guidance_scale": -1.0}, "guidance_scale"),
        ("anole", {"prompt": "a", "image_guidance_scale": float("nan")}, "image_guidance_scale"),
        ("anole", {"prompt": "a", "image": "cat.png"}, "image"),
        ("anole", {"prompt": "a", "image": torch.zeros(1, 3, 64, 64), "strength": 0}, "strength"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(samples, kind, call, says):
    with pytest.raises(ArsdError) as error:
        samples.pipe(kind)(**call)
    one_clear_line(error.value, says)


def test_pictures_of_a_prompt_make_a_third_stream(samples, tmp_path):
    """The law of the first token is u + 1.2 (i - u) + 3 (c - i), with the streams that upstream feeds."""
    pipe, sample = samples.pipe("anole"), samples.sample("anole")
    images = torch.rand(2, 3, 64, 64, generator=seeded(4), dtype=torch.float64)
    codes = [pipe.vq.encode(2 * image[None] - 1)[0].flatten() for image in images]
    begin, end, turn = (pipe.tokenizer.get_vocab()[word] for word in ("<racm3:break>", "<eoss>", "<reserved08706>"))
    pictures = [[begin, *pipe.protocol.code_ids[row].tolist(), end] for row in codes]

    def words(text: str) -> list[int]:
        return pipe.tokenizer.encode(text, add_special_tokens=False)

    full = [0, *pictures[0], *words("like "), *pictures[1], *words(" in blue"), turn, begin]
    streams = [full, [0, *pictures[0], *pictures[1], begin], [0, begin]]
    c, i, u = (sample.logits(ids, [0])[0] for ids in streams)
    expected = torch.log_softmax(u + 1.2 * (i - u) + 3.0 * (c - i), -1)
    call = {"prompt": "like <image> in blue", "prompt_images": images, "top_p": 1.0}
    out = pipe(**call, generator=seeded(1), decoder="sjd:window=4", log_probs=True)
    chosen = expected[out.tokens[0, 0]]
    torch.testing.assert_close(out.log_probs[0, 0].double(), chosen, atol=1e-5, rtol=0)
    plain = pipe(**call, generator=seeded(1), decoder="ar")
    assert torch.equal(out.tokens, plain.tokens)
    arsd.save_png(plain.images[0], tmp_path / "a.png", pipe.record(plain, 0))
    found = pipe.verify(tmp_path / "a.png")  # the record does not hold the pictures of the prompt
    assert found.result == "unknown" and "prompt held pictures" in found.reason


def test_the_law_of_a_guided_code_excludes_marks(samples):
    pipe, sample = samples.pipe("lumina-mgpt"), samples.sample("lumina-mgpt")
    raster = pipe.make_raster(*sample.size)
    logits = torch.randn(2, 1, raster.num_tokens, raster.vocab, generator=seeded(0))
    law = Laws(LawConfig(3.0), raster.grammar())(logits, torch.arange(raster.num_tokens)[None])
    for n in range(raster.num_tokens):
        held = law.probs[0, n]
        assert held[:CODES].sum() == pytest.approx(0.0 if n in raster.forced else 1.0, abs=1e-5)
        if n in raster.forced:
            assert held[raster.forced[n]] == 1


def test_decoded_pixels_do_not_depend_on_the_batch(samples):
    pipe, sample = samples.pipe("lumina-mgpt-2"), samples.sample("lumina-mgpt-2")
    out = drawn(pipe, sample)
    raster = pipe.make_raster(*sample.size)
    both = to_output(pipe.decode_pixels(out.tokens, raster), "np")
    for i in range(2):
        assert (to_output(pipe.decode_pixels(out.tokens[i : i + 1], raster), "np")[0] == both[i]).all()
