"""Where pictures and models come from: records in PNG files, hashes of weights, saved pipelines and damaged folders."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drafting import drafting
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_pipeline import CLASSES, TOKENS, class_pipeline, hushed, one_clear_line, saved, seeded, text_pipeline, tiny_vq

from arsd import SJD, AutoARPipeline, Autoregressive, LlamaGenPipeline, LlamaGenTransformer, VQTokenizer
from arsd.errors import ArsdError, CheckpointError, InputError
from arsd.pipelines.auto import find_model, shipped_models
from arsd.provenance import KEY, model_hash, pack_tokens, read_png, save_png, tokens_sha256, unpack_tokens, weights_hash


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    decoder = SJD(window=5, coupling="maximal", init="left")
    return {
        "class": saved(class_pipeline(decoder), root / "class"),
        "text": saved(text_pipeline(decoder), root / "text"),
    }


@pytest.fixture
def copy(folders, tmp_path):
    """A text pipeline's folder to damage."""
    return shutil.copytree(folders["text"], tmp_path / "copy")


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("loader", [LlamaGenPipeline, AutoARPipeline])
def test_a_saved_pipeline_gives_the_same_tokens(folders, kind, loader):
    given = {"class_labels": [1, 4]} if kind == "class" else {"prompt": ["red apple", "dog face"]}
    decoder = SJD(window=5, coupling="maximal", init="left")
    original = hushed(class_pipeline(decoder) if kind == "class" else text_pipeline(decoder))
    loaded = hushed(loader.from_pretrained(folders[kind]))
    assert type(loaded) is LlamaGenPipeline
    assert type(loaded.decoder) is SJD and str(loaded.decoder) == str(decoder)
    a, b = (pipe(**given, generator=seeded(2), output_type="np") for pipe in (original, loaded))
    assert torch.equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.images, b.images)


@pytest.mark.parametrize("loader", [LlamaGenPipeline, AutoARPipeline])
def test_a_decoder_given_to_from_pretrained_overrides_the_saved_one(folders, loader):
    loaded = loader.from_pretrained(folders["class"], decoder=Autoregressive(pass_tokens=3))
    assert str(loaded.decoder) == "ar:pass_tokens=3"


def test_a_swapped_decoder_is_what_gets_saved(folders, tmp_path):
    pipe = LlamaGenPipeline.from_pretrained(folders["class"])
    pipe.decoder = Autoregressive()
    assert type(LlamaGenPipeline.from_pretrained(saved(pipe, tmp_path / "again")).decoder) is Autoregressive


@pytest.mark.parametrize("kind", ["class", "text"])
def test_every_component_class_in_the_index_can_be_imported(folders, kind):
    index = json.loads((folders[kind] / "model_index.json").read_text())
    pairs = [tuple(v) for v in index.values() if isinstance(v, list) and v[0] is not None]
    assert {"LlamaGenTransformer", "VQTokenizer", "SJD"} <= {name for _, name in pairs}
    for module, name in pairs:
        cls = getattr(importlib.import_module(module), name)
        assert cls.__name__ == name and (not module.startswith("arsd") or cls.__module__ == module)


@pytest.mark.parametrize("loader", [LlamaGenPipeline, AutoARPipeline])
def test_dtype_holds_for_every_component_and_decoding_runs_in_it(folders, loader):
    pipe = hushed(loader.from_pretrained(folders["text"], dtype=torch.float64))
    for part in (pipe.transformer, pipe.vq, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float64}
    out = pipe("red apple", generator=seeded(0), output_type="pt")
    assert pipe.dtype == torch.float64 and out.stats.tokens == [TOKENS]


def test_single_files_make_a_pipeline_with_the_same_pictures(tmp_path):
    source = hushed(class_pipeline())
    source.vq = VQTokenizer(**{**tiny_vq().config, "norm_groups": 32}).eval()  # the groups that LlamaGen has
    source.transformer.save_single_file(tmp_path / "gpt.pt")
    source.vq.save_single_file(tmp_path / "vq.safetensors")
    transformer = LlamaGenTransformer.from_single_file(tmp_path / "gpt.pt", num_heads=2, grid=4)
    assert transformer.config["condition"] == "class" and transformer.config["num_classes"] == CLASSES
    pipe = hushed(LlamaGenPipeline(transformer, VQTokenizer.from_single_file(tmp_path / "vq.safetensors")))
    a, b = (p(class_labels=[1, 2], guidance_scale=3.0, generator=seeded(0), output_type="pt") for p in (pipe, source))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


