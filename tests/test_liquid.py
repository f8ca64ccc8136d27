"""Liquid: prompts with one <bos>, upstream's law, Gemma's activation and embedding, and what is wrong with files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import family_liquid as family
import pytest
import reference_vqgan
import torch
from families import CODES, PROMPTS, write
from published_files import byte_tokenizer, spelled
from safetensors.torch import load_file, save_file
from tiny_pipeline import one_clear_line, seeded
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM

from arsd.errors import ArsdError, CheckpointError
from arsd.models.liquid import find_kind, load_liquid, vq_source
from arsd.pipelines.liquid import LiquidPipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")
load: Any = LiquidPipeline.from_pretrained
SHARD = "model-00002-of-00002.safetensors"
KEY = "model.layers.1.mlp.up_proj.weight"


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ----------------------------------------------------------------------------------------------------- what was published


def test_the_activation_is_the_one_that_gemma_was_trained_with(samples, tmp_path):
    """The published configuration says gelu; a hidden_activation that is given counts."""
    folder = samples.sample("liquid").folder
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == "gelu"
    model = load_liquid(folder)
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(model.model.layers[0].mlp.act_fn(x), F.gelu(x, approximate="tanh"), atol=1e-6, rtol=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 1e4
    shutil.copytree(folder, tmp_path / "other")
    edit(tmp_path / "other" / "config.json", hidden_activation="relu")
    assert load_liquid(tmp_path / "other").model.layers[0].mlp.act_fn(x).min() == 0


def test_embeddings_are_multiplied_by_the_root_of_the_width_once(samples):
    """transformers multiplies in the embedding, and not again what comes as inputs_embeds; older ones did otherwise."""
    pipe, sample = samples.pipe("liquid"), samples.sample("liquid")
    ids = torch.tensor([5, 9, 266])
    table = sample.parts["state"]["model.embed_tokens.weight"].double()
    torch.testing.assert_close(pipe.transformer.get_input_embeddings()(ids), table[ids] * 64**0.5)
    one, other = pipe.transformer.model(ids[None]), pipe.transformer.model(inputs_embeds=(table[ids] * 8)[None])
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state)


def test_there_is_one_first_word_whatever_the_tokenizer_adds(samples):
    pipe, words = samples.pipe("liquid"), family.words_of()
    assert pipe.tokenizer.encode("a")[0] == words["<bos>"]  # so it would be doubled
    request = " Generate an image based on this description."
    wanted = [words["<bos>"], *spelled(words, "a cat" + request), words["<boi>"]]
    assert pipe.protocol.prompt_ids("a cat", 64, 64) == wanted == pipe.protocol.prompt_ids("a cat" + request, 64, 64)
    assert pipe.protocol.null_ids(64, 64) == [words[name] for name in ("<bos>", "<unconditional>", "<boi>")]
    assert pipe.protocol.code_ids.tolist() == list(range(len(words), len(words) + CODES))
    assert LiquidPipeline.default_size == 512
    assert pipe.sampling == {"guidance_scale": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.5, "temperature": 2.0}])
def test_the_law_is_upstreams(samples, options):
    """Guidance, temperature, no words, top-k, then top-p of what is left, all over the whole vocabulary."""
    sample, pipe = samples.sample("liquid"), samples.pipe("liquid")
    conditional, null = sample.streams("a cat", sample.size)
    out = pipe("a cat", generator=seeded(3), decoder="sjd:window=4", output_type="latent", log_probs=True, **options)
    picture, first = pipe.protocol.local_ids[out.tokens[0]].tolist(), len(sample.parts["words"])
    c, u = (sample.full_logits([*ids, *picture])[-17:-1] for ids in (conditional, null))
    told = {"temperature": 0.99, "top_k": 4096, "top_p": 0.96} | options
    logits = (u + 7.0 * (c - u)) / told["temperature"]
    logits[:, :first] = -torch.inf
    best = logits.topk(min(told["top_k"], logits.shape[-1])).values[:, -1:]
    logits = logits.masked_fill(logits < best, -torch.inf)
    for row in logits:
        ordered, index = row.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > told["top_p"]
        row[index[1:][beyond[:-1]]] = -torch.inf  # the first one beyond is kept
    expected = logits.log_softmax(-1)[range(16), picture]
    assert expected.isfinite().all()
    torch.testing.assert_close(out.log_probs[0].double(), expected, atol=1e-5, rtol=0)


def test_it_has_no_negative_prompt_and_prompts_hold_no_pictures(samples):
    pipe = samples.pipe("liquid")
    for call, says in (
        ({"negative_prompt": "dull"}, "has no words: leave out negative_prompt"),
        ({"prompt_images": torch.zeros(1, 3, 64, 64)}, "hold no pictures"),
        ({"height": 64, "width": 48}, "square pictures"),
    ):
        with pytest.raises(ArsdError) as error:
            pipe("a cat", **call)
        one_clear_line(error.value, says)


def test_a_picture_becomes_tokens_and_is_continued(samples):
    sample, pipe = samples.sample("liquid"), samples.pipe("liquid")
    image = torch.rand(1, 3, 64, 64, generator=seeded(4), dtype=torch.float64)
    state = {key: value.double() for key, value in sample.parts["vq"].items()}
    codes = reference_vqgan.encode(state, 2 * image - 1)
    assert torch.equal(pipe.encode_image(image), codes.flatten(1))
    call = {"image": image, "strength": 0.5, "output_type": "latent"}
    out, plain = (pipe("a cat", decoder=d, generator=seeded(1), **call) for d in ("sjd:window=4", "ar"))
    assert torch.equal(out.images[0, :2], codes[0, :2]) and torch.equal(out.tokens, plain.tokens)


def test_layers_on_disk_give_the_same_tokens(samples, tmp_path):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    pipe = samples.sample("liquid").load(device_map=places, offload_folder=str(tmp_path))
    call = {"prompt": PROMPTS, "decoder": "sjd:window=6", "output_type": "latent"}
    expected = samples.pipe("liquid")(**call, generator=seeded(3)).tokens
    assert torch.equal(pipe(**call, generator=seeded(3)).tokens, expected)


# ---------------------------------------------------------------------------------------- what a folder is, where things lie


def test_other_models_of_the_same_kind_are_none_of_it(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    GemmaForCausalLM(GemmaConfig(vocab_size=300, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    assert find_kind(tmp_path) is None
    words = {word: n for word, n in family.words_of().items() if word not in ("<boi>", "<eoi>", "<unconditional>")}
    byte_tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    assert find_kind(tmp_path) is None
    with pytest.raises(ArsdError) as error:
        load(tmp_path)
    one_clear_line(error.value, "nothing that is known, not those of LiquidPipeline")


@pytest.mark.parametrize("place", ["vqgan.ckpt", "chameleon/vqgan.ckpt", "tokenizer/vqgan.ckpt", "../chameleon/vqgan.ckpt"])
def test_the_image_tokenizer_is_found_where_upstream_has_it(tmp_path, place):
    folder = tmp_path / "a" / "b"
    family.write_liquid(folder, family.words_of())
    with pytest.raises(CheckpointError) as error:
        vq_source(folder)
    assert "put vqgan.ckpt (of Meta's Chameleon, or" in str(error.value) and "give its path as vq=" in str(error.value)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(b"x")
    assert vq_source(folder).samefile(folder / place)


# ------------------------------------------------------------------------------------------------------------------ errors


def change(folder: Path, key: str, value: torch.Tensor | None) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / SHARD).items() if name != key}
    save_file(state | ({} if value is None else {key: value}), folder / SHARD)


DAMAGE: dict[str, tuple[Any, str]] = {
    "cut weights": (lambda f: cut(f / SHARD), "its weights cannot be read"),
    "no shard": (lambda f: (f / SHARD).unlink(), SHARD),
    "missing key": (lambda f: change(f, KEY, None), f"missing {KEY}"),
    "wrong shape": (lambda f: change(f, KEY, torch.ones(7, 7)), f"{KEY} has shape [7, 7], expected [96, 64]"),
    "cut index": (lambda f: cut(f / "model.safetensors.index.json"), "index.json is no readable JSON"),
    "cut config": (lambda f: cut(f / "config.json"), "config.json is no readable JSON"),
    "odd value": (lambda f: edit(f / "config.json", head_dim="wide"), "config.json is no GemmaConfig"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "nothing that is known"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json is no readable tokenizer"),
    "no vq": (lambda f: shutil.rmtree(f / "chameleon"), "holds no image tokenizer: put vqgan.ckpt"),
    "cut vq": (lambda f: cut(f / "chameleon" / "vqgan.ckpt"), "vqgan.ckpt is truncated"),
    "other codes": (
        lambda f: torch.save({"state_dict": reference_vqgan.vqgan_state(**family.F16 | {"codes": 16})}, f / "vqgan.ckpt"),
        "266 words, the image tokenizer 16 codes, the network 298 of both together: one of them is another model's",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_wrong_files_are_one_clear_line(tmp_path, what):
    damage, says = DAMAGE[what]
    write("liquid", tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)


def test_the_tokenizer_of_another_model_is_refused(samples, tmp_path):
    words = {word: n for word, n in family.words_of().items() if word != "<unconditional>"}
    byte_tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ArsdError) as error:
        load(samples.sample("liquid").folder, tokenizer=tmp_path)
    one_clear_line(error.value, "the tokenizer has no <unconditional>: it belongs to another model")


def test_the_folder_of_another_family_is_refused(samples):
    for kind in ("anole", "simplear"):
        with pytest.raises(ArsdError) as error:
            load(samples.sample(kind).folder)
        one_clear_line(error.value, "not those of LiquidPipeline")
