"""Published folders of Lumina-mGPT, Anole and Chameleon load unchanged and compute what was published."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import published_chameleon as published
import pytest
import reference_chameleon as reference
import torch
from published_chameleon import WRITERS, near, warnings_of
from published_chameleon import some_ids as ids_for
from reference_vqgan import movq_state, vqgan_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from arsd.errors import CheckpointError, InputError
from arsd.models.chameleon_files import KINDS, find_kind, load_chameleon, load_tokenizer, vqgan_source

load = partial(load_chameleon, dtype=torch.float32)


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; ``None`` removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ---------------------------------------------------------------------------------------------------- the network computes


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lumina-mgpt", {"mp": 1}),
        ("lumina-mgpt", {"mp": 2, "shards": 1}),
        ("lumina-mgpt", {"mp": 4, "shards": 3}),
        ("lumina-mgpt", {"mp": 2, "kv_heads": 2, "swin": True}),
        ("lumina-mgpt", {"suffix": ".bin"}),
        ("lumina-mgpt", {"suffix": ".bin", "shards": 1}),
        ("lumina-mgpt-2", {}),
        ("anole", {}),
        ("anole", {"shards": 1, "suffix": ".bin"}),
        ("chameleon", {}),
        ("anole-meta", {}),
        ("anole-meta", {"fused": True, "kv_heads": 2, "theta": 5e4}),
        ("anole-meta", {"shards": 4, "swin": True}),
        ("anole-meta", {"shards": 2, "fused": True, "kv_heads": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
@torch.no_grad()
def test_every_published_layout_computes_what_was_published(tmp_path, kind, options):
    state = WRITERS[kind](tmp_path, **options)
    assert find_kind(tmp_path) == kind
    with warnings_of("transformers") as messages:
        model = load(tmp_path)
    ids = ids_for()
    expected = reference.logits(state, ids, theta=options.get("theta", 1e4), swin=options.get("swin", False))
    assert expected.std() > 1
    near(model(ids).logits, expected)
    assert messages == []
    assert not model.training
    assert not hasattr(model.model, "vqmodel")


@torch.no_grad()
def test_the_parity_would_see_heads_of_another_shard_and_channels_of_the_other_layout(tmp_path):
    state = published.write_lumina(tmp_path / "a", mp=2)
    ids, found = ids_for(), load(tmp_path / "a")(ids_for()).logits
    swapped = {k: v.flip(0) if "_norm." in k and v.ndim == 2 else v for k, v in state.items()}
    in_turns = {k: v.repeat(2, 1) if "_norm." in k and v.ndim == 2 else v for k, v in state.items()}  # shard h % 2
    for wrong in (swapped, in_turns):
        assert (reference.logits(wrong, ids) - found).abs().max() > 1e-2
    meta = published.write_anole_meta(tmp_path / "b")
    names = dict(zip(reference.META.values(), reference.HF.values(), strict=True))
    as_hf = {}
    for key, value in meta.items():
        layer = re.match(r"layers\.(\d+)\.", key)
        stem, end = key[layer.end() if layer else 0 :].rsplit(".", 1)
        as_hf[(f"model.layers.{layer[1]}." if layer else "") + f"{names[stem]}.{end}"] = value
    assert (reference.logits(as_hf, ids) - load(tmp_path / "b")(ids).logits).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------------- how it is loaded


@pytest.mark.parametrize("kind", ["lumina-mgpt", "anole-meta"])
def test_the_file_tells_the_dtype_and_weights_are_copies(tmp_path, kind):
    WRITERS[kind](tmp_path, dtype=torch.float16)
    for options, expected in (
        ({}, torch.float16),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": torch.float32}, torch.float32),
    ):
        model = load_chameleon(tmp_path, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model.config.dtype == expected
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(p.requires_grad and p.is_contiguous() and p.device.type == "cpu" for p in model.parameters())
    for path in [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.pth")]:
        path.write_bytes(b"")  # weights are copies, not windows into the file
    assert model(ids_for()).logits.isfinite().all()


def test_options_go_to_transformers(tmp_path):
    published.write_lumina(tmp_path)
    model = load(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    near(model(ids_for()).logits, load(tmp_path)(ids_for()).logits)
    assert model.config.name_or_path == str(tmp_path)


@pytest.mark.parametrize("kind", ["lumina-mgpt", "anole-meta"])
@torch.no_grad()
def test_a_layer_on_disk_gives_the_same_logits(tmp_path, kind):
    WRITERS[kind](tmp_path / "a")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = load(tmp_path / "a", device_map=device_map, offload_folder=tmp_path / "off")
    assert {p.device.type for p in model.model.layers[1].parameters()} == {"meta"}
    assert len(list((tmp_path / "off").glob("*layers.1*"))) == 13
    near(model(ids_for()).logits, load(tmp_path / "a")(ids_for()).logits)
    with pytest.raises(InputError, match=r"give offload_folder=\.\.\."):
        load(tmp_path / "a", device_map=device_map)
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "a", device_map="nowhere")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("kind", "dtype"), [("lumina-mgpt", None), ("lumina-mgpt", "float32"), ("anole-meta", None)])
def test_loading_takes_the_memory_of_the_model_and_hardly_more(tmp_path, monkeypatch, kind, dtype):
    for name, value in (("WIDTH", 1024), ("HIDDEN", 2752), ("HEADS", 8)):
        monkeypatch.setattr(published, name, value)
    layout: Any = {"fused": True} if kind == "anole-meta" else {"mp": 2, "shards": 3 if dtype else 1}
    WRITERS[kind](tmp_path, codes=40000, **layout)
    script = f"""
