"""Published VQGAN and MoVQGAN files load, compute what upstream computes, and are written back bit for bit."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import reference_llamagen
import reference_vqgan as reference
import torch
from diffusers import DiffusionPipeline
from reference_vqgan import movq_state, vqgan_state
from safetensors.torch import save_file
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.vqgan_files import load_vqgan, vqgan_config
from arsd.models.weight_files import read_state_dict
from arsd.tokenizers import vqgan
from arsd.tokenizers.vqgan import VQGANTokenizer

KINDS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "chameleon": vqgan_state,
    "movqgan": movq_state,
    "vqgan that attends": lambda: vqgan_state(mult=(1, 2, 2), attention=(1, 2), blocks=1),
    "movqgan of f = 2": lambda: movq_state(mult=(1, 2), attention=(), blocks=1),
}
PREFIX = "model.vqmodel."


def tiny(seed: int = 0) -> dict[str, Tensor]:
    return vqgan_state(mult=(1, 1), blocks=1, codes=16, seed=seed)


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and left[k].equal(right[k]) for k in left)


def drawn(tokenizer: VQGANTokenizer, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random pictures of 6 x 4 tokens and random ids of a 4 x 6 grid."""
    generator, f = torch.Generator().manual_seed(1), tokenizer.downsample_factor
    images = torch.rand(batch, 3, 6 * f, 4 * f, generator=generator, dtype=dtype) * 2 - 1
    return images, torch.randint(len(tokenizer.codebook), (batch, 4, 6), generator=generator)


