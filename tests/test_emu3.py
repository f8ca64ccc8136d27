"""Emu3 and Emu3.5: what is special about them; what all families must do is asked in test_families."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import family_emu3 as emu3
import pytest
import reference_emu3_vq
import reference_llama
import reference_vqgan
import torch
from families import CODES, PROMPTS
from published_files import write_weights
from safetensors.torch import load_file, save_file
from tiny_pipeline import one_clear_line, seeded
from transformers import Emu3ForConditionalGeneration

import arsd
from arsd.errors import ArsdError
from arsd.models.emu3_files import load_emu3_vq, load_ibq, load_tokenizer
from arsd.pipelines.families import recognise

KINDS = ("emu3", "emu3-hf", "emu3.5")
pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def drawn(pipe: Any, sample: Any, **options: Any) -> Any:
    height, width = sample.size
    call = {"generator": seeded(3), "decoder": "sjd:window=6", "output_type": "latent", "height": height, "width": width}
    return pipe(**{"prompt": PROMPTS} | call | options)


# ------------------------------------------------------------------------------------------------- against transformers


def test_greedy_pictures_are_those_of_transformers_generate(samples):
    """Its own classes, guidance processor and prefix rule, one token at a time."""
    sample, pipe = samples.sample("emu3-hf"), samples.pipe("emu3-hf")
    theirs = Emu3ForConditionalGeneration.from_pretrained(sample.folder, dtype=torch.float64).eval()
    raster = pipe.make_raster(*sample.size)
    prompt, null = sample.streams(PROMPTS[1], sample.size)
    local = pipe.protocol.local_ids

    def allowed(batch: int, ids: Any) -> list[int]:
        place = len(ids) - len(prompt)
        return [int(local[raster.forced[place]])] if place in raster.forced else pipe.protocol.code_ids.tolist()

    found = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=raster.num_tokens,
        do_sample=False,
        guidance_scale=3.0,
        negative_prompt_ids=torch.tensor([null]),
        prefix_allowed_tokens_fn=allowed,
    )
    ours = drawn(pipe, sample, prompt=PROMPTS[1], temperature=0.0)
    picture = local[ours.tokens[0]]
    assert torch.equal(found[0, len(prompt) : len(prompt) + raster.num_tokens], picture)
    pixels = theirs.decode_image_tokens(image_tokens=picture[None], height=raster.rows, width=raster.columns)
    torch.testing.assert_close(pipe.decode_pixels(ours.tokens, raster), pixels, atol=1e-9, rtol=0)


def test_all_layouts_give_what_their_weights_say(samples):
    """The same image tokenizer in both layouts of Emu3, and pictures become the codes that upstream's encoder finds."""
    images = torch.rand(2, 3, 32, 48, generator=seeded(2), dtype=torch.float64) * 2 - 1
    for kind in ("emu3", "emu3-hf"):
        sample, pipe = samples.sample(kind), samples.pipe(kind)
        state = {k: v.double() if v.is_floating_point() else v for k, v in sample.parts["vq"].items()}
        expected = reference_emu3_vq.encode(state, images)
        assert torch.equal(pipe.vq.encode(images), expected) and len(expected.unique()) > 4
        assert pipe.vq.codebook.shape == (CODES, 4) and pipe.vq.downsample_factor == 8


def test_codes_of_emu3_5_are_the_largest_inner_products(samples):
    """IBQ looks codes up by inner products, which is not the nearest one."""
    sample, pipe = samples.sample("emu3.5"), samples.pipe("emu3.5")
    images = torch.rand(2, 3, 64, 48, generator=seeded(2), dtype=torch.float64) * 2 - 1
    state = {key: value.double() for key, value in sample.parts["vq"].items()}
    latents = pipe.vq.latents(images)
    scores = torch.einsum("bhwc,nc->bhwn", latents, state["quantize.embedding.weight"])
    assert torch.equal(pipe.vq.encode(images), scores.argmax(-1))
    nearest = reference_vqgan.encode(state, images)
    assert (nearest != scores.argmax(-1)).any()
    assert torch.equal(load_ibq(sample.options["vq"] / "model.ckpt").encode(images.float()), scores.argmax(-1))


