"""Published folders of Janus: what they are, their image tokenizer, and what is wrong with bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_janus as published
import pytest
import torch
from published_files import byte_tokenizer, write_json
from safetensors.torch import load_file, save_file
from test_janus import KINDS
from tiny_pipeline import one_clear_line, seeded

from arsd.errors import ArsdError
from arsd.models.janus_files import find_kind, load_janus, load_janus_vq
from arsd.models.llamagen_files import save_vq
from arsd.pipelines.janus import JanusPipeline
from arsd.tokenizers.vq import VQTokenizer

# ----------------------------------------------------------------------------------------------------- the image tokenizer


@torch.no_grad()
def nearest_on_the_sphere(sample: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, h, w] by transformers' encoder and a search as deepseek-ai has it: both sides of length 1."""
    vq = sample.whole.model.vqmodel
    latents = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1)
    codes, latents = (x / x.norm(dim=-1, keepdim=True) for x in (vq.quantize.embedding.weight, latents))
    return (latents[..., None, :] - codes).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pictures_are_encoded_as_published_which_transformers_does_not(samples, kind):
    sample, vq = samples.sample(kind), samples.pipe(kind).vq
    pixels = 2 * torch.rand(3, 3, 64, 64, generator=seeded(5), dtype=torch.float64) - 1
    expected = nearest_on_the_sphere(sample, pixels)
    assert len(expected.unique()) > 3
    assert torch.equal(vq.encode(pixels), expected)
    assert not torch.equal(sample.whole.model.vqmodel.encode(pixels).image_tokens.view(expected.shape), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_encoded_continued_and_varied(samples, kind):
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    picture = torch.rand(1, 3, 64, 64, generator=seeded(6), dtype=torch.float64)
    tokens = pipe.encode_image(picture)
    assert torch.equal(tokens[0], nearest_on_the_sphere(sample, 2 * picture - 1).flatten())
    for decoder in ("ar", "sjd:window=5"):
        out = pipe("a cat", image=picture, strength=0.5, decoder=decoder, generator=seeded(2), output_type="latent")
        assert torch.equal(out.tokens[0, :8], tokens[0, :8]) and not torch.equal(out.tokens[0, 8:], tokens[0, 8:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_tokenizer_may_be_llamagens_file_or_lie_in_another_folder(samples, kind, tmp_path):
    whole = samples.sample(kind)
    wanted = load_janus_vq(whole.folder)
    assert wanted.dtype == torch.bfloat16
    save_vq(wanted, tmp_path / "vq_ds16_t2i.pt")
    for source in (tmp_path / "vq_ds16_t2i.pt", whole.folder, wanted):
        pipe = whole.load(vq=source, dtype=None)
        assert isinstance(pipe.vq, VQTokenizer)
        assert all(torch.equal(a, b) for a, b in zip(pipe.vq.parameters(), wanted.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------- what a folder is, sizes


def test_other_models_of_the_same_type_are_none(tmp_path):
    parts = dict.fromkeys(("vision_config", "aligner_config", "language_config"), {})
    assert find_kind(tmp_path) is None and find_kind(tmp_path / "nowhere") is None
    for more in ({}, {"vision_gen_enc_config": {}, "vision_gen_dec_config": {}}):  # DeepSeek-VL, JanusFlow
        write_json(tmp_path / "config.json", parts | {"model_type": "multi_modality"} | more)
        assert find_kind(tmp_path) is None
        for load in (load_janus, JanusPipeline.from_pretrained):
            with pytest.raises(ArsdError) as error:
                load(tmp_path)
            one_clear_line(error.value, str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_that_of_the_configuration_whatever_the_folder_is_called(kind, tmp_path):
    folder = tmp_path / "janus-512"
    published.write_sample(kind, folder)
    pipe = JanusPipeline.from_pretrained(folder)
    assert pipe.config["image_size"] == pipe.protocol.size == 64
    pipe.save_pretrained(tmp_path / "saved-1024")
    assert JanusPipeline.from_pretrained(tmp_path / "saved-1024").protocol.size == 64
    for size, says in ((512, "image_size must be 64, not 512"), (-64, "a number of pixels, not -64")):
        with pytest.raises(ArsdError) as error:
            JanusPipeline.from_pretrained(folder, image_size=size)
        one_clear_line(error.value, says)


# -------------------------------------------------------------------------------------------------------------------- errors


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, *place: str, **changes: Any) -> None:
    """Change entries of an object in a JSON file, or remove those that become ``None``."""
    content = json.loads(path.read_text())
    part = content
    for name in place:
        part = part[name]
    part |= changes
    for name in [name for name, value in part.items() if value is None]:
        del part[name]
    path.write_text(json.dumps(content))


def reshape(folder: Path, change: Callable[[dict[str, Any]], Any], key: str) -> None:
    """Change the tensors of the file that has ``key``."""
    if (folder / "pytorch_model.bin").exists():
        state = torch.load(folder / "pytorch_model.bin")
        change(state)
        torch.save(state, folder / "pytorch_model.bin")
        return
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    state = load_file(folder / index[key])
    change(state)
    save_file({name: value.clone() for name, value in state.items()}, folder / index[key], {"format": "pt"})


def without(folder: Path, prefix: str) -> None:
    """Take away the tensors whose keys begin so."""
    path = folder / "model.safetensors.index.json"
    keys = json.loads(path.read_text())["weight_map"] if path.exists() else {}
    if not keys:
        reshape(folder, lambda state: [state.pop(key) for key in list(state) if key.startswith(prefix)], prefix)
        return
    for key in [key for key in keys if key.startswith(prefix)]:
        reshape(folder, lambda state, key=key: state.pop(key), key)
        keys.pop(key)
    write_json(path, {"metadata": {}, "weight_map": keys})


SHARD, KEY, VQ_KEY = "model-00002-of-00002.safetensors", "model.generation_head.vision_head.weight", "decoder.conv_out.bias"
OTHER, OTHER_KEY = "pytorch_model.bin", "gen_head.vision_head.weight"
DAMAGE: dict[str, dict[str, tuple[Callable[[Path], Any], str]]] = {
    "janus": {
        "no config": (lambda f: (f / "config.json").unlink(), "holds nothing that is known"),
        "config cut": (lambda f: cut(f / "config.json"), "config.json is no readable JSON"),
        "another model": (lambda f: edit(f / "config.json", model_type="llama"), "holds nothing that is known"),
        "odd layers": (lambda f: edit(f / "config.json", "text_config", num_hidden_layers="two"), "is no JanusConfig"),
        "odd heads": (lambda f: edit(f / "config.json", "text_config", num_attention_heads=3), "is no JanusConfig"),
        "odd side": (lambda f: edit(f / "config.json", "vision_config", image_size="x"), "is no JanusConfig"),
        "other side": (lambda f: edit(f / "config.json", "vision_config", image_size=72), "image_size must be 64, not 72"),
        "other codes": (
            lambda f: edit(f / "config.json", "vq_config", num_embeddings=40),
            "expected [40",
        ),
        "other words": (lambda f: edit(f / "config.json", "text_config", vocab_size=500), "expected [500, 64]"),
        "fewer layers": (lambda f: edit(f / "config.json", "text_config", num_hidden_layers=1), "unexpected"),
        "more layers": (lambda f: edit(f / "config.json", "text_config", num_hidden_layers=3), "missing language_model"),
        "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has no weights, neither model.safetensors nor"),
        "absent shard": (lambda f: (f / SHARD).unlink(), SHARD),
        "cut shard": (lambda f: cut(f / SHARD), "truncated"),
        "cut index": (lambda f: cut(f / "model.safetensors.index.json"), "index.json is no readable JSON"),
        "missing key": (lambda f: without(f, KEY), "missing generation_head.vision_head.weight"),
        "surplus key": (lambda f: reshape(f, lambda s: s.update(x=torch.ones(1)), KEY), "unexpected x"),
        "wrong shape": (
            lambda f: reshape(f, lambda s: s.update({KEY: torch.ones(7, 7)}), KEY),
            "generation_head.vision_head.weight has shape [7, 7], expected [32, 64]",
        ),
        "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        "cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json is no readable tokenizer"),
        "another tokenizer": (
            lambda f: byte_tokenizer({"<s>": 0, "a": 1}).save(str(f / "tokenizer.json")),
            f"the tokenizer has no {published.BEGIN}",
        ),
        "no image tokenizer": (lambda f: without(f, "model.vqmodel."), "vq_ds16_t2i.pt"),
        "part of it": (lambda f: without(f, f"model.vqmodel.{VQ_KEY}"), f"missing {VQ_KEY}"),
        "encoder only": (lambda f: without(f, "model.vqmodel.decoder."), "missing decoder."),
    },
    "janus-original": {
        "part missing": (lambda f: edit(f / "config.json", gen_head_config=None), "holds nothing that is known"),
        "no params": (lambda f: edit(f / "config.json", "gen_head_config", params=None), "does not give the sizes"),
        "params a list": (lambda f: edit(f / "config.json", "gen_head_config", params=[1]), "does not give the sizes"),
        "no width": (lambda f: edit(f / "config.json", "gen_aligner_config", "params", n_embed=None), "KeyError: 'n_embed'"),
        "no language": (lambda f: edit(f / "config.json", language_config=None), "does not give the sizes"),
        "odd depth": (lambda f: edit(f / "config.json", "gen_aligner_config", "params", depth="x"), "is no JanusConfig"),
        "deeper": (lambda f: edit(f / "config.json", "gen_aligner_config", "params", depth=3), "missing generation_aligner"),
        "other width": (lambda f: edit(f / "config.json", "gen_aligner_config", "params", n_embed=48), "has shape"),
        "other codes": (
            lambda f: edit(f / "config.json", "gen_vision_config", "params", image_token_size=40),
            "expected [40",
        ),
        "defaults": (lambda f: edit(f / "config.json", "language_config", hidden_size=None), "has shape"),
        "no weights": (lambda f: (f / OTHER).unlink(), "has no weights"),
        "cut weights": (lambda f: cut(f / OTHER), "truncated"),
        "missing key": (lambda f: without(f, OTHER_KEY), "missing generation_head.vision_head.weight"),
        "wrong shape": (
            lambda f: reshape(f, lambda s: s.update({OTHER_KEY: torch.ones(7, 7)}), OTHER_KEY),
            "has shape [7, 7], expected [32, 64]",
        ),
        "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        "no image tokenizer": (lambda f: without(f, "gen_vision_model."), "vq_ds16_t2i.pt"),
        "part of it": (lambda f: without(f, f"gen_vision_model.{VQ_KEY}"), f"missing {VQ_KEY}"),
    },
}


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in DAMAGE for what in DAMAGE[kind]])
def test_a_bad_folder_is_one_clear_line(tmp_path, kind, what):
    published.write_sample(kind, tmp_path)
    damage, says = DAMAGE[kind][what]
    damage(tmp_path)
    with pytest.raises(ArsdError) as error:
        JanusPipeline.from_pretrained(tmp_path)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"codebook_size": 16, "channel_multiplier": (1, 1, 1, 1, 1)}, "the model has 32 codes, the image tokenizer 16"),
        ({"codebook_size": 32, "channel_multiplier": (1, 1)}, "4 x 4 codes of 2 pixels"),
    ],
)
def test_an_image_tokenizer_of_another_model_is_one_clear_line(samples, sizes, says):
    other = VQTokenizer(base_channels=32, num_res_blocks=1, latent_channels=16, **sizes)
    with pytest.raises(ArsdError) as error:
        samples.sample("janus").load(vq=other)
    one_clear_line(error.value, says)


def test_a_folder_of_another_family_is_one_clear_line(samples):
    with pytest.raises(ArsdError) as error:
        JanusPipeline.from_pretrained(samples.sample("lumina-mgpt").folder)
    one_clear_line(error.value, "not those of JanusPipeline")
