"""SimpleAR: folders with either tokenizer, captions, upstream's law, negative prompts, and what is wrong with files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import family_simplear as family
import pytest
import reference_cosmos
import torch
from families import CODES, PROMPTS, write
from published_files import byte_tokenizer, spelled
from safetensors.torch import load_file, save_file
from tiny_pipeline import one_clear_line, seeded
from transformers import Qwen2Config, Qwen2ForCausalLM

import arsd
from arsd.errors import ArsdError, CheckpointError, InputError
from arsd.models.folders import PublishedFiles
from arsd.models.simplear import SIMPLEAR, find_kind, load_simplear, load_tokenizer, vq_source
from arsd.pipelines.simplear import SimpleARPipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def load(folder: Path, **options: Any) -> Any:
    """With the image tokenizer that the fixture has put into the folder, if it is there, unless told otherwise."""
    inside = folder / family.COSMOS
    return SimpleARPipeline.from_pretrained(folder, **({"vq": inside} if inside.is_dir() else {}) | options)


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ----------------------------------------------------------------------------------------------------- what was published


def test_the_configuration_and_the_dtype_are_the_files(samples):
    model = load_simplear(samples.sample("simplear").folder)
    assert model.config.rope_parameters["rope_theta"] == 1e6 and set(model.config.layer_types) == {"full_attention"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    protocol = samples.pipe("simplear").protocol
    assert protocol.sampling == {"guidance_scale": 6.0, "temperature": 1.0} and protocol.negative_prompt == family.NEGATIVE
    assert SimpleARPipeline.default_size == 1024 and isinstance(SIMPLEAR, PublishedFiles)


@pytest.mark.parametrize("slow", [False, True])
def test_the_tokenizer_is_the_same_in_files_of_either_class(tmp_path, slow):
    """The RL weights were saved with transformers' slow tokenizer, which writes no tokenizer.json."""
    words = family.words_of()
    family.write_simplear(tmp_path, words, slow)
    assert (tmp_path / "tokenizer.json").exists() != slow
    assert find_kind(tmp_path) == "simplear"
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(words) and tokenizer.get_vocab() == words
    for text in ("a cat", "né, 12\n  apples<|soi|>x"):
        pieces = text.encode().decode("latin-1") if text == "a cat" else None
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and (pieces is None or ids == spelled(words, pieces))
    reference_cosmos.write_cosmos(tmp_path / family.COSMOS)
    pipe = load(tmp_path, image_size=32, dtype=torch.float64)
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = SimpleARPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    tokens = [p("a cat", generator=seeded(1), output_type="latent", progress=False).tokens for p in (pipe, again)]
    assert torch.equal(*tokens)


