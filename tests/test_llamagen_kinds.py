"""LlamaGen weights are told by their keys, in files and in the folders of the hub, whose config.json tells the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference_llamagen as reference
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from arsd.errors import CheckpointError
from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.llamagen_files import llamagen_kind, load_transformer, load_vq
from arsd.models.weight_files import read_state_dict
from arsd.tokenizers.vq import VQTokenizer

CLASSES, CAPTIONS, CODES = reference.transformer_state(), reference.transformer_state(text=True), reference.vq_state()
STATES = {"classes": CLASSES, "captions": CAPTIONS, "codes": CODES}
KINDS = {"classes": "transformer", "captions": "transformer", "codes": "vq"}


@dataclass
class TransformerArgs:
    """The fields of upstream's ModelArgs that matter here."""

    dim: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int | None = None
    rope_base: float = 10000
    norm_eps: float = 1e-5
    model_type: str = "c2i"
    vocab_size: int = 48
    cls_token_num: int = 1
    block_size: int = 9


@dataclass
class VQArgs:
    codebook_size: int = 40
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    z_channels: int = 16


class _Weights(nn.Module):
    """Modules of nothing but parameters, with the names of ``state``."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in state.items():
            *path, name = key.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(name, tensor)


class TransformerHF(_Weights, PyTorchModelHubMixin):
    def __init__(self, config: TransformerArgs, state: dict[str, Tensor] | None = None) -> None:
        super().__init__(state or {})


class VQModelHF(_Weights, PyTorchModelHubMixin):
    def __init__(self, config: VQArgs, state: dict[str, Tensor] | None = None) -> None:
        super().__init__(state or {})


def hub_folder(folder: Path, name: str = "classes", **changes: object) -> Path:
    """What push_to_hub of upstream's mixin classes writes."""
    if name == "codes":
        VQModelHF(VQArgs(**changes), CODES).save_pretrained(folder)
    else:
        TransformerHF(TransformerArgs(**changes), STATES[name]).save_pretrained(folder)
    return folder


def rewritten(folder: Path, **changes: object) -> Path:
    notes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(notes | changes))
    return folder


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


# ------------------------------------------------------------------------------------------------------------------ kinds


@pytest.mark.parametrize("name", STATES)
def test_a_file_is_told_by_its_keys_whatever_its_name_and_container(tmp_path: Path, name: str) -> None:
    state, kind = STATES[name], KINDS[name]
    for i, content in enumerate([{"model": state}, {"module": state}, {"state_dict": state}, state]):
        for file in (f"{i}_c2i_B_256.pt", f"{i}_vq_ds16_c2i.pt", f"{i}.bin"):
            assert llamagen_kind(saved(content, tmp_path / file)) == kind
    save_file(state, tmp_path / "x.safetensors")
    assert llamagen_kind(str(tmp_path / "x.safetensors")) == kind
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert llamagen_kind(tmp_path / "old.pth") == kind
    assert llamagen_kind(hub_folder(tmp_path / "hub", name)) == kind
    (tmp_path / "hub" / "config.json").write_text("{")
    assert llamagen_kind(tmp_path / "hub") == kind


def test_other_weights_are_none_of_them(tmp_path: Path) -> None:
    others: list[dict[str, Tensor]] = [
        {"tok_embeddings.weight": torch.zeros(4, 4), "output.weight": torch.zeros(4, 4)},
        {k: v for k, v in CLASSES.items() if not k.startswith("cls_embedding")},  # a Llama of gpt-fast
        {k.replace("wqkv", "wq"): v for k, v in CLASSES.items()},
        {k.replace("conv_blocks", "down"): v for k, v in CODES.items()},  # a VQGAN of taming-transformers
        {k: v for k, v in CODES.items() if not k.startswith("quantize.")},  # an autoencoder without codes
        LlamaGenTransformer.from_single_file(saved(CLASSES, tmp_path / "a.pt"), grid=3, num_heads=4).state_dict(),
        VQTokenizer.from_single_file(saved(CODES, tmp_path / "b.pt")).state_dict(),
    ]
    for state in others:
        assert llamagen_kind(saved({"model": state}, tmp_path / "c2i_B_256.pt")) is None
    assert llamagen_kind(tmp_path) is None  # a folder, but not of the hub


def test_a_file_that_lacks_keys_is_still_told_so_that_loading_can_name_them(tmp_path: Path) -> None:
    for state, key, kind in ((CLASSES, "norm.weight", "transformer"), (CODES, "quant_conv.weight", "vq")):
        path = saved({k: v for k, v in state.items() if k != key}, tmp_path / "a.pt")
        assert llamagen_kind(path) == kind
        with pytest.raises(CheckpointError, match=f"missing {key}"):
            (load_transformer if kind == "transformer" else load_vq)(path, **({"num_heads": 4} if kind != "vq" else {}))


def test_telling_the_kind_reads_no_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = {key: torch.empty(tensor.shape) for key, tensor in CLASSES.items()}
    assert llamagen_kind(saved({"model": state}, tmp_path / "a.pt")) == "transformer"
    header = {key: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for key in CODES}
    header["encoder.conv_in.weight"] = {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}  # 64 GiB
    content = json.dumps(header).encode()
    with (tmp_path / "b.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + 2**36)
    assert llamagen_kind(tmp_path / "b.safetensors") == "vq"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "not a file"), (b"", "truncated"), (b"hello", "no weight file"), (b"PK\x03\x04", "truncated")],
)
def test_what_cannot_be_read_is_an_error_rather_than_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "a.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        llamagen_kind(path)


