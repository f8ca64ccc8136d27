"""A pipeline of published LlamaGen files: classes and text, the caption cleaner, published sampling, what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_llamagen as reference
import torch
from test_text_encoders import published as write_t5
from tiny_pipeline import one_clear_line, seeded

import arsd
from arsd.errors import ArsdError
from arsd.models.captions import clean_caption
from arsd.pipelines.families import recognise

SIZE = {"image_size": 8, "num_heads": 4}  # f = 2: 4 x 4 codes
SLOTS = 12


def state_of(text: bool, **options: Any) -> dict[str, torch.Tensor]:
    """40 codes, as the image tokenizer has; captions of the width of the tiny T5."""
    state = reference.transformer_state(text=text, **{"slots": SLOTS} | options)
    for key in ("tok_embeddings.weight", "output.weight"):
        state[key] = state[key][:40].clone()
    if text:
        generator = torch.Generator().manual_seed(5)
        state["cls_embedding.uncond_embedding"] = torch.randn(SLOTS, 32, generator=generator)
        state["cls_embedding.cap_proj.fc1.weight"] = torch.randn(64, 32, generator=generator) / 2
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    torch.save({"model": state_of(False)}, root / "c2i_B_256.pt")
    torch.save(state_of(True), root / "t2i_XL_stage1_256.pt")
    torch.save({"model": reference.vq_state()}, root / "vq_ds16_c2i.pt")
    write_t5(root / "flan-t5-xl")
    return root


def load(files: Path, text: bool, **options: Any) -> Any:
    name = "t2i_XL_stage1_256.pt" if text else "c2i_B_256.pt"
    parts = {"vq": files / "vq_ds16_c2i.pt", "dtype": torch.float64, **SIZE}
    parts |= {"text_encoder": files / "flan-t5-xl"} if text else {}
    pipe = arsd.AutoARPipeline.from_pretrained(files / name, **parts | options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPTS = ["a red cat", "the dog and the cat"]
INPUTS: dict[bool, dict[str, Any]] = {False: {"class_labels": [3, 7]}, True: {"prompt": PROMPTS}}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("decoder", ["sjd:window=3", "sjd:window=16,init=above"])
def test_published_files_paint_and_sjd_does_not_show(files, text, decoder):
    pipe = load(files, text)
    plain = pipe(**INPUTS[text], decoder="ar", generator=seeded(1))
    out = pipe(**INPUTS[text], decoder=decoder, generator=seeded(1))
    assert torch.equal(plain.tokens, out.tokens) and out.images[0].size == (8, 8)
    assert [a.tobytes() for a in plain.images] == [b.tobytes() for b in out.images]
    wanted = {"guidance_scale": 7.5, "top_k": 1000} if text else {"guidance_scale": 4.0, "top_k": 2000}
    assert {name: getattr(out.law_config, name) for name in wanted} == wanted


def test_prompts_pass_the_caption_cleaner_and_only_there(files):
    pipe = load(files, True)
    messy, clean = "The Dog &amp; the CAT  (photo_123.jpg)", clean_caption("The Dog &amp; the CAT  (photo_123.jpg)")
    assert messy != clean
    first, second = (pipe(text, generator=seeded(1), output_type="latent") for text in (messy, clean))
    assert torch.equal(first.tokens, second.tokens) and first.inputs[0]["prompt"] == messy
    raw = arsd.LlamaGenPipeline(pipe.transformer, pipe.vq, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    assert not torch.equal(raw.encode_prompt(messy)[0], pipe.encode_prompt(messy)[0])


def test_null_features_may_be_given_without_a_text_encoder(files):
    pipe = load(files, True, text_encoder=None)
    features = torch.randn(1, SLOTS, 32, generator=seeded(2), dtype=torch.float64)
    call = {"prompt_embeds": features, "prompt_attention_mask": torch.ones(1, SLOTS), "output_type": "latent"}
    plain = pipe(**call, decoder="ar", generator=seeded(1))
    assert torch.equal(plain.tokens, pipe(**call, decoder="sjd", generator=seeded(1)).tokens)
    with pytest.raises(ArsdError) as error:
        pipe("a red cat")
    one_clear_line(error.value, "no text encoder")


@pytest.mark.parametrize("interval", [0, 3, 14])
def test_the_guidance_interval_counts_decoding_steps_as_upstream_does(files, interval):
    """Behind step k the law is the conditional one; the k + 2 tokens up to there are guided."""
    pipe = load(files, False)
    call = {"class_labels": [3], "temperature": 0, "output_type": "latent", "guidance_scale": 6.0}
    out = pipe(**call, decoder="sjd:window=5", guidance_interval=interval)
    model = pipe.transformer
    streams = [model(model.embed_classes(torch.tensor([label])), out.tokens)[0] for label in (3, 10)]
    guided, plain = streams[1] + 6.0 * (streams[0] - streams[1]), streams[0]
    expected = torch.cat([guided[: interval + 2], plain[interval + 2 :]]).argmax(-1)
    assert torch.equal(out.tokens[0], expected)
    assert torch.equal(pipe(**call, decoder="ar", guidance_interval=interval).tokens, out.tokens)


@pytest.mark.parametrize("text", [False, True])
def test_saved_and_loaded_again_it_is_the_same_pipeline(files, text, tmp_path):
    pipe = load(files, text)
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = arsd.AutoARPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    again.set_progress_bar_config(disable=True)
    first, second = (p(**INPUTS[text], generator=seeded(1), output_type="latent") for p in (pipe, again))
    assert torch.equal(first.tokens, second.tokens)
    assert again.config["clean_captions"] == text == pipe.config["clean_captions"]
    assert again.sampling == pipe.sampling


@pytest.mark.parametrize("text", [False, True])
def test_a_picture_of_published_files_is_verified_with_all_of_them(files, text, tmp_path):
    pipe = load(files, text, dtype=torch.float32)
    out = pipe(**INPUTS[text], generator=seeded(1), decoder="sjd:window=4")
    arsd.save_png(out.images[0], tmp_path / "a.png", pipe.record(out, 0))
    assert load(files, text, dtype=torch.float32).verify(tmp_path / "a.png").result == "verified"
    other = reference.vq_state(seed=1)
    torch.save({"model": other}, tmp_path / "vq_other.pt")
    assert load(files, text, dtype=torch.float32, vq=tmp_path / "vq_other.pt").verify(tmp_path / "a.png").result == "unknown"


def test_the_command_line_takes_files_and_class_labels(files, tmp_path, command, monkeypatch):
    monkeypatch.setattr("arsd.models.llamagen_files.PUBLISHED_HEADS", {(64, 2): 4})
    options = ("--vq", files / "vq_ds16_c2i.pt", "--image-size", 8, "--dtype", "float32")
    words = ("--model", files / "c2i_B_256.pt", *options)
    status, out, _ = command("generate", "--class-label", 3, "--class-label", 7, *words, "--compare", "--out", tmp_path)
    assert status == 0 and out.count("same tokens") == 2
    status, out, _ = command("verify", *tmp_path.glob("*.png"), *words[:-2])
    assert status == 0 and out.count("verified") == 2
    status, out, _ = command("bench", "--class-label", 3, *words, "--decoders", "ar", "sjd:window=4")
    assert status == 0 and "sjd:window=4" in out
    status, _, err = command("generate", "a cat", "--class-label", 3, *words, "--out", tmp_path)
    assert status == 2 and len(err) == 1 and "not both" in err[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vq": None}, "give vq="),
        ({"vq": "nowhere.pt"}, "nowhere.pt"),
        ({"image_size": 7}, "multiple of 2"),
        ({"num_heads": None}, "num_heads"),
    ],
)
def test_what_is_missing_is_said_in_one_line(files, options, says):
    with pytest.raises(ArsdError) as error:
        load(files, False, **options)
    one_clear_line(error.value, says)


def test_files_that_do_not_belong_together_are_refused(files, tmp_path):
    torch.save({"model": reference.transformer_state()}, tmp_path / "c2i_B_256.pt")  # 48 codes
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(tmp_path / "c2i_B_256.pt", vq=files / "vq_ds16_c2i.pt", **SIZE)
    one_clear_line(error.value, "40 codes, the transformer 48")
    torch.save({"model": reference.transformer_state(text=True)}, tmp_path / "t2i.pt")
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(files / "vq_ds16_c2i.pt")
    one_clear_line(error.value, "give it as vq=")
    state = state_of(True)
    state["cls_embedding.uncond_embedding"] = torch.randn(SLOTS, 24)
    state["cls_embedding.cap_proj.fc1.weight"] = torch.randn(64, 24)
    torch.save({"model": state}, tmp_path / "narrow.pt")
    parts = {"vq": files / "vq_ds16_c2i.pt", "text_encoder": files / "flan-t5-xl"}
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(tmp_path / "narrow.pt", **parts, **SIZE)
    one_clear_line(error.value, "32 wide, the model reads 24")


def test_a_transformer_is_told_by_its_keys(files, tmp_path):
    assert recognise(files / "c2i_B_256.pt") == recognise(files / "t2i_XL_stage1_256.pt") == "llamagen"
    with pytest.raises(ArsdError) as error:
        recognise(files)  # a download with several files in it
    one_clear_line(error.value, "c2i_B_256.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "odd.pt")
    with pytest.raises(ArsdError) as error:
        recognise(tmp_path / "odd.pt")
    one_clear_line(error.value, "no model that arsd knows")