# ------------------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    "text", ["a cat", "A red apple's table, 12345 times", " \n\n x", "café 猫", "I'LL go  there ", "quality."]
)
def test_the_tokenizer_cuts_text_by_the_ranks_of_its_pieces(samples, text):
    tokenizer = samples.pipe("emu3").tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    if text.isascii():
        assert ids == emu3.pieces_of(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<|extra_203|>") == 151849 == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids("<|visual token 000000|>") == 151854


def test_text_is_normalised_before_it_is_cut(samples):
    encode = samples.pipe("emu3").tokenizer.encode
    assert encode("cafe\u0301") == encode("caf\u00e9")


def test_words_of_quality_are_appended_once(samples):
    protocol = samples.pipe("emu3").protocol
    once = protocol.prompt_ids("a cat", 32, 24)
    assert protocol.prompt_ids("a cat" + emu3.QUALITY, 32, 24) == once


def test_a_negative_prompt_replaces_the_published_one(samples, tmp_path):
    """Also one for each prompt; the record has it, and the picture is verified with it."""
    sample, pipe = samples.sample("emu3"), samples.pipe("emu3")
    plain = drawn(pipe, sample)
    published = drawn(pipe, sample, negative_prompt=emu3.NEGATIVE)
    other = drawn(pipe, sample, negative_prompt=["blue", ""])
    assert torch.equal(plain.tokens, published.tokens) and not torch.equal(plain.tokens, other.tokens)
    alone = drawn(pipe, sample, prompt=PROMPTS[0], negative_prompt="blue")
    assert torch.equal(alone.tokens[0], other.tokens[0])
    conditions = pipe.encode_inputs(PROMPTS, negative_prompt=["blue", ""], height=32, width=24)
    words = [row[~hidden].tolist() for row, hidden in zip(conditions.ids[1], conditions.padding[1], strict=True)]
    opening = sample.opening((32, 24))
    assert words == [[151849, *emu3.pieces_of(text), *opening] for text in ("blue", "")]

    made = drawn(pipe, sample, negative_prompt=["blue", "red"], output_type="pil")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        arsd.save_png(made.images[i], path, pipe.record(made, i))
    assert [found.result for found in pipe.verify(paths)] == ["verified", "verified"]
    forged = pipe.record(made, 0) | {"negative_prompt": "green"}
    arsd.save_png(made.images[0], tmp_path / "forged.png", forged)
    damaged = pipe.record(made, 0) | {"negative_prompt": 3}
    arsd.save_png(made.images[0], tmp_path / "damaged.png", damaged)
    assert [pipe.verify(tmp_path / f"{name}.png").result for name in ("forged", "damaged")] == ["refuted", "unknown"]


@pytest.mark.parametrize(
    ("kind", "call", "says"),
    [
        ("emu3.5", {"negative_prompt": "blue"}, "leave out negative_prompt"),
        ("emu3", {"negative_prompt": 3}, "negative_prompt must be text"),
        ("emu3", {"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ("emu3", {"negative_prompt": "blue", "guidance_scale": 1.0}, "without guidance nothing reads negative_prompt"),
        ("emu3", {"prompt": "word " * 9000}, "the prompt has"),
        ("emu3", {"prompt": "a\ud800b"}, "half a character"),
        ("emu3", {"height": 8 * 10**6, "width": 8 * 10**6}, "at most 1048576 can be drawn"),
        ("emu3", {"height": 20}, "multiples of 8"),
        ("emu3.5", {"width": 24}, "multiples of 16"),
        ("emu3.5", {"prompt_images": torch.zeros(1, 3, 64, 64)}, "hold no pictures"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(samples, kind, call, says):
    with pytest.raises(ArsdError) as error:
        drawn(samples.pipe(kind), samples.sample(kind), **call)
    one_clear_line(error.value, says)


def test_a_size_of_another_area_is_warned_of(samples):
    protocol = samples.pipe("emu3").protocol
    for height, width in ((720, 720), (544, 960), (960, 544)):
        assert protocol.advice(height, width) == ""
    assert "no size that this model was trained on" in protocol.advice(256, 256)
    assert [samples.pipe("emu3.5").protocol.advice(16 * h, 16 * w) for h, w in ((64, 64), (55, 73), (41, 97))] == [""] * 3


def test_the_area_in_the_configuration_counts(samples, tmp_path):
    """Emu3-Stage1 draws smaller pictures; of Emu3.5 the field says nothing, as upstream does not read it."""
    for kind, size in (("emu3", 512), ("emu3.5", 1024)):
        folder = spoilt(samples, kind, tmp_path)
        change(folder, image_area=512 * 512)
        assert arsd.AutoARPipeline.from_pretrained(folder, **samples.sample(kind).options).config["image_size"] == size


@pytest.mark.parametrize("size", [0, -5, "big", 64.5, True, 33])
def test_sizes_that_are_none_are_refused_at_once(samples, size):
    with pytest.raises(ArsdError) as error:
        samples.sample("emu3").load(image_size=size)
    one_clear_line(error.value, "image_size must be a number of pixels" if size != 33 else "multiples of 8")


def test_another_tokenizer_is_another_model(samples):
    sample = samples.sample("emu3")
    words = load_tokenizer(sample.folder)
    same = sample.load(tokenizer=words).model_hash
    assert sample.load(tokenizer=load_tokenizer(sample.folder)).model_hash == same
    words.backend_tokenizer.normalizer = None
    assert sample.load(tokenizer=words).model_hash != same


def test_parts_that_are_nowhere_are_named(samples):
    for option in ("vq", "tokenizer"):
        with pytest.raises(ArsdError) as error:
            samples.sample("emu3").load(**{option: "no-such-thing"})
        one_clear_line(error.value, "no model 'no-such-thing'")
    with pytest.raises(ArsdError) as error:
        samples.sample("emu3").load(drafter="small-model")
    one_clear_line(error.value, "drafter must be a model, not the path 'small-model'")


def test_a_picture_is_continued(samples):
    for kind in KINDS:
        sample, pipe = samples.sample(kind), samples.pipe(kind)
        image = torch.rand(1, 3, *sample.size, generator=seeded(5), dtype=torch.float64)
        first = pipe.encode_image(image, *sample.size)
        out = drawn(pipe, sample, image=image, strength=0.5)
        rows = pipe.make_raster(*sample.size).rows // 2
        kept = rows * pipe.make_raster(*sample.size).row_length
        assert torch.equal(out.tokens[:, :kept], first[:, :kept].expand(2, -1))
        assert torch.equal(out.tokens, drawn(pipe, sample, image=image, strength=0.5, decoder="ar").tokens)
        panel = torch.randint(CODES, (1, rows, pipe.make_raster(*sample.size).columns))
        assert torch.equal(drawn(pipe, sample, image=panel).images[:, :rows], panel.expand(2, -1, -1))


# ------------------------------------------------------------------------------------------------------------ wrong files


def spoilt(samples: Any, kind: str, folder: Path) -> Path:
    """A copy of a checkpoint to be damaged."""
    return Path(shutil.copytree(samples.sample(kind).folder, folder / kind))


def refused(folder: Path, says: str, **options: Any) -> None:
    with warnings.catch_warnings(), pytest.raises(ArsdError) as error:
        warnings.simplefilter("error")
        arsd.AutoARPipeline.from_pretrained(folder, **options)
    one_clear_line(error.value, says)


def change(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_weights_are_named(samples, kind, tmp_path):
    folder, options = spoilt(samples, kind, tmp_path), samples.sample(kind).options
    file = folder / "model-00001-of-00002.safetensors"
    whole = file.read_bytes()
    state = load_file(file)
    key = next(key for key in state if key.endswith("o_proj.weight"))
    rest = {name: value for name, value in state.items() if name != key}
    save_file(rest, file, {"format": "pt"})
    refused(folder, "missing", **options)
    save_file(rest | {key: state[key][:, :-1].contiguous()}, file, {"format": "pt"})
    refused(folder, "has shape [64,", **options)
    save_file(state | {"model.layers.0.extra": torch.zeros(1)}, file, {"format": "pt"})
    refused(folder, "unexpected model.layers.0.extra", **options)
    file.write_bytes(whole[: len(whole) // 2])
    refused(folder, "download", **options)
    file.unlink()
    refused(folder, "model-00001-of-00002.safetensors", **options)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "has no weights", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_configurations_are_named(samples, kind, tmp_path):
    folder, options = spoilt(samples, kind, tmp_path), samples.sample(kind).options
    good = json.loads((folder / "config.json").read_text())
    inner = {"text_config": good["text_config"] | {"hidden_size": "wide"}} if kind == "emu3-hf" else {"hidden_size": "wide"}
    change(folder, **inner)
    refused(folder, "config.json is no", **options)
    inner = (
        {"text_config": good["text_config"] | {"num_attention_heads": 3}}
        if kind == "emu3-hf"
        else {"num_attention_heads": 3}
    )
    change(folder, **good | inner)
    refused(folder, "", **options)
    (folder / "config.json").write_text("{")
    refused(folder, "no readable JSON", **options)


def test_missing_parts_are_named_with_where_to_get_them(samples, tmp_path):
    (tmp_path / "a").mkdir()
    old, new = spoilt(samples, "emu3", tmp_path / "a"), spoilt(samples, "emu3.5", tmp_path / "a")
    refused(old, "BAAI/Emu3-VisionTokenizer")
    refused(new, "BAAI/Emu3.5-VisionTokenizer")
    refused(old, "no image tokenizer of Emu3", vq=samples.sample("emu3.5").options["vq"])
    refused(new, "neither model.ckpt nor", vq=tmp_path)
    (tmp_path / "words").mkdir()
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        shutil.move(new / name, tmp_path / "words" / name)
    options = samples.sample("emu3.5").options
    refused(new, "src/tokenizer_emu3_ibq", **options)
    pipe: Any = arsd.AutoARPipeline.from_pretrained(new, tokenizer=tmp_path / "words", **options)
    assert pipe.tokenizer.bos_token_id == 151849
    other = (tmp_path / "words" / "emu3.tiktoken").read_text().splitlines()[:-1]
    shutil.copytree(tmp_path / "words", tmp_path / "fewer")
    (tmp_path / "fewer" / "emu3.tiktoken").write_text("\n".join(other) + "\n")
    fewer: Any = arsd.AutoARPipeline.from_pretrained(new, tokenizer=tmp_path / "fewer", **options)
    assert fewer.model_hash != pipe.model_hash  # other words are another model
    (tmp_path / "words" / "emu3.tiktoken").write_text("%%% x\n")
    refused(new, "no readable tokenizer", tokenizer=tmp_path / "words", **options)
    refused(new, "belongs to another model", tokenizer=samples.pipe("anole").tokenizer, **options)


def test_another_number_of_codes_is_refused(samples, tmp_path):
    state = reference_emu3_vq.emu3_vq_state(codes=16)
    emu3.write_vision_tokenizer(tmp_path / "small", state, codebook_size=16)
    refused(samples.sample("emu3").folder, "does not have the 16 codes", vq=tmp_path / "small")


def test_damaged_image_tokenizers_are_named(samples, tmp_path):
    state = reference_emu3_vq.emu3_vq_state()
    emu3.write_vision_tokenizer(tmp_path / "a", {k: v for k, v in state.items() if not k.startswith("decoder.up.0.")})
    emu3.write_vision_tokenizer(tmp_path / "b", state, ch=64)
    emu3.write_vision_tokenizer(tmp_path / "c", state, ch_mult="wide")
    for name, says in (("a", "missing decoder.up.0."), ("b", "has shape"), ("c", "does not give the sizes")):
        with pytest.raises(ArsdError) as error:
            load_emu3_vq(tmp_path / name)
        one_clear_line(error.value, says)
    for bad in (torch.zeros(1, 3, 33, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(ArsdError):
            samples.pipe("emu3").vq.encode(bad)
    for bad in (torch.full((1, 2, 2), CODES), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 2)):
        with pytest.raises(ArsdError):
            samples.pipe("emu3").vq.decode(bad)


def test_kinds_are_told_by_content(samples, tmp_path):
    """Norms of queries and keys make an Emu3.5, whatever the folder is called."""
    shutil.copytree(samples.sample("emu3").folder, tmp_path / "Emu3.5-Image")
    assert recognise(tmp_path / "Emu3.5-Image") == "emu3"
    with pytest.raises(ArsdError) as error:
        arsd.Emu35Pipeline.from_pretrained(tmp_path / "Emu3.5-Image")
    one_clear_line(error.value, "emu3 weights, not those of Emu35Pipeline")


def test_bin_shards_are_read_as_well(samples, tmp_path):
    sample = samples.sample("emu3")
    folder = spoilt(samples, "emu3", tmp_path)
    for file in folder.glob("model*"):
        file.unlink()
    write_weights(folder, sample.parts["state"], 2, ".bin")
    pipe: Any = arsd.AutoARPipeline.from_pretrained(folder, dtype=torch.float64, **sample.options)
    assert torch.equal(drawn(pipe, sample).tokens, drawn(samples.pipe("emu3"), sample).tokens)


def test_layers_on_disk_paint_the_same(samples, tmp_path):
    """``device_map`` and ``offload_folder`` go to transformers."""
    for kind in KINDS:
        sample = samples.sample(kind)
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        pipe = sample.load(device_map=places, offload_folder=str(tmp_path / kind))
        assert torch.equal(drawn(pipe, sample).tokens, drawn(samples.pipe(kind), sample).tokens)


def test_the_command_line_takes_all_parts(samples, command, tmp_path):
    sample = samples.sample("emu3.5")
    shutil.copytree(sample.folder, tmp_path / "model", ignore=lambda folder, names: [n for n in names if "emu3" in n])
    parts = ("--model", tmp_path / "model", "--vq", sample.options["vq"], "--tokenizer", sample.folder)
    size = ("--height", 32, "--width", 48, "--dtype", "float32")
    status, out, _ = command("generate", "a cat", *parts, *size, "--out", tmp_path / "out", "--compare")
    assert status == 0 and "same tokens" in out
    status, out, _ = command("verify", *(tmp_path / "out").glob("*.png"), *parts)
    assert status == 0 and "verified" in out
    status, _, err = command("generate", "a cat", *parts, *size, "--out", tmp_path / "no", "--negative-prompt", "x")
    assert status == 2 and "leave out negative_prompt" in err[-1]
    parts = ("--model", samples.sample("emu3").folder, "--vq", samples.sample("emu3").options["vq"], "--dtype", "float32")
    words = ("generate", "a cat", "--height", 16, "--width", 16, "--negative-prompt", "blue", "--out", tmp_path / "blue")
    assert command(*words, *parts)[0] == 0
    assert command("verify", *(tmp_path / "blue").glob("*.png"), *parts[:4])[0] == 0


def test_the_reference_tells_models_apart():
    """Norms of queries and keys, and heads that share keys, change the logits of the reference forward."""
    ids = torch.arange(6)
    state = reference_llama.llama_state(20, 32, 2, 4, 2, 8, 48, qk_norm=True)
    plain = {key: value for key, value in state.items() if "_norm.weight" not in key or "layernorm" in key}
    first = reference_llama.logits(state, ids, 4, 2)
    assert (first - reference_llama.logits(plain, ids, 4, 2)).abs().max() > 0.1


def test_load_tokenizer_reads_both_kinds(samples):
    for kind in ("emu3", "emu3-hf"):
        words = load_tokenizer(samples.sample(kind).folder).get_vocab()
        assert {word: words[word] for word in samples.sample(kind).parts["words"]} == samples.sample(kind).parts["words"]