@pytest.mark.parametrize("change", [{"norm_groups": 8}, {"norm_groups": 32, "patch_size": 2}])
def test_a_tokenizer_that_a_single_file_cannot_describe_is_refused_rather_than_changed(tmp_path, change):
    vq, ids = VQTokenizer(**{**tiny_vq().config, **change}).eval(), torch.arange(16).view(1, 4, 4)
    try:
        vq.save_single_file(tmp_path / "vq.pt")
    except ArsdError:
        return
    assert torch.equal(VQTokenizer.from_single_file(tmp_path / "vq.pt").decode(ids), vq.decode(ids))


# ---------------------------------------------------------------- damaged folders


def test_a_missing_model_names_what_there_is(tmp_path):
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained(tmp_path / "nowhere")
    one_clear_line(error.value, "give a folder, file or hub id")
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained(tmp_path)
    one_clear_line(error.value, "has no model_index.json")


@pytest.mark.parametrize("reason", [OSError("offline\nsecond line"), RuntimeError("gated"), TimeoutError()])
def test_a_hub_that_does_not_answer_is_one_clear_line(monkeypatch, reason):
    def refuse(*args, **kwargs):
        raise reason

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained("nobody/nothing")
    one_clear_line(error.value, "could not get 'nobody/nothing' from the hub")


@pytest.mark.parametrize("keep", [4, 0.5, 0.99])
@pytest.mark.parametrize("part", ["transformer", "vq", "text_encoder"])
def test_truncated_weights_are_one_clear_line(copy, part, keep):
    [file] = (copy / part).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if keep == 4 else int(keep * len(whole))])
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained(copy)
    one_clear_line(error.value, f"could not load {copy}")