import threading, time, torch
from arsd.models.chameleon_files import find_kind, load_chameleon
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
start = anonymous()
seen = [start]
def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
find_kind({str(tmp_path)!r})
kind = max(seen) - start
model = load_chameleon({str(tmp_path)!r}, dtype={"torch." + dtype if dtype else None})
time.sleep(0.01)
print(kind, max(seen) - start, sum(p.nbytes for p in model.parameters()), len(seen))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    kind_peak, peak, size, looks = (int(number) for number in done.stdout.split()[-4:])
    assert size > 200e6
    assert looks > 20
    assert kind_peak < 0.1 * size
    assert peak < 1.35 * size, f"{peak / size:.2f} times the weights"


# ------------------------------------------------------------------------------------------------------------------ config


def test_the_config_says_what_the_weights_are(tmp_path):
    published.write_lumina(tmp_path / "a", mp=2, kv_heads=2)
    config = load_chameleon(tmp_path / "a").config
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert config.to_dict().items() >= (sizes | {"num_key_value_heads": 2, "model_parallel_size": 2}).items()
    assert config.to_dict().items() >= {"dropout": 0.05, "z_loss_weight": 1e-05, "mask_image_logits": False}.items()
    assert config.vocabulary_map[published.code_word(13)] == 17
    assert config.image_token_id == config.vocabulary_map["<image>"]
    published.write_anole_meta(tmp_path / "b", theta=2e4, swin=True, kv_heads=1)
    for folder in (tmp_path / "b", tmp_path / "b" / "models" / "7b"):  # the root, or the folder of the weights
        config = load_chameleon(folder).config
        told = {"num_key_value_heads": 1, "swin_norm": True, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5}
        assert config.to_dict().items() >= (sizes | told | {"model_parallel_size": 1}).items()
        assert config.rope_parameters["rope_theta"] == 2e4
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
        words = published.vocabulary()
        assert config.vocabulary_map == words | {"<image>": words["<reserved08707>"]}


# --------------------------------------------------------------------------------------------------------- what a folder is


def test_kinds_are_told_by_content_and_not_by_names(tmp_path):
    for i, (kind, write) in enumerate(WRITERS.items()):
        folder = tmp_path / str(i)
        write(folder)
        assert find_kind(folder) == kind
        for path in folder.glob("*-of-*.safetensors"):
            path.unlink()  # the index alone tells
        assert find_kind(folder) == kind
    assert tuple(WRITERS) == KINDS
    assert find_kind(tmp_path / "3" / "models" / "7b") == "anole-meta"
    edit(tmp_path / "0" / "config.json", model_type="chameleon_xllmx")
    assert find_kind(tmp_path / "0") == "lumina-mgpt"
    for size, kind in ((65536, "lumina-mgpt"), (171385, "lumina-mgpt-2")):  # a config without names
        edit(tmp_path / "0" / "config.json", vocabulary_map=None, vocab_size=size)
        assert find_kind(tmp_path / "0") == kind


