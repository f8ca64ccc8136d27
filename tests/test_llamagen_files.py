"""Published LlamaGen files load, compute what upstream computes, and are written back bit for bit."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.llamagen_files import PUBLISHED_HEADS, read_state_dict, transformer_config
from arsd.tokenizers.vq import VQTokenizer


def _load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_llamagen", Path(__file__).with_name("reference_llamagen.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()
GRID, HEADS = 3, 4
TINY = {"grid": GRID, "num_heads": HEADS}


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and left[k].equal(right[k]) for k in left)


def ids_for(batch: int) -> Tensor:
    return torch.randint(48, (batch, GRID * GRID), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- the transformer computes


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("width", [64, 48])  # 48: head_dim 12, not a power of two, like 3B's 100
@torch.no_grad()
def test_class_conditional_logits_are_upstreams(tmp_path: Path, kv_heads: int, width: int) -> None:
    state = reference.transformer_state(width=width, layers=3, kv_heads=kv_heads)
    model = LlamaGenTransformer.from_single_file(saved({"model": state}, tmp_path / "a.pt"), **TINY)
    labels, ids = torch.tensor([3, 0, 10]), ids_for(3)
    expected = reference.logits(state, HEADS, GRID, reference.class_slots(state, labels), ids)
    found = model(model.embed_classes(labels), ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_text_conditional_logits_are_upstreams_under_left_padding(tmp_path: Path, kv_heads: int) -> None:
    state = reference.transformer_state(text=True, layers=3, kv_heads=kv_heads)
    model = LlamaGenTransformer.from_single_file(saved({"model": state}, tmp_path / "a.pt"), **TINY)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    features = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(2))
    ids = ids_for(4)
    slots = reference.caption_slots(state, features * mask[..., None])
    expected = reference.logits(state, HEADS, GRID, slots, ids, mask)
    found = model(model.embed_captions(features, mask), ids, mask)
    assert found.isfinite().all()
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    unmasked = reference.logits(state, HEADS, GRID, slots, ids)
    assert (unmasked - expected)[0].abs().max() > 1e-2  # the mask matters, so the parity above says something


@torch.no_grad()
def test_null_caption_reuses_the_padding_mask_of_the_caption(tmp_path: Path) -> None:
    state = reference.transformer_state(text=True)
    model = LlamaGenTransformer.from_single_file(saved({"model": state}, tmp_path / "a.pt"), **TINY)
    mask, ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]), ids_for(2)
    slots = reference.caption_slots(state, state["cls_embedding.uncond_embedding"]).expand(2, -1, -1)
    expected = reference.logits(state, HEADS, GRID, slots, ids, mask)
    found = model(model.embed_null_caption(2), ids, mask)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (model(model.embed_null_caption(2), ids) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_a_loaded_model_decodes_in_evaluation_mode_and_trains_afterwards(tmp_path: Path) -> None:
    path = saved({"model": reference.transformer_state()}, tmp_path / "a.pt")
    model = LlamaGenTransformer.from_single_file(path, **TINY)
    assert not model.training
    assert all(p.requires_grad and p.is_contiguous() and p.device.type == "cpu" for p in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    path.write_bytes(b"")  # weights are copies, not windows into the file
    assert model(model.embed_classes(torch.tensor([1])), ids_for(1)).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- containers


def _containers(state: dict[str, Tensor]) -> dict[str, object]:
    return {
        "model": {"model": state},
        "module": {"module": state, "global_steps": 7},
        "state_dict": {"state_dict": state},
        "bare": state,
        "training": {
            "model": state,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
            "steps": 100,
            "args": argparse.Namespace(gpt_model="GPT-B", image_size=256, betas=(0.9, 0.95)),
        },
        "stray": {
            "model": state | {"freqs_cis": torch.zeros(9, 8, 2), "layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
        },
    }


@pytest.mark.parametrize("name", list(_containers({})))
def test_every_container_gives_the_same_model(tmp_path: Path, name: str) -> None:
    state = reference.transformer_state()
    model = LlamaGenTransformer.from_single_file(saved(_containers(state)[name], tmp_path / "a.pt"), **TINY)
    model.save_single_file(tmp_path / "b.pt")
    assert same(read_state_dict(tmp_path / "b.pt"), state)


def test_safetensors_and_pre_zip_pickles_load_too(tmp_path: Path) -> None:
    state = reference.transformer_state()
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "old.pth"):
        model = LlamaGenTransformer.from_single_file(tmp_path / name, **TINY)
        model.save_single_file(tmp_path / "out.pt")
        assert same(read_state_dict(tmp_path / "out.pt"), state)


# ------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("text", "kv_heads"), [(False, 4), (True, 4), (False, 2)])
def test_saving_and_loading_a_transformer_is_bit_exact(tmp_path: Path, suffix: str, text: bool, kv_heads: int) -> None:
    state = reference.transformer_state(text=text, kv_heads=kv_heads)
    first = LlamaGenTransformer.from_single_file(saved({"model": state}, tmp_path / "a.pt"), **TINY)
    first.save_single_file(tmp_path / f"b{suffix}")
    second = LlamaGenTransformer.from_single_file(tmp_path / f"b{suffix}", **TINY)
    assert same(first.state_dict(), second.state_dict())
    assert dict(first.config) == dict(second.config)
    assert same(read_state_dict(tmp_path / f"b{suffix}"), state)
    assert torch.equal(first.lm.model.rotary_emb.cos, second.lm.model.rotary_emb.cos)


def test_condition_keys_are_ours_alone(tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "grid": 4}
    model = LlamaGenTransformer(**sizes, condition="text", condition_tokens=3, caption_dim=8, condition_keys=True)
    table, upstream = model.lm.model.rotary_emb, LlamaGenTransformer(**sizes, condition_tokens=3).lm.model.rotary_emb
    assert torch.equal(table.cos[:3], torch.ones(3, 16)) and not table.sin[:3].any()
    assert not upstream.cos[:3].any() and not upstream.sin[:3].any()
    assert torch.equal(table.cos[3:], upstream.cos[3:]) and torch.equal(table.sin[3:], upstream.sin[3:])
    with pytest.raises(InputError, match="condition_keys"):
        model.save_single_file(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saving_and_loading_a_tokenizer_is_bit_exact(tmp_path: Path, suffix: str) -> None:
    state = reference.vq_state()
    first = VQTokenizer.from_single_file(saved({"model": state}, tmp_path / "a.pt"))
    first.save_single_file(tmp_path / f"b{suffix}")
    second = VQTokenizer.from_single_file(tmp_path / f"b{suffix}")
    assert same(first.state_dict(), second.state_dict())
    assert dict(first.config) == dict(second.config)
    assert same(read_state_dict(tmp_path / f"b{suffix}"), state)  # with codebook_used, on which upstream insists


def test_a_save_that_fails_leaves_the_older_file_and_no_rubbish(tmp_path: Path) -> None:
    path = saved({"model": reference.transformer_state()}, tmp_path / "a.pt")
    model = LlamaGenTransformer.from_single_file(path, **TINY)
    before = path.read_bytes()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        model.save_single_file(tmp_path / "folder")
    del model.lm.lm_head
    with pytest.raises(KeyError):
        model.save_single_file(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "folder"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_the_files_unless_another_is_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    state = {key: value.to(stored) for key, value in reference.transformer_state().items()}
    path = saved(state, tmp_path / "a.pt")
    for asked in (None, torch.float16):
        model = LlamaGenTransformer.from_single_file(path, dtype=asked, **TINY)
        assert {parameter.dtype for parameter in model.parameters()} == {asked or stored}
        assert model.lm.model.rotary_emb.cos.dtype == torch.float32
    vq = VQTokenizer.from_single_file(saved(reference.vq_state(), tmp_path / "vq.pt"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in vq.parameters()} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("width", "layers", "heads", "mlp"),
    [
        (768, 12, 12, 2048),
        (1024, 24, 16, 2816),
        (1280, 36, 20, 3584),
        (1536, 48, 24, 4096),
        (2560, 48, 40, 6912),
        (2048, 22, 32, 5632),
        (3200, 24, 32, 8704),
        (4096, 32, 32, 11008),
    ],
)
def test_published_sizes_tell_their_heads(width: int, layers: int, heads: int, mlp: int) -> None:
    with torch.device("meta"):
        state = {
            "tok_embeddings.weight": torch.empty(16384, width),
            "cls_embedding.embedding_table.weight": torch.empty(1001, width),
            "layers.0.attention.wqkv.weight": torch.empty(3 * width, width),
            "layers.0.feed_forward.w1.weight": torch.empty(mlp, width),
            f"layers.{layers - 1}.ffn_norm.weight": torch.empty(width),
        }
    config = transformer_config(state, "x_384.pt")
    wanted = {"num_heads": heads, "num_layers": layers, "intermediate_size": mlp, "grid": 24, "num_key_value_heads": None}
    assert config.items() >= wanted.items()
    assert (config["vocab_size"], config["condition"], config["num_classes"]) == (16384, "class", 1000)
    assert PUBLISHED_HEADS[width, layers] == heads
    assert transformer_config(state, "x.pt", num_heads=width // 4)["num_heads"] == width // 4  # the argument wins


def test_the_whole_config_follows_from_the_shapes(tmp_path: Path) -> None:
    classes = LlamaGenTransformer.from_single_file(
        saved(reference.transformer_state(kv_heads=2, layers=3), tmp_path / "c.pt"), **TINY
    )
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "grid": 3, "condition_tokens": 1}
    assert classes.config.items() >= (sizes | {"num_layers": 3, "num_key_value_heads": 2, "num_classes": 10}).items()
    text = LlamaGenTransformer.from_single_file(saved(reference.transformer_state(text=True), tmp_path / "t.pt"), **TINY)
    assert text.config.items() >= {"condition": "text", "condition_tokens": 5, "caption_dim": 24, "num_layers": 2}.items()
    state = reference.vq_state(multiplier=(1, 1, 3), blocks=2, z=20)
    vq = VQTokenizer.from_single_file(saved(state, tmp_path / "vq.pt"))
    assert vq.downsample_factor == 4
    assert tuple(vq.config["channel_multiplier"]) == (1, 1, 3)
    sizes = {"codebook_size": 40, "codebook_dim": 8, "latent_channels": 20, "base_channels": 32, "num_res_blocks": 2}
    assert vq.config.items() >= sizes.items()


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("c2i_B_256.pt", 16),
        ("c2i_3B_384.pt", 24),
        ("t2i_XL_stage2_512.pt", 32),
        ("c2i_B_ds8_256.pt", 32),
        ("mine.pt", 16),
        ("mine_ds8.pt", 32),
        ("run_2560.pt", 16),
    ],
)
def test_the_file_name_tells_the_grid_and_the_argument_wins(tmp_path: Path, name: str, grid: int) -> None:
    path = saved(reference.transformer_state(), tmp_path / name)
    assert LlamaGenTransformer.from_single_file(path, num_heads=HEADS).config["grid"] == grid
    assert LlamaGenTransformer.from_single_file(path, num_heads=HEADS, grid=5).config["grid"] == 5


# -------------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(("multiplier", "blocks"), [((1, 2), 1), ((1, 1, 2), 2)])
def test_tokenizer_decodes_and_encodes_as_upstream_does(tmp_path: Path, multiplier: tuple[int, ...], blocks: int) -> None:
    state = reference.vq_state(multiplier=multiplier, blocks=blocks)
    vq = VQTokenizer.from_single_file(saved({"model": state}, tmp_path / "vq.pt"))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (2, 4, 6), generator=generator)  # not square
    torch.testing.assert_close(vq.decode(ids), reference.vq_decode(state, ids), atol=5e-5, rtol=0)
    images = torch.rand(2, 3, 32, 24, generator=generator) * 2 - 1
    expected = reference.vq_encode(state, images)
    assert expected.unique().numel() > 3
    assert vq.encode(images).equal(expected)
    plain = reference.vq_encode(state, images, normalise=False)
    assert (plain != expected).float().mean() > 0.05  # look-up without the normalisation would be another code


# ----------------------------------------------------------------------------------------------------------------- errors


def _damaged(kind: str, folder: Path, state: dict[str, Tensor], key: str) -> Path:
    path = saved({"model": state}, folder / "a.pt")
    data = path.read_bytes()
    if kind == "missing file":
        return folder / "nowhere.pt"
    if kind == "folder":
        return folder
    if kind == "half a safetensors":
        path = folder / "a.safetensors"
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-100])
        return path
    if kind == "pre-zip, cut":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-2000])
        return path
    contents = {
        "half a file": data[: len(data) // 2],
        "tail cut": data[:-10],
        "empty": b"",
        "text": b"version https://git-lfs",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
        return path
    objects: dict[str, object] = {
        "foreign object": {"model": state, "hook": os.path.join},
        "foreign class": {"model": state, "where": Path("x")},
        "no tensors": {"model": {"a": 1}},
        "list": [1, 2],
        "missing key": {k: v for k, v in state.items() if k != key},
        "unexpected key": state | {"lora.weight": torch.zeros(2)},
        "wrong shape": state | {key: torch.zeros(7, 7)},
        "integers": state | {key: torch.zeros(state[key].shape, dtype=torch.int8)},
        "wrong axes": state | {k: v.flatten() for k, v in state.items() if k.startswith(("tok_emb", "quantize.embed"))},
    }
    return saved(objects[kind], path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing file", "not a file"),
        ("folder", "not a file"),
        ("half a file", "truncated"),
        ("tail cut", "truncated"),
        ("half a safetensors", "truncated"),
        ("pre-zip, cut", "truncated"),
        ("empty", "truncated"),
        ("text", "no weight file"),
        ("foreign object", "path.join"),
        ("foreign class", "not safe to load"),
        ("no tensors", "no tensors"),
        ("list", "no tensors"),
        ("missing key", "missing {key}"),
        ("unexpected key", "unexpected lora.weight"),
        ("wrong shape", "{key} has shape [7, 7], expected {shape}"),
        ("integers", "{key} has dtype torch.int8"),
        ("wrong axes", "expected 2 axes"),
    ],
)
@pytest.mark.parametrize("what", ["transformer", "tokenizer"])
def test_a_bad_file_is_one_clear_line(tmp_path: Path, what: str, kind: str, says: str) -> None:
    if what == "transformer":
        state, key = reference.transformer_state(), "layers.1.attention.wo.weight"
    else:
        state, key = reference.vq_state(), "decoder.conv_blocks.1.res.0.conv2.weight"
    path = _damaged(kind, tmp_path, state, key)
    with pytest.raises(CheckpointError) as error:
        if what == "transformer":
            LlamaGenTransformer.from_single_file(path, **TINY)
        else:
            VQTokenizer.from_single_file(path)
    message = str(error.value)
    assert says.format(key=key, shape=list(state[key].shape)) in message
    assert str(path) in message
    assert "\n" not in message and "\033" not in message and len(message) < 300 + 2 * len(str(path))


def test_long_lists_of_keys_are_cut_after_five(tmp_path: Path) -> None:
    state = {k: v for k, v in reference.transformer_state().items() if not k.startswith("layers.0.f")}
    state["layers.0.feed_forward.w1.weight"] = torch.zeros(96, 64)
    extra = {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"missing layers.0.*; unexpected extra.0, .*, extra.4 and 4 more\)"):
        LlamaGenTransformer.from_single_file(saved(state | extra, tmp_path / "a.pt"), **TINY)


def test_an_unpublished_size_asks_for_num_heads(tmp_path: Path) -> None:
    path = saved(reference.transformer_state(kv_heads=2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="num_heads"):
        LlamaGenTransformer.from_single_file(path, grid=GRID)
    for wrong in (3, 32, 1, -1):  # does not divide; head_dim 2; wqkv does not fit; nonsense
        with pytest.raises(CheckpointError, match="give the right num_heads"):
            LlamaGenTransformer.from_single_file(path, grid=GRID, num_heads=wrong)
    with pytest.raises(InputError, match="grid"):
        LlamaGenTransformer.from_single_file(path, grid=0, num_heads=HEADS)


def test_a_file_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tok_embeddings.weight is missing"):
        LlamaGenTransformer.from_single_file(saved(reference.vq_state(), tmp_path / "vq.pt"), **TINY)
    with pytest.raises(CheckpointError, match="quantize.embedding.weight is missing"):
        VQTokenizer.from_single_file(saved(reference.transformer_state(), tmp_path / "gpt.pt"))


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "boom"),)

    path = saved({"model": reference.transformer_state(), "x": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="mkdir, which is not safe to load"):
        LlamaGenTransformer.from_single_file(path, **TINY)
    assert not (tmp_path / "boom").exists()