# ---------------------------------------------------------------------------------------------------- it computes the same


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pictures_and_ids_are_upstreams_on_grids_that_are_not_square(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    state = {key: value.to(dtype) for key, value in KINDS[kind]().items()}
    tokenizer = load_vqgan(state)
    images, ids = drawn(tokenizer, dtype=dtype)
    expected = reference.decode(state, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(tokenizer.decode(ids), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(tokenizer.latents(images), reference.latents(state, images), atol=tolerance, rtol=0)
    assert tokenizer.encode(images).equal(codes := reference.encode(state, images))
    assert codes.unique().numel() > 8
    assert tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize("kind", ["chameleon", "movqgan"])
@torch.no_grad()
def test_a_row_of_a_batch_does_not_depend_on_the_others(kind: str) -> None:
    tokenizer = load_vqgan(KINDS[kind](), dtype=torch.float64)
    images, ids = drawn(tokenizer, batch=3)
    images[1] *= 100  # far out of range, and still nobody else's business
    together, codes = tokenizer.decode(ids), tokenizer.encode(images)
    for row in range(3):
        alone = tokenizer.decode(ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)
        assert tokenizer.encode(images[row : row + 1]).equal(codes[row : row + 1])


def test_the_look_up_in_pieces_is_upstreams_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    latents, codes = torch.randn(301, 16, generator=generator), torch.randn(500, 16, generator=generator)
    codes[400:] = codes[:100]  # a tie goes to the first, as with upstream
    upstream = latents.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * torch.einsum("ne,ce->nc", latents, codes)
    expected, argmin, sizes = upstream.argmin(1), Tensor.argmin, []
    assert expected.max() < 400
    monkeypatch.setattr(Tensor, "argmin", lambda self, dim: (sizes.append(self.numel()), argmin(self, dim))[1])
    for distances in (2**24, 10_000, 1):
        monkeypatch.setattr(vqgan, "_DISTANCES", distances)
        sizes.clear()
        assert vqgan._nearest(latents, codes).equal(expected)
        assert max(sizes) <= max(distances, len(codes)) and sum(sizes) == 301 * 500


@pytest.mark.parametrize("kind", ["chameleon", "movqgan"])
@torch.no_grad()
def test_half_precision_paints_the_same_picture_and_looks_up_in_float32(kind: str) -> None:
    full, half = load_vqgan(KINDS[kind]()), load_vqgan(KINDS[kind](), dtype=torch.bfloat16)
    images, ids = drawn(full)
    picture = half.decode(ids)
    assert picture.dtype == torch.bfloat16
    error = picture.float() - full.decode(ids)
    assert error.square().mean() < 0.01 * full.decode(ids).square().mean()
    distances = torch.cdist(half.latents(images.bfloat16()).double(), half.codebook.double().expand(2, 1, -1, -1))
    assert half.encode(images).equal(distances.argmin(-1))


def test_the_published_sizes_have_as_many_weights_as_their_names_say() -> None:
    def weights(**config: object) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in VQGANTokenizer(**config).parameters())

    movqgan = {
        "codebook_size": 16384,
        "codebook_dim": 4,
        "latent_channels": 4,
        "attention_levels": [3],
        "norm_type": "spatial",
    }
    for ch, layers, millions in ((128, 2, 67), (128, 4, 101), (256, 2, 270)):
        channels = [ch, 2 * ch, 2 * ch, 4 * ch]
        assert weights(**movqgan, block_out_channels=channels, layers_per_block=layers) // 10**6 == millions
    assert weights() // 10**6 == 68  # Chameleon's


# ------------------------------------------------------------------------------------------------------------- containers


def _lightning(state: dict[str, Tensor], callbacks: dict[object, object]) -> dict[str, object]:
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": OrderedDict(state | reference.extra_state()),
        "callbacks": callbacks,
        "optimizer_states": [adam, adam],
        "lr_schedulers": [],
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "hparams_name": "kwargs",
        "hyper_parameters": {"n_embed": 16, "ddconfig": {"ch": 32, "ch_mult": [1, 1], "double_z": False}},
    }


BEST = {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.3), "best_model_path": "last.ckpt"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", ["lightning", "state_dict", "flat", "prefixed"])
def test_every_container_gives_the_same_tokenizer(tmp_path: Path, container: str, zipped: bool) -> None:
    state = tiny()
    content = {
        "lightning": _lightning(state, {"ModelCheckpoint{'monitor': 'val/rec_loss', 'mode': 'min'}": BEST}),
        "state_dict": {"state_dict": state | reference.extra_state()},
        "flat": state | reference.extra_state(),
        "prefixed": {PREFIX + key: value for key, value in state.items()},
    }[container]
    torch.save(content, tmp_path / "vqgan.ckpt", _use_new_zipfile_serialization=zipped)
    tokenizer = VQGANTokenizer.from_single_file(tmp_path / "vqgan.ckpt")
    assert same(tokenizer.state_dict(), load_vqgan(state).state_dict())


def test_a_lightning_file_with_a_class_loads_without_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning before 1.5 keyed what callbacks remember by their class."""
    module = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module})
    with monkeypatch.context() as installed:
        for depth in (1, 2, 3):
            name = ".".join(module.split(".")[:depth])
            installed.setitem(sys.modules, name, ModuleType(name))
        sys.modules[module].ModelCheckpoint = callback  # type: ignore[attr-defined]
        path = saved(_lightning(tiny(), {callback: BEST}), tmp_path / "vqgan.ckpt")
    assert same(load_vqgan(path).state_dict(), load_vqgan(tiny()).state_dict())
    assert module not in sys.modules


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_tensors_by_key_load_too_and_stay_the_callers(prefix: str) -> None:
    given = {prefix + key: value for key, value in (tiny() | reference.extra_state()).items()}
    before = {key: value.clone() for key, value in given.items()}
    tokenizer = load_vqgan(given)
    for parameter in tokenizer.parameters():
        parameter.data.zero_()
    assert same(given, before)


def test_a_loaded_tokenizer_owns_its_weights_and_can_be_trained(tmp_path: Path) -> None:
    path = saved({"state_dict": tiny()}, tmp_path / "vqgan.ckpt")
    tokenizer = VQGANTokenizer.from_single_file(path)
    path.write_bytes(b"")
    assert not tokenizer.training
    assert all(p.requires_grad and p.is_contiguous() and p.device.type == "cpu" for p in tokenizer.parameters())
    images, ids = drawn(tokenizer)
    assert tokenizer.decode(ids).isfinite().all()
    tokenizer.pixels(tokenizer.latents(images)).square().mean().backward()
    trained = [name for name, p in tokenizer.named_parameters() if p.grad is not None]
    assert len(trained) == len(list(tokenizer.parameters())) - 1  # not the codebook, which was not looked at


# ------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_written_back_bit_for_bit(tmp_path: Path, kind: str, suffix: str) -> None:
    state = KINDS[kind]()
    first = load_vqgan(state | reference.extra_state())
    first.save_single_file(tmp_path / f"a{suffix}")
    second = VQGANTokenizer.from_single_file(tmp_path / f"a{suffix}")
    assert same(read_state_dict(tmp_path / f"a{suffix}"), state)
    assert same(first.state_dict(), second.state_dict())
    assert dict(first.config) == dict(second.config)


@pytest.mark.parametrize(("kind", "opened"), [("chameleon", "state_dict"), ("movqgan", "encoder.conv_in.weight")])
def test_the_container_is_the_one_that_upstream_opens(tmp_path: Path, kind: str, opened: str) -> None:
    load_vqgan(KINDS[kind]()).save_single_file(tmp_path / "a.ckpt")
    assert opened in torch.load(tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_keeps_weights_and_config(tmp_path: Path, kind: str) -> None:
    first = load_vqgan(KINDS[kind]())
    first.save_pretrained(tmp_path)
    second = VQGANTokenizer.from_pretrained(tmp_path)
    assert same(first.state_dict(), second.state_dict())
    assert (
        vqgan_config(KINDS[kind](), "x").items()
        <= {k: tuple(v) if isinstance(v, list) else v for k, v in second.config.items()}.items()
    )
    half = VQGANTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


class Painter(DiffusionPipeline):
    def __init__(self, vq: VQGANTokenizer) -> None:
        super().__init__()
        self.register_modules(vq=vq)


def test_diffusers_loads_it_as_a_part_of_a_pipeline(tmp_path: Path) -> None:
    first = load_vqgan(movq_state(mult=(1, 2), blocks=1))
    Painter(first).save_pretrained(tmp_path)
    assert "arsd.tokenizers.vqgan" in (tmp_path / "model_index.json").read_text()
    second = Painter.from_pretrained(tmp_path).components["vq"]
    assert type(second) is VQGANTokenizer
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_the_files_unless_another_is_asked_for(stored: torch.dtype) -> None:
    state = {key: value.to(stored) for key, value in tiny().items()}
    for asked in (None, torch.float16, torch.float64):
        tokenizer = load_vqgan(state, dtype=asked)
        assert {p.dtype for p in tokenizer.parameters()} == {asked or stored} == {tokenizer.dtype}


def test_the_whole_config_follows_from_keys_and_shapes() -> None:
    state = vqgan_state(ch=64, mult=(1, 1, 3), blocks=3, attention=(1,), z=20, dim=12, codes=40)
    assert vqgan_config(state, "x") == {
        "codebook_size": 40,
        "codebook_dim": 12,
        "latent_channels": 20,
        "block_out_channels": (64, 64, 192),
        "layers_per_block": 3,
        "attention_levels": (1,),
        "norm_type": "group",
    }
    spatial = vqgan_config(movq_state(), "x")
    assert (spatial["norm_type"], spatial["attention_levels"], spatial["codebook_dim"]) == ("spatial", (3,), 4)
    assert load_vqgan(vqgan_state()).downsample_factor == 16
    assert load_vqgan(movq_state()).downsample_factor == 8
    assert load_vqgan(state).codebook.equal(state["quantize.embedding.weight"])  # not normalised


# ----------------------------------------------------------------------------------------------------------------- errors


def _without(state: dict[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def _wrong(kind: str) -> dict[str, Tensor]:
    state = tiny()
    conv, q = "encoder.down.1.block.0.conv1.weight", "decoder.mid.attn_1.q.weight"
    wide = {"quantize.embedding.weight": torch.zeros(16, 6), "decoder.norm_out.conv_y.weight": torch.zeros(32, 6, 1, 1)}
    return {
        "LlamaGen's tokenizer": lambda: reference_llamagen.vq_state(),
        "LlamaGen's transformer": lambda: reference_llamagen.transformer_state(),
        "encoder only": lambda: {PREFIX + k: v for k, v in _without(state, "decoder.").items()},
        "diffusers' own": lambda: dict(load_vqgan(state).state_dict()),
        "no levels": lambda: _without(state, "encoder.down."),
        "missing key": lambda: _without(state, conv.removesuffix("weight")),
        "unexpected key": lambda: state | {"discriminator.weight": torch.zeros(2)},
        "two layers swapped": lambda: (
            state
            | {"quant_conv.weight": state["post_quant_conv.weight"], "post_quant_conv.weight": state["quant_conv.weight"]}
        ),
        "matrices in an attention": lambda: state | {q: state[q].flatten(1)},
        "integers": lambda: state | {q: state[q].to(torch.int8)},
        "wrong axes": lambda: state | {"encoder.conv_in.weight": state["encoder.conv_in.weight"].flatten(1)},
        "few channels": lambda: state | {conv: torch.zeros(8, 32, 3, 3)},
        "another first level": lambda: vqgan_state(mult=(2, 2)) | {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)},
        "codes wider than latents": lambda: movq_state(mult=(1, 1), blocks=1) | wide,
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("LlamaGen's tokenizer", "is a LlamaGen tokenizer: load it with VQTokenizer"),
        ("LlamaGen's transformer", "quantize.embedding.weight is missing"),
        ("encoder only", "encoder only (as facebook/chameleon-7b has), which cannot paint: give Meta's vqgan.ckpt"),
        ("diffusers' own", "quantize.embedding.weight is missing"),
        ("no levels", "encoder channels [32] are no VQGAN's"),
        ("missing key", "encoder.down.1.block.0.conv1.weight is missing"),
        ("unexpected key", "unexpected discriminator.weight"),
        ("two layers swapped", "quant_conv.weight has shape [24, 16, 1, 1], expected [16, 24, 1, 1]"),
        ("matrices in an attention", "decoder.mid.attn_1.q.weight has shape [32, 32], expected [32, 32, 1, 1]"),
        ("integers", "decoder.mid.attn_1.q.weight has dtype torch.int8"),
        ("wrong axes", "encoder.conv_in.weight has shape [32, 27], expected 4 axes"),
        ("few channels", "encoder channels [32, 32, 8] are no VQGAN's"),
        ("another first level", "encoder channels [32, 64, 64] are no VQGAN's"),
        ("codes wider than latents", "codes of 6 and latents of 4 channels"),
    ],
)
@pytest.mark.parametrize("form", ["file", "tensors"])
def test_weights_of_another_kind_are_one_clear_line(tmp_path: Path, form: str, kind: str, says: str) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError) as error:
        if form == "file":
            VQGANTokenizer.from_single_file(saved({"state_dict": _wrong(kind)}, path))
        else:
            load_vqgan(_wrong(kind), name="Anole in /models/anole")
    message = str(error.value)
    assert says in message
    assert message.startswith(str(path) if form == "file" else "Anole in /models/anole")
    assert "\n" not in message and len(message) < 250 + len(str(path))


@pytest.mark.parametrize("kind", ["VQGAN", "MoVQGAN"])
def test_a_missing_key_is_named(kind: str) -> None:
    state = tiny() if kind == "VQGAN" else movq_state(mult=(1, 1), blocks=1)
    del state["decoder.up.1.block.1.conv2.bias"]
    says = rf"the tokenizer's state dict does not have {kind}'s keys \(missing decoder.up.1.block.1.conv2.bias\)"
    with pytest.raises(CheckpointError, match=says):
        load_vqgan(state)


@pytest.mark.parametrize("kind", ["missing", "half a file", "half a safetensors"])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.safetensors" if kind == "half a safetensors" else "a.ckpt")
    if kind == "half a file":
        data = saved({"state_dict": tiny()}, path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind != "missing":
        save_file(tiny(), path)
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a file" if kind == "missing" else "truncated") as error:
        VQGANTokenizer.from_single_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_pictures_and_ids_that_do_not_fit_are_refused() -> None:
    tokenizer = load_vqgan(tiny())
    for shape in [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 7), (1, 3, 7, 8), (0, 3, 8, 8), (1, 3, 0, 8)]:
        with pytest.raises(InputError, match=r"\[B, 3, H, W\] with sides in multiples of 2"):
            tokenizer.encode(torch.zeros(shape))
    grid = torch.zeros(1, 2, 3, dtype=torch.int64)
    for ids in (grid[0], grid[:0], grid - 1, grid + 16, grid.double(), grid.bool(), grid.to(torch.uint8)):
        with pytest.raises(InputError, match="grid of whole numbers from 0 to 15"):
            tokenizer.decode(ids)
    assert tokenizer.decode((grid + 15).to(torch.int32)).shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"block_out_channels": []}, "multiples of 32"),
        ({"block_out_channels": [32, 48]}, "multiples of 32"),
        ({"attention_levels": [5]}, "indices below 5"),
        ({"attention_levels": [-1]}, "indices below 5"),
        ({"norm_type": "layer"}, '"group" or "spatial"'),
        ({"norm_type": "spatial", "codebook_dim": 4}, "equal to latent_channels 256"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        VQGANTokenizer(**wrong)