def test_the_law_is_upstreams_without_the_words(samples):
    """Guidance on log-probabilities of the whole vocabulary, then only codes: what a word has is lost, all else is kept."""
    sample, pipe = samples.sample("simplear"), samples.pipe("simplear")
    conditional, null = sample.streams("a cat", sample.size)
    out = pipe("a cat", generator=seeded(3), decoder="sjd:window=4", output_type="latent", log_probs=True)
    picture, first = pipe.protocol.local_ids[out.tokens[0]].tolist(), len(sample.parts["words"])
    c, u = (sample.full_logits([*ids, *picture])[-17:-1].log_softmax(-1) for ids in (conditional, null))
    guided = (6.0 * (c - u) + u)[:, first:]
    expected = guided.log_softmax(-1).gather(1, out.tokens[0][:, None])[:, 0]
    assert guided.shape == (16, CODES)
    torch.testing.assert_close(out.log_probs[0].double(), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- captions, negatives


def test_a_caption_is_opened_once_and_a_negative_prompt_replaces_upstreams(samples):
    protocol, words = samples.pipe("simplear").protocol, family.words_of()
    begin, image = words["<|t2i|>"], words["<|soi|>"]
    plain = protocol.prompt_ids("a cat", 64, 64)
    assert plain == protocol.prompt_ids("A highly realistic image of a cat", 64, 64)
    assert protocol.null_ids(64, 64, plain, "dull") == [begin, *spelled(words, "dull"), image]
    assert protocol.null_ids(64, 64, plain, "") == [begin, image]
    with pytest.raises(InputError, match="hold no pictures"):
        protocol.prompt_ids("a cat", 64, 64, [torch.zeros(4, 4)])


def test_negative_prompts_reach_the_law_and_the_record(samples, tmp_path):
    pipe = samples.pipe("simplear")
    call = {"prompt": PROMPTS, "negative_prompt": ["dull", ""], "guidance_scale": 3.0}
    out = pipe(**call, generator=seeded(2), decoder="sjd:window=5")
    plain = pipe(**call, generator=seeded(2), decoder="ar", output_type="latent")
    assert torch.equal(out.tokens, plain.tokens)
    other = pipe(PROMPTS, guidance_scale=3.0, generator=seeded(2), decoder="ar", output_type="latent")
    assert not torch.equal(out.tokens, other.tokens)
    for i, image in enumerate(out.images):
        record = pipe.record(out, i)
        assert record["negative_prompt"] == call["negative_prompt"][i]
        arsd.save_png(image, tmp_path / f"{i}.png", record)
        assert pipe.verify(tmp_path / f"{i}.png").result == "verified"
    arsd.save_png(out.images[0], tmp_path / "x.png", pipe.record(out, 0) | {"negative_prompt": "bright and gaudy"})
    assert pipe.verify(tmp_path / "x.png").result == "refuted"


def test_a_picture_becomes_tokens_and_is_continued(samples):
    sample, pipe = samples.sample("simplear"), samples.pipe("simplear")
    image = torch.rand(1, 3, 64, 64, generator=seeded(4))
    codes = reference_cosmos.encode(sample.parts["vq"], 2 * image - 1)
    assert torch.equal(pipe.encode_image(image), codes.flatten(1))
    out = pipe("a cat", image=image, strength=0.5, generator=seeded(1), decoder="sjd:window=4", output_type="latent")
    assert torch.equal(out.images[0, :2], codes[0, :2]) and not torch.equal(out.images[0], codes[0])
    plain = pipe("a cat", image=image, strength=0.5, generator=seeded(1), decoder="ar", output_type="latent")
    assert torch.equal(out.tokens, plain.tokens)


@pytest.mark.parametrize("size", [(64, 32), (24, 24), (1040, 1040)])
def test_only_squares_can_be_made(samples, size):
    with pytest.raises(ArsdError) as error:
        samples.pipe("simplear")("a cat", height=size[0], width=size[1])
    one_clear_line(error.value, "this model makes square pictures: give height = width, a multiple of 16 in 16..1024")


def test_a_size_that_was_not_trained_is_advised_against(samples):
    protocol = samples.pipe("simplear").protocol
    assert not protocol.advice(64, 64) and "32 x 32 is no size that" in protocol.advice(32, 32)


# ---------------------------------------------------------------------------------------- what a folder is, where things lie


def test_other_models_of_the_same_kind_are_none_of_it_and_soon_told(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    chat = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=2, **sizes))
    chat.save_pretrained(tmp_path)
    words = {word: n for word, n in family.words_of().items() if word not in family.SPECIAL}
    byte_tokenizer(words | {f"word{n}": 300 + n for n in range(150_000)}).save(str(tmp_path / "tokenizer.json"))
    start = time.perf_counter()
    assert find_kind(tmp_path) is None
    assert time.perf_counter() - start < 1
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArsdError) as error:
            load(path)
        one_clear_line(error.value, "nothing that is known" if path == tmp_path else "nowhere")
    byte_tokenizer(words | {"<|t2i|>": 290}).save(str(tmp_path / "tokenizer.json"))  # one of the words is not enough
    assert find_kind(tmp_path) is None
    edit(tmp_path / "config.json", model_type="llama")
    family.write_fast(tmp_path, family.words_of())
    assert find_kind(tmp_path) is None


@pytest.mark.parametrize("place", [".", "vq", family.COSMOS])
def test_programs_in_a_models_folder_are_not_run(tmp_path, place):
    """TorchScript is code, and a folder may come from anybody: only what users put beside it, or name, is loaded."""
    folder = tmp_path / "a" / "b"
    family.write_simplear(folder, family.words_of())
    reference_cosmos.write_cosmos(folder / place, config=False)
    with pytest.raises(CheckpointError) as error:
        vq_source(folder)
    says = "give vq=..., the folder of huggingface.co/nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
    assert says in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    reference_cosmos.write_cosmos(folder.parent / family.COSMOS, config=False)
    assert vq_source(folder).samefile(folder.parent / family.COSMOS)


def test_a_saved_pipeline_runs_no_program_that_nobody_asked_for(samples, tmp_path):
    """Neither by a hub id, nor in the place of another family's image tokenizer."""
    samples.pipe("simplear").save_pretrained(tmp_path / "a")
    assert SimpleARPipeline._check_saved_vq(tmp_path / "a", True) is None
    with pytest.raises(CheckpointError, match="programs: download the folder and give its path if you trust it"):
        SimpleARPipeline._check_saved_vq(tmp_path / "a", False)
    samples.pipe("liquid").save_pretrained(tmp_path / "b")
    edit(tmp_path / "b" / "model_index.json", vq=["arsd.tokenizers.cosmos", "CosmosTokenizer"])
    with pytest.raises(ArsdError) as error:
        arsd.AutoARPipeline.from_pretrained(tmp_path / "b")
    one_clear_line(error.value, "has the image tokenizer CosmosTokenizer, LiquidPipeline wants VQGANTokenizer")


def test_an_image_tokenizer_given_as_folder_or_object_is_part_of_the_model(samples, tmp_path):
    family.write_simplear(tmp_path / "m", family.words_of())
    for seed in (0, 1):
        reference_cosmos.write_cosmos(tmp_path / f"vq{seed}", seed=seed)
    pipes = [load(tmp_path / "m", vq=tmp_path / f"vq{seed}", image_size=64) for seed in (0, 1)]
    assert pipes[0].model_hash != pipes[1].model_hash
    by_object = load(tmp_path / "m", vq=pipes[1].vq, image_size=64)
    assert by_object.vq is pipes[1].vq and by_object.model_hash not in (None, pipes[0].model_hash)
    pipes[0].save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "m", vq=tmp_path / "saved" / "vq", image_size=64)
    assert all(torch.equal(a, b) for a, b in zip(again.vq.parameters(), pipes[0].vq.parameters(), strict=True))