def test_other_folders_are_none_of_these(tmp_path):
    assert find_kind(tmp_path) is None
    assert find_kind(tmp_path / "nowhere") is None
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(4, 4)}}, tmp_path / "c2i_B_256.pt")
    assert find_kind(tmp_path) is None
    assert find_kind(tmp_path / "c2i_B_256.pt") is None
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "llama")
    assert find_kind(tmp_path / "llama") is None
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / "meta-llama" / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}')
    torch.save({"tok_embeddings.weight": torch.zeros(4, 4)}, tmp_path / "meta-llama" / "consolidated.00.pth")
    assert find_kind(tmp_path / "meta-llama") is None
    for load_from in (load_chameleon, vqgan_source, load_tokenizer):
        with pytest.raises(CheckpointError) as error:
            load_from(tmp_path / "meta-llama")
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- image tokenizer, text tokenizer


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("lumina-mgpt", "chameleon") for name in ("vqgan.ckpt", "tokenizer/vqgan.ckpt")),
        ("lumina-mgpt", "chameleon/tokenizer/vqgan.ckpt"),
        ("lumina-mgpt", "../chameleon/tokenizer/vqgan.ckpt"),
        ("lumina-mgpt-2", "movqgan_270M.ckpt"),
        ("lumina-mgpt-2", "../movqgan/270M/movqgan_270M.ckpt"),
    ],
)
def test_the_image_tokenizer_is_found_where_upstream_has_it(tmp_path, kind, name):
    folder = tmp_path / "x"
    WRITERS[kind](folder)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder))} holds .*huggingface.co/.*vq=") as error:
        vqgan_source(folder)
    assert Path(name).name in str(error.value)
    assert ("only the encoder" in str(error.value)) == (kind == "chameleon")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    found = vqgan_source(folder)
    assert isinstance(found, Path) and found.samefile(path)


def test_the_image_tokenizer_of_an_anole_lies_among_its_weights(tmp_path):
    own = vqgan_state(**published.VQ_SIZES, codes=20, seed=3)
    published.write_anole(tmp_path / "a", vq_state=own)
    found = vqgan_source(tmp_path / "a")
    assert found.keys() == {f"model.vqmodel.{key}" for key in own}
    assert all(torch.equal(found[f"model.vqmodel.{key}"], value.bfloat16()) for key, value in own.items())
    published.write_anole_meta(tmp_path / "b", vq_state=own)
    for folder in (tmp_path / "b", tmp_path / "b" / "models" / "7b"):
        assert vqgan_source(folder).samefile(tmp_path / "b" / "tokenizer" / "vqgan.ckpt")
    published.write_lumina(tmp_path / "c", vq_state=own)
    assert vqgan_source(tmp_path / "c") == tmp_path / "c" / "vqgan.ckpt"
    published.write_lumina2(tmp_path / "d", first_code=4000, vq_state=movq_state(mult=(1, 1), blocks=1))
    assert vqgan_source(tmp_path / "d") == tmp_path / "d" / "movqgan_270M.ckpt"