@pytest.mark.parametrize("part", ["transformer", "vq", "text_encoder", "tokenizer", "decoder"])
def test_a_component_whose_files_are_gone_is_one_clear_line(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained(copy)
    one_clear_line(error.value, f"could not load {copy}")


@pytest.mark.parametrize("part", ["transformer/config.json", "decoder/decoder_config.json", "tokenizer/tokenizer.json"])
def test_a_damaged_component_file_is_one_clear_line(copy, part):
    (copy / part).write_text("{")
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained(copy)
    one_clear_line(error.value, f"could not load {copy}")


BAD_INDEX = {
    "cut off": lambda text: text[:40].encode(),
    "empty": lambda text: b"",
    "no class": lambda text: b"{}",
    "a list": lambda text: b"[]",
    "nothing": lambda text: b"null",
    "no text": lambda text: b"\xff\xfe\x00",
    "a class of another folder": lambda text: text.replace('"LlamaGenPipeline"', '["pipeline", "X"]').encode(),
    "unknown pipeline": lambda text: text.replace('"LlamaGenPipeline"', '"NopePipeline"').encode(),
    "unknown component": lambda text: text.replace('"LlamaGenTransformer"', '"Nope"').encode(),
    "unknown module": lambda text: text.replace("arsd.models.llamagen", "arsd.models.nope").encode(),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_damaged_index_is_one_clear_line(copy, case):
    index = copy / "model_index.json"
    index.write_bytes(BAD_INDEX[case](index.read_text()))
    with pytest.raises(CheckpointError) as error:
        AutoARPipeline.from_pretrained(copy)
    one_clear_line(error.value, "ope" if case.startswith("unknown") else str(copy))


def test_a_shipped_model_loads_by_its_name(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("arsd.pipelines.auto.CHECKPOINTS", tmp_path)
    assert shipped_models() == []
    shutil.copytree(folders["class"], tmp_path / "tiny")
    assert shipped_models() == ["tiny"] and find_model("tiny") == tmp_path / "tiny"
    assert type(AutoARPipeline.from_pretrained("tiny")) is LlamaGenPipeline


# ---------------------------------------------------------------- hashes and records


def test_a_record_names_the_drafter_where_it_can_show_in_the_picture(copy):
    pipe = drafting(hushed(AutoARPipeline.from_pretrained(copy)))
    options = {"generator": seeded(0), "output_type": "latent"}
    hashes = []
    for decoder in ("eagle", "cool-sd", "eagle:coupling=rejection"):
        hashes.append(pipe.record(pipe("red apple", decoder=decoder, **options), 0)["drafter_hash"])
    assert hashes[0] is None and hashes[1] == hashes[2] == weights_hash(pipe.drafter) and len(hashes[1]) == 64
    assert weights_hash(pipe.drafter.double()) == hashes[1]
    with torch.no_grad():
        pipe.drafter.fc.weight[0, 0] += 1
    assert weights_hash(pipe.drafter) != hashes[1]


def test_the_model_hash_follows_weights_and_vocabulary_and_nothing_else(copy, folders):
    before = model_hash(copy)
    assert len(before) == 64 and before == model_hash(folders["text"]) != model_hash(folders["class"])
    (copy / "decoder" / "decoder_config.json").write_text("{}")
    (copy / "README.md").write_text("words")
    assert model_hash(copy) == before
    for part in ("transformer/diffusion_pytorch_model.safetensors", "vq/diffusion_pytorch_model.safetensors"):
        data = bytearray((copy / part).read_bytes())
        data[-1] ^= 1
        (copy / part).write_bytes(data)
        assert model_hash(copy) != before
        before = model_hash(copy)
    with (copy / "tokenizer" / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    assert model_hash(copy) != before


@pytest.mark.parametrize("values", [[], [0], [0, 1, 65535, 65536, 2**31], list(range(2304))])
def test_packed_tokens_come_back_and_the_sha_tells_them_apart(values):
    tokens = torch.tensor(values, dtype=torch.int64)
    text = pack_tokens(tokens)
    assert text.isascii() and unpack_tokens(text).tolist() == values and unpack_tokens(text).dtype == np.int64
    longer = torch.cat([tokens, torch.tensor([7])])
    assert tokens_sha256(tokens) == tokens_sha256(tokens.clone()) != tokens_sha256(longer)


RECORD = {"prompt": 'größe 🍎 "quoted"\nsecond line', "seed": 2**62, "sampling": {"top_p": 0.1}, "tokens": "AA=="}


def test_a_record_comes_back_from_the_png_as_it_went_in(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    save_png(picture, tmp_path / "a.png", RECORD)
    assert read_png(tmp_path / "a.png") == RECORD
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 8)), path, {"n": 1})
    with pytest.raises(InputError) as error:
        save_png(Image.new("RGB", (8, 8)), path, {"n": 2})
    one_clear_line(error.value, "exists: choose another --out, or pass --overwrite")
    assert read_png(path) == {"n": 1}
    save_png(Image.new("RGB", (8, 8)), path, {"n": 2}, overwrite=True)
    assert read_png(path) == {"n": 2}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch, failure):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 8)), path, {"n": 1})

    def half(self, content):
        with open(self, "wb") as stream:
            stream.write(content[: len(content) // 2])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises((InputError, KeyboardInterrupt)) as error:
        save_png(Image.new("RGB", (8, 8)), path, {"n": 2}, overwrite=True)
    if isinstance(failure, OSError):
        one_clear_line(error.value, "No space left on device")
    monkeypatch.undo()
    assert read_png(path) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(InputError) as error:
        save_png(Image.new("RGB", (8, 8)), tmp_path / "no" / "a.png", {})
    one_clear_line(error.value, "cannot write")


@pytest.mark.parametrize("name", ["plain.png", "a.jpg", "words.png", "missing.png", "cut.png", "list.png"])
def test_a_file_without_a_whole_record_says_so(tmp_path, name):
    path, picture, info = tmp_path / name, Image.new("RGB", (8, 8)), PngInfo()
    if name in ("plain.png", "a.jpg"):
        picture.save(path)
    elif name == "words.png":
        path.write_text("words")
    elif name != "missing.png":
        info.add_itxt(KEY, json.dumps(RECORD)[:20] if name == "cut.png" else "[1, 2]")
        picture.save(path, pnginfo=info)
    with pytest.raises(InputError) as error:
        read_png(path)
    one_clear_line(error.value, name)


def test_a_png_cut_off_anywhere_is_one_clear_line(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save_png(Image.fromarray(noise), path, RECORD)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 12, 7):  # the last 12 bytes are the end mark
        path.write_bytes(whole[:length])
        try:
            assert read_png(path) == RECORD  # the record comes before the pixels
        except InputError as error:
            one_clear_line(error, "a.png")
