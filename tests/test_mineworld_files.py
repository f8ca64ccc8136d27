"""MineWorld's published files load, compute what was published, and are written back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import reference_mineworld as reference
import reference_vqgan
import torch
from diffusers import VQModel
from published_files import State, write_json
from safetensors.torch import save_file
from tiny_pipeline import one_clear_line, seeded

from arsd.errors import ArsdError, CheckpointError
from arsd.models.mineworld import MineWorldTransformer
from arsd.models.mineworld_files import (
    PUBLISHED_HEADS,
    holds_vae,
    load_transformer,
    load_vae,
    mineworld_kind,
    transformer_config,
)
from arsd.models.weight_files import read_state_dict
from arsd.pipelines.mineworld import MineWorldPipeline
from arsd.tokenizers.amused import AmusedTokenizer

(ROWS, COLUMNS), CODES = reference.GRID, reference.CODES
FRAME = ROWS * COLUMNS + reference.LENGTH
TOKENS = reference.FRAMES * FRAME - reference.LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mineworld")
    reference.write_mineworld(path)
    return path


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and left[k].equal(right[k]) for k in left)


# ------------------------------------------------------------------------------------------------------------- the network


@torch.no_grad()
def test_logits_are_the_published_ones_however_long_the_passes_are(folder):
    """float32 within 1e-5 of an independent forward in float64."""
    model = load_transformer(folder / "5M_4f.ckpt", **reference.OPTIONS)
    made = MineWorldPipeline(model, load_vae(folder / "vae"))
    ids = torch.randint(reference.VOCAB, (2, TOKENS), generator=seeded(3))
    expected = torch.stack([reference.logits(reference.llama_state(), row) for row in ids])
    assert expected.std() > 0.5 and model.dtype == torch.float32
    torch.testing.assert_close(model(ids).double(), expected, atol=1e-5, rtol=0)
    conditions = made.null_conditions(2, False)
    conditions.given = ids[:, :FRAME]
    for width in (1, 3, 8, TOKENS):
        target, found = made.target_maker(conditions)(width, 2), []
        target.prefill([-target.unread] * 2, width)
        for start in range(FRAME, TOKENS, width):
            lengths = torch.full((2,), start)
            target.rollback(lengths)
            fed = torch.nn.functional.pad(ids, (0, width))[:, start - 1 : start - 1 + width]
            found.append(target.forward(fed, lengths, lengths.tolist())[0])
        logits = torch.cat(found, dim=1)[:, : TOKENS - FRAME]
        torch.testing.assert_close(logits.double(), expected[:, FRAME - 1 : -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "width", "hidden"), [("300M", 1024, 4096), ("700M", 2048, 4096), ("1200M", 2048, 8192)])
def test_the_published_sizes_are_those_of_microsofts_configurations(size, width, hidden):
    heads, vocab = PUBLISHED_HEADS[(width, 20)], 8262
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    for i in range(20):
        name = f"model.layers.{i}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (width, width) for part in "qo"}
        shapes |= {f"{name}self_attn.{part}_proj.weight": (4 * 64, width) for part in "kv"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes |= {f"{name}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
        shapes[f"{name}mlp.down_proj.weight"] = (width, hidden)
    config = transformer_config(
        {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, f"{size}_32f.ckpt"
    )
    with torch.device("meta"):
        model = MineWorldTransformer(**config, frames=32)
    assert {f"lm.{key}": shape for key, shape in shapes.items()} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }
    inner = model.lm.config
    assert (inner.num_attention_heads, inner.num_key_value_heads, inner.max_position_embeddings) == (heads, 4, 11104)
    assert model.config["sampling"] == {"top_p": 0.8, "temperature": 1.0} and model.num_tokens == 32 * 347 - 11


@pytest.mark.parametrize(
    ("name", "frames"), [("700M_16f.ckpt", 16), ("1200M_32f.ckpt", 32), ("a.ckpt", 16), ("b_8f_v2.ckpt", 8)]
)
def test_the_name_of_a_file_tells_the_frames(folder, tmp_path, name, frames):
    (tmp_path / name).write_bytes((folder / "5M_4f.ckpt").read_bytes())
    assert load_transformer(tmp_path / name, num_heads=4).config["frames"] == frames
    assert load_transformer(tmp_path / name, num_heads=4, frames=3).config["frames"] == 3


# ----------------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("mid", [False, True])
@pytest.mark.parametrize("attention", [(), (1, 2)])
@torch.no_grad()
def test_pictures_and_ids_are_those_of_tamings_network(tmp_path, mid, attention):
    mult = (1, 1, 1, 1, 2) if not attention else (1, 1, 2)
    state = {key: value.double() for key, value in reference.vae_state(mid, mult, attention).items()}
    reference.write_vae(tmp_path, state, mid)
    vq = load_vae(tmp_path)
    assert vq.config["mid_attention"] == mid and vq.downsample_factor == 2 ** (len(mult) - 1) and not vq.training
    factor = vq.downsample_factor
    images = torch.rand(2, 3, 3 * factor, 2 * factor, generator=seeded(1), dtype=torch.float64) * 2 - 1
    ids = torch.randint(CODES, (2, 2, 3), generator=seeded(2))
    expected = reference_vqgan.decode(state, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(vq.decode(ids), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(vq.latents(images), reference_vqgan.latents(state, images), atol=1e-12, rtol=0)
    assert vq.encode(images).equal(reference_vqgan.encode(state, images))


@torch.no_grad()
def test_pictures_and_ids_are_those_of_diffusers_as_microsofts_code_calls_it(folder):
    theirs = VQModel.from_config(VQModel.load_config(folder / "vae"))
    theirs.load_state_dict(
        {k.removeprefix("model."): v for k, v in read_state_dict(folder / "vae" / "vae.ckpt").items()}, strict=False
    )
    theirs.quantize.sane_index_shape = True
    images = torch.rand(6, 3, 32, 48, generator=seeded(4)) * 2 - 1
    vq = load_vae(folder / "vae")
    ids = theirs.quantize(theirs.quant_conv(theirs.encoder(images)))[2][2]
    assert torch.equal(vq.encode(images), ids)
    expected = theirs.decoder(
        theirs.post_quant_conv(theirs.quantize.get_codebook_entry(ids.flatten(), (6, ROWS, COLUMNS, 8)))
    )
    torch.testing.assert_close(vq.decode(ids), expected, atol=1e-6, rtol=0)


def test_the_tokenizer_is_written_and_saved_and_loaded_again(folder, tmp_path):
    vq = load_vae(folder / "vae")
    for name in ("a.ckpt", "b.safetensors"):
        vq.save_single_file(tmp_path / name)
        again = AmusedTokenizer.from_single_file(tmp_path / name)
        assert same(again.state_dict(), vq.state_dict()) and again.config == vq.config
    published = {k: v for k, v in read_state_dict(folder / "vae" / "vae.ckpt").items() if k.startswith("model.")}
    assert same(read_state_dict(tmp_path / "a.ckpt"), published)
    vq.save_pretrained(tmp_path / "c")
    again = AmusedTokenizer.from_pretrained(tmp_path / "c")
    assert same(again.state_dict(), vq.state_dict()) and again.net.encoder.mid_block.attentions[0] is None


# -------------------------------------------------------------------------------------------------------------- containers


def test_a_model_is_written_back_bit_for_bit_with_its_tokenizer_or_without(folder, tmp_path):
    state = {key: value.bfloat16() for key, value in reference.llama_state().items()}
    torch.save({"state_dict": {f"transformer.{key}": value for key, value in state.items()}}, tmp_path / "a_4f.ckpt")
    model = MineWorldTransformer.from_single_file(tmp_path / "a_4f.ckpt", num_heads=4, grid=reference.GRID)
    assert model.dtype == torch.bfloat16 and not model.training
    for name in ("b.ckpt", "c.safetensors"):
        model.save_single_file(tmp_path / name)
        assert same(read_state_dict(tmp_path / name), {f"transformer.{key}": value for key, value in state.items()})
        assert not holds_vae(tmp_path / name)
    vq = load_vae(folder / "vae")
    model.save_single_file(tmp_path / "d_4f.ckpt", vq=vq)
    assert holds_vae(tmp_path / "d_4f.ckpt") and same(load_vae(tmp_path / "d_4f.ckpt").state_dict(), vq.state_dict())
    again = load_transformer(tmp_path / "d_4f.ckpt", num_heads=4, grid=reference.GRID)
    assert same(again.state_dict(), model.state_dict()) and again.config == model.config


def test_flat_and_safetensors_files_load_too(folder, tmp_path):
    state = read_state_dict(folder / "5M_4f.ckpt")
    torch.save(state, tmp_path / "a.bin")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    expected = load_transformer(folder / "5M_4f.ckpt", **reference.OPTIONS).state_dict()
    for name in ("a.bin", "a.safetensors"):
        model = load_transformer(tmp_path / name, **reference.OPTIONS)
        assert same(model.state_dict(), expected)
    (tmp_path / "a.bin").write_bytes(b"")
    assert all(p.is_contiguous() and p.device.type == "cpu" for p in model.parameters())
    assert model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


def test_the_tokenizer_is_found_in_the_file_beside_it_or_where_it_is_given(folder, tmp_path):
    expected = load_vae(folder / "vae").state_dict()
    reference.write_mineworld(tmp_path, vae=False)
    options = {"dtype": None, **reference.OPTIONS}
    assert same(MineWorldPipeline.from_pretrained(folder / "5M_4f.ckpt", **options).vq.state_dict(), expected)
    assert same(MineWorldPipeline.from_pretrained(tmp_path / "5M_4f.ckpt", **options).vq.state_dict(), expected)
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    for vq in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "vae.ckpt", load_vae(folder / "vae"), folder / "5M_4f.ckpt"):
        made = MineWorldPipeline.from_single_file(tmp_path / "5M_4f.ckpt", vq=vq, **options)
        assert same(made.vq.state_dict(), expected) and made.model_hash is not None
    with pytest.raises(CheckpointError) as error:
        MineWorldPipeline.from_single_file(tmp_path / "5M_4f.ckpt", **options)
    one_clear_line(error.value, "is a model without its tokenizer: give vq=..., vae.ckpt")


# ------------------------------------------------------------------------------------------------------------------ errors


def _changed(**more: Any) -> Any:
    def change(state: State) -> None:
        for key, value in more.items():
            name = "transformer." + key.replace("__", ".")
            state.pop(name) if value is None else state.update({name: value})

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_changed(lm_head__weight=None), "missing lm_head.weight"),
        (_changed(model__embed_tokens__weight=None), "model.embed_tokens.weight is missing"),
        (_changed(model__norm__weight=torch.zeros(7)), "model.norm.weight has shape [7], expected [32]"),
        (_changed(model__norm__weight=torch.zeros(32).long()), "model.norm.weight has dtype torch.int64"),
        (_changed(model__norm__bias=torch.zeros(32)), "unexpected model.norm.bias"),
        (
            _changed(model__layers__0__self_attn__k_proj__weight=torch.zeros(12, 32)),
            "keys of 12 channels do not fit 4 heads",
        ),
        (_changed(model__embed_tokens__weight=torch.zeros(70, 32)), "70 ids are no more than those of actions"),
        (lambda state: state.clear(), "has no tensors"),
    ],
)
def test_other_weights_are_one_clear_line(tmp_path, change, says):
    reference.write_mineworld(tmp_path)
    state = dict(read_state_dict(tmp_path / "5M_4f.ckpt"))
    change(state)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as error:
        load_transformer(tmp_path / "a.ckpt", **reference.OPTIONS)
    one_clear_line(error.value, says)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "5M_4f.ckpt").unlink(), "5M_4f.ckpt is not a file"),
        (lambda f: (f / "5M_4f.ckpt").write_bytes((f / "5M_4f.ckpt").read_bytes()[:-900]), "is truncated, corrupt"),
        (lambda f: (f / "vae" / "vae.ckpt").write_bytes(b"version https://git-lfs"), "vae.ckpt is truncated, corrupt"),
        (lambda f: (f / "vae" / "vae.ckpt").unlink(), "vae holds no vae.ckpt or vae.safetensors"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "config.json is no readable JSON"),
        (
            lambda f: write_json(f / "vae" / "config.json", reference.vae_config(act_fn="gelu")),
            "act_fn 'gelu' in config.json",
        ),
        (
            lambda f: reference.write_vae(f / "vae", reference.vae_state() | {"encoder.extra.weight": torch.ones(1)}),
            "unexpected encoder.extra",
        ),
        (
            lambda f: torch.save(
                {"state_dict": {"model.quantize.embedding.weight": torch.ones(4, 4)}}, f / "vae" / "vae.ckpt"
            ),
            "encoder channels []",
        ),
        (lambda f: torch.save({"a": torch.ones(1)}, f / "vae" / "vae.ckpt"), "quantize.embedding.weight is missing"),
    ],
)
def test_missing_and_damaged_files_are_one_clear_line(tmp_path, damage, says):
    reference.write_mineworld(tmp_path, vae=False)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        MineWorldPipeline.from_single_file(tmp_path / "5M_4f.ckpt", vq=tmp_path / "vae", **reference.OPTIONS)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "width 32 with 2 layers is no published size: say num_heads=..."),
        ({"num_heads": 5}, "do not fit 5 heads: give num_heads"),
        ({"num_heads": -4}, "do not fit -4 heads"),
        ({"num_heads": 4, "frames": 0}, "frames must be a whole number above 0, not 0"),
        ({"num_heads": 4, "grid": (2, True)}, "columns must be a whole number above 0, not True"),
    ],
)
def test_bad_arguments_are_one_clear_line(folder, options, says):
    with pytest.raises(ArsdError) as error:
        load_transformer(folder / "5M_4f.ckpt", **options)
    one_clear_line(error.value, says)


def test_a_tokenizer_of_another_model_is_one_clear_line(folder, tmp_path):
    state = reference_vqgan.vqgan_state(mult=(1, 1, 1, 1, 2), blocks=1, z=8, dim=8, codes=64)
    reference.write_vae(tmp_path, state, True)
    with pytest.raises(CheckpointError) as error:
        MineWorldPipeline.from_single_file(folder / "5M_4f.ckpt", vq=tmp_path, **reference.OPTIONS)
    one_clear_line(error.value, "the tokenizer has 64 codes, the model 32: give files that belong together")


def test_files_are_told_apart_by_their_keys(folder, tmp_path):
    assert (
        mineworld_kind(folder / "5M_4f.ckpt") == "mineworld"
        and mineworld_kind(folder / "vae" / "vae.ckpt") == "mineworld-vae"
    )
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    assert mineworld_kind(tmp_path / "a.ckpt") is None and mineworld_kind(tmp_path) is None