# ---------------------------------------------------------------------------------------------------------- hub folders


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["classes", "captions"])
def test_a_transformer_folder_loads_without_any_option(tmp_path: Path, name: str, weights: str) -> None:
    folder = hub_folder(tmp_path / "hub", name)
    if weights == "pytorch_model.bin":  # as older versions of the hub's client wrote it
        saved(STATES[name], folder / weights)
        (folder / "model.safetensors").unlink()
    for path in (folder, str(folder), folder / weights):
        model = load_transformer(path)
        assert model.config.items() >= {"grid": 3, "num_heads": 4, "rope_base": 10000, "norm_eps": 1e-5}.items()
        model.save_single_file(tmp_path / "out.pt")
        assert same(read_state_dict(tmp_path / "out.pt"), STATES[name])
    assert same(LlamaGenTransformer.from_single_file(folder).state_dict(), model.state_dict())


@torch.no_grad()
def test_what_only_config_json_tells_changes_the_model(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, block_size=16, n_head=2, rope_base=500, norm_eps=0.1)
    model = load_transformer(folder)
    assert model.config.items() >= {"grid": 4, "num_heads": 2, "rope_base": 500, "norm_eps": 0.1}.items()
    labels, ids = torch.tensor([3, 10]), torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(model.embed_classes(labels), ids)
    for change in ({"n_head": 4}, {"rope_base": 10000}, {"norm_eps": 1e-5}):
        other = load_transformer(
            rewritten(hub_folder(folder, block_size=16, n_head=2, rope_base=500, norm_eps=0.1), **change)
        )
        assert (other(other.embed_classes(labels), ids) - logits).abs().max() > 1e-2


def test_options_of_the_call_win_and_gaps_are_filled_as_for_a_file(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    model = load_transformer(folder, grid=5, num_heads=2, dtype=torch.bfloat16)
    assert (model.config["grid"], model.config["num_heads"], model.dtype) == (5, 2, torch.bfloat16)
    rewritten(folder, block_size=None, n_head=None, rope_base=None)
    with pytest.raises(CheckpointError, match="say num_heads"):
        load_transformer(folder)
    assert load_transformer(folder, num_heads=4).config.items() >= {"grid": 16, "rope_base": 10000}.items()
    (folder / "config.json").unlink()
    assert load_transformer(folder, num_heads=4, grid=3).config["grid"] == 3


def test_a_config_beside_any_other_file_is_not_that_files(tmp_path: Path) -> None:
    rewritten(hub_folder(tmp_path), dim=1024, block_size=7)
    (tmp_path / "model.safetensors").rename(tmp_path / "c2i_B_384.safetensors")
    assert load_transformer(tmp_path / "c2i_B_384.safetensors", num_heads=4).config["grid"] == 24


def test_a_tokenizer_folder_loads(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "codes")
    for vq in (load_vq(folder), load_vq(folder / "model.safetensors"), VQTokenizer.from_single_file(folder)):
        vq.save_single_file(tmp_path / "out.pt")
        assert same(read_state_dict(tmp_path / "out.pt"), CODES)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("classes", {"dim": 128}, "dim is 128, but 64 in the weights"),
        ("classes", {"n_layer": 3}, "n_layer is 3, but 2 in the weights"),
        ("classes", {"vocab_size": "48"}, "vocab_size is '48', but 48 in the weights"),
        ("classes", {"block_size": 10}, "block_size cannot be 10"),
        ("classes", {"block_size": 9.0}, "block_size cannot be 9.0"),
        ("classes", {"n_head": True}, "n_head cannot be True"),
        ("classes", {"n_head": 0}, "n_head cannot be 0"),
        ("classes", {"norm_eps": "1e-5"}, "norm_eps cannot be '1e-5'"),
        ("classes", {"rope_base": -1}, "rope_base cannot be -1"),
        ("codes", {"codebook_size": 41}, "codebook_size is 41, but 40 in the weights"),
        ("codes", {"codebook_l2_norm": False}, "codebook_l2_norm is False, but True"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(tmp_path: Path, name: str, changes: dict, says: str) -> None:
    rewritten(hub_folder(tmp_path, name), **changes)
    with pytest.raises(CheckpointError) as error:
        (load_vq if name == "codes" else load_transformer)(tmp_path)
    assert says in str(error.value) and str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"), [("{", "no readable JSON"), ("[1]", "no JSON object"), ("\xff", "no readable")]
)
def test_a_damaged_config_is_one_clear_line(tmp_path: Path, content: str, says: str) -> None:
    (hub_folder(tmp_path) / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=says):
        load_transformer(tmp_path)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model.safetensors or pytorch_model.bin"):
        load_transformer(tmp_path)
    with pytest.raises(CheckpointError, match="quantize.embedding.weight is missing"):
        load_vq(hub_folder(tmp_path / "classes"))
    with pytest.raises(CheckpointError, match="tok_embeddings.weight is missing"):
        load_transformer(hub_folder(tmp_path / "codes", "codes"))