def test_pictures_of_files_in_bfloat16_are_pictures(tmp_path):
    """As NVIDIA's are; the pixels are compared with a reference in double precision, and verified."""
    family.write_simplear(tmp_path, family.words_of())
    state = reference_cosmos.write_cosmos(tmp_path / family.COSMOS, dtype=torch.bfloat16)
    pipe = load(tmp_path, image_size=64)
    assert pipe.vq.dtype == pipe.transformer.dtype == torch.bfloat16
    out = pipe("a cat", generator=seeded(1), progress=False)
    codes = pipe.make_raster().to_codes(out.tokens)
    wanted = (reference_cosmos.decode(state, codes)[0].clamp(-1, 1) + 1) / 2
    found = torch.tensor(list(out.images[0].tobytes())).view(64, 64, 3).permute(2, 0, 1) / 255
    assert (found - wanted).abs().max() < 0.02
    arsd.save_png(out.images[0], tmp_path / "a.png", pipe.record(out, 0))
    assert pipe.verify(tmp_path / "a.png").result == "verified"


def test_layers_on_disk_give_the_same_tokens(samples, tmp_path):
    sample = samples.sample("simplear")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    pipe = sample.load(device_map=places, offload_folder=str(tmp_path))
    call = {"prompt": PROMPTS, "decoder": "sjd:window=6", "output_type": "latent"}
    expected = samples.pipe("simplear")(**call, generator=seeded(3)).tokens
    assert torch.equal(pipe(**call, generator=seeded(3)).tokens, expected)


# ------------------------------------------------------------------------------------------------------------------ errors


def change(folder: Path, key: str, value: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in state.items() if name != key}
    save_file(state | ({} if value is None else {key: value}), folder / "model.safetensors")


KEY = "model.layers.1.self_attn.q_proj.bias"
DAMAGE: dict[str, tuple[Any, str]] = {
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors is truncated"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights, neither model.safetensors nor"),
    "missing key": (lambda f: change(f, KEY, None), f"missing {KEY}"),
    "wrong shape": (lambda f: change(f, KEY, torch.ones(7)), f"{KEY} has shape [7], expected [64]"),
    "surplus key": (lambda f: change(f, "model.extra", torch.ones(7)), "unexpected model.extra"),
    "cut config": (lambda f: cut(f / "config.json"), "config.json is no readable JSON"),
    "odd value": (lambda f: edit(f / "config.json", num_hidden_layers="two"), "config.json is no Qwen2Config"),
    "other width": (lambda f: edit(f / "config.json", hidden_size=128), "is no Qwen2ForCausalLM ("),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json: download it with the weights"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json is no readable tokenizer"),
    "other codes": (lambda f: reference_cosmos.write_cosmos(f / family.COSMOS, (4, 4, 4)), "image tokenizer 64 codes"),
    "no decoder": (lambda f: shutil.rmtree(f / family.COSMOS), "comes without an image tokenizer: give vq="),
    "no encoder": (lambda f: (f / family.COSMOS / "encoder.jit").unlink(), "encoder.jit is not a file"),
    "cut decoder": (lambda f: cut(f / family.COSMOS / "decoder.jit"), "decoder.jit is truncated"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_wrong_files_are_one_clear_line(tmp_path, what):
    damage, says = DAMAGE[what]
    write("simplear", tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)


def test_the_tokenizer_of_another_model_is_refused(samples, tmp_path):
    folder = samples.sample("simplear").folder
    words = family.words_of()
    fewer = {word: n for word, n in words.items() if word != "<|sov|>"}
    byte_tokenizer(fewer).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ArsdError) as error:
        load(folder, tokenizer=tmp_path)
    says = "265 words, the image tokenizer 32 codes, the network 298 of both together: one of them is another model's"
    one_clear_line(error.value, says)
    byte_tokenizer({word: n for word, n in words.items() if word not in family.SPECIAL}).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ArsdError) as error:
        load(folder, tokenizer=tmp_path)
    one_clear_line(error.value, "the tokenizer has no <|t2i|>, <|soi|>: it belongs to another model")


def test_a_slow_tokenizer_that_is_damaged_is_named(tmp_path):
    family.write_simplear(tmp_path, family.words_of(), slow=True)
    cut(tmp_path / "vocab.json")
    with pytest.raises(CheckpointError, match=r"vocab.json and merges.txt are no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_the_folder_of_another_family_is_refused(samples):
    for kind in ("anole", "liquid"):
        with pytest.raises(ArsdError) as error:
            load(samples.sample(kind).folder)
        one_clear_line(error.value, "holds nothing that is known, not those of SimpleARPipeline")