def test_text_tokenizers_know_their_words(tmp_path):
    for kind in KINDS:
        WRITERS[kind](tmp_path / kind)
        with warnings_of("transformers") as messages:
            tokenizer = load_tokenizer(tmp_path / kind)
        assert messages == []
        words = tokenizer.get_vocab()
        ids = tokenizer.encode("né<reserved08706><racm3:break><reserved08804>", add_special_tokens=False)
        assert ids[3:] == [words["<reserved08706>"], words["<racm3:break>"], words["<reserved08804>"]]
        assert tokenizer.decode(ids[:3]) == "né"
        ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
        second = kind == "lumina-mgpt-2"
        assert ends == ([None, "<|endoftext|>", "<|endoftext|>"] if second else ["<s>", "</s>", "<pad>"])
    (tmp_path / "lumina-mgpt" / "tokenizer.json").unlink()  # Meta's, beside the folder
    (tmp_path / "anole-meta" / "tokenizer").rename(tmp_path / "tokenizer")
    for folder in (tmp_path / "lumina-mgpt", tmp_path / "anole-meta", tmp_path / "anole-meta" / "models" / "7b"):
        if folder.name != "7b":
            assert load_tokenizer(folder).get_vocab() == published.vocabulary()
    (tmp_path / "tokenizer" / "text_tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"text_tokenizer.json is no readable tokenizer"):
        load_tokenizer(tmp_path / "anole-meta")
    (tmp_path / "tokenizer" / "text_tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer/text_tokenizer.json"):
        load_tokenizer(tmp_path / "anole-meta")


# -------------------------------------------------------------------------------------------------------------------- errors


def _change_shard(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    state = load_file(path)
    change(state)
    save_file({key: value.clone() for key, value in state.items()}, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


KEY = "model.layers.1.mlp.down_proj.weight"
SHARD = "model-00002-of-00002.safetensors"
HF_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "neither a config.json nor Meta's params.json"),
    "config cut": (lambda f: _cut(f / "config.json"), "config.json is no readable JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json holds no JSON object"),
    "llama": (lambda f: edit(f / "config.json", model_type="llama"), "must be 'chameleon', not 'llama'"),
    "odd value": (lambda f: edit(f / "config.json", num_hidden_layers="two"), "no config of a Chameleon"),
    "odd heads": (lambda f: edit(f / "config.json", num_attention_heads=3), "no config of a Chameleon"),
    "odd shards": (lambda f: edit(f / "config.json", model_parallel_size=3), "do not fit together"),
    "other shards": (lambda f: edit(f / "config.json", model_parallel_size=2), "shape [1, 16], expected [2, 16]"),
    "other vocabulary": (lambda f: edit(f / "config.json", vocab_size=500), "embed_tokens.weight has shape [341, 64]"),
    "other width": (lambda f: edit(f / "config.json", hidden_size=128), "expected [341, 128]"),
    "fewer layers": (lambda f: edit(f / "config.json", num_hidden_layers=1), "unexpected model.layers.1."),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "missing model.layers.2."),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has no weights, neither model.safetensors nor"),
    "absent shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} is not a file"),
    "cut shard": (lambda f: _cut(f / SHARD), f"{SHARD} is truncated"),
    "cut index": (lambda f: _cut(f / "model.safetensors.index.json"), "index.json is no readable JSON"),
    "no map": (lambda f: edit(f / "model.safetensors.index.json", weight_map=None), "index.json has no weight_map"),
    "missing key": (lambda f: _change_shard(f, lambda s: s.pop(KEY)), f"missing {KEY}"),
    "unexpected key": (lambda f: _change_shard(f, lambda s: s.update(x=torch.ones(1))), "unexpected x"),
    "wrong shape": (
        lambda f: _change_shard(f, lambda s: s.update({KEY: torch.ones(7, 7)})),
        f"{KEY} has shape [7, 7], expected [64, 192]",
    ),
    "integers": (lambda f: _change_shard(f, lambda s: s.update({KEY: s[KEY].int()})), f"{KEY} has dtype torch.int32"),
}
META = "models/7b/"
META_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "params cut": (lambda f: _cut(f / META / "params.json"), "params.json is no readable JSON"),
    "no width": (lambda f: edit(f / META / "params.json", model={"swin_norm": False}), "does not give the sizes"),
    "odd width": (
        lambda f: edit(f / META / "params.json", model={"swin_norm": False, "dim": "x", "n_layers": 2, "n_heads": 4}),
        "does not give the sizes",
    ),
    "other layers": (lambda f: edit(f / META / "consolidate_params.json", n_layers=3), "missing layers.2."),
    "other hidden": (lambda f: edit(f / META / "consolidate_params.json", multiple_of=64 * 5), "w1.weight has shape"),
    "no weights": (lambda f: (f / META / "consolidated.pth").unlink(), "consolidated.pth is not a file"),
    "cut": (lambda f: _cut(f / META / "consolidated.pth"), "consolidated.pth is truncated"),
    "other count": (lambda f: edit(f / META / "consolidate_params.json", model_parallel_size=2), "speaks of 2 shards"),
    "no vocabulary": (lambda f: (f / "tokenizer/text_tokenizer.json").write_text("{}"), "no readable tokenizer"),
}


@pytest.mark.parametrize("what", [*(f"hf: {name}" for name in HF_DAMAGE), *(f"meta: {name}" for name in META_DAMAGE)])
def test_a_bad_folder_is_one_clear_line(tmp_path, what):
    layout, _, name = what.partition(": ")
    damage, says = (HF_DAMAGE if layout == "hf" else META_DAMAGE)[name]
    WRITERS["lumina-mgpt" if layout == "hf" else "anole-meta"](tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    message = str(error.value)
    assert says in message
    assert str(tmp_path) in message
    assert "\n" not in message and "\033" not in message and len(message) < 330 + 2 * len(str(tmp_path))


def test_several_models_in_metas_layout_ask_for_one(tmp_path):
    for size in ("7b", "30b"):
        published.write_anole_meta(tmp_path, size=size)
    with pytest.raises(InputError, match=r"several models: give one of .*models/30b, .*models/7b"):
        load(tmp_path)
    assert load_chameleon(tmp_path / "models" / "7b").dtype == torch.bfloat16
