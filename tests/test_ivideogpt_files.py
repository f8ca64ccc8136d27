"""Published folders of iVideoGPT: their tokenizer gives what independent networks give, and bad ones are one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference_ivideogpt as reference
import torch
from reference_ivideogpt import CHANGES, CODES, EACH, GRID, SIZE
from safetensors.torch import load_file, save_file
from test_ivideogpt import clip
from tiny_pipeline import one_clear_line
from transformers import LlamaConfig, LlamaForCausalLM

from arsd.errors import CheckpointError, InputError
from arsd.models.ivideogpt import ContextVolume
from arsd.models.ivideogpt_files import find_kind, load_ivideogpt, load_ivideogpt_tokenizer
from arsd.pipelines.ivideogpt import IVideoGPTPipeline
from arsd.tokenizers.ivideogpt import IVideoGPTTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With two context pictures."""
    folder = tmp_path_factory.mktemp("ivideogpt") / "published"
    reference.write_folder(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("config", [{}, {"max_att_resolution": 16}, {"mid_block_add_attention": True}])
def test_tokens_and_clips_are_the_published_ones(tmp_path, context, config):
    state = reference.write_tokenizer(tmp_path, context=context, **config)
    vq = load_ivideogpt_tokenizer(tmp_path)
    assert vq.dtype == torch.float32 and not vq.training and vq.context_length == context
    vq = vq.double()
    clips, raster = clip(2, context + 3), ContextVolume(context + 3, context, GRID, 2, CODES, CHANGES)
    codes = vq.encode(2 * clips - 1)
    expected = [reference.encode(state, one, context) for one in clips]
    assert len(codes[0].unique()) > 10 and raster.from_codes(codes).tolist() == expected
    found = vq.decode(codes)
    wanted = torch.stack([reference.decode(state, tokens, context) for tokens in expected])
    torch.testing.assert_close(found, 2 * wanted - 1, atol=1e-10, rtol=0)
    assert found.shape == (2, context + 3, 3, SIZE, SIZE) and found.std() > 0.3
    assert torch.equal(vq.encode(2 * clips[:, :context] - 1), codes[:, : context * GRID**2])
    torch.testing.assert_close(vq.decode(codes[:, : context * GRID**2]), found[:, :context])
    single = load_ivideogpt_tokenizer(tmp_path).decode(codes).double()
    assert (single - found).abs().max() < 5e-5  # a dozen normalised layers in float32


def test_what_a_later_picture_shows_depends_on_all_of_the_context(folder):
    vq = load_ivideogpt_tokenizer(folder, dtype=torch.float64)
    codes = vq.encode(2 * clip(1, 4) - 1)
    first = vq.decode(codes)
    for place in (3, GRID**2 + 3):
        other = codes.clone()
        other[0, place] = (other[0, place] + 1) % CODES
        changed = (vq.decode(other) != first).flatten(2).any(-1)[0].tolist()
        assert changed == [place < GRID**2, place >= GRID**2, True, True]
    other = codes.clone()
    other[0, -1] = CODES + (other[0, -1] - CODES + 1) % CHANGES
    assert (vq.decode(other) != first).flatten(2).any(-1)[0].tolist() == [False, False, False, True]


def test_the_tokenizer_is_a_model_of_diffusers(tmp_path, folder):
    vq = load_ivideogpt_tokenizer(folder)
    vq.save_pretrained(tmp_path)
    codes = vq.encode(2 * clip(1, 3) - 1)
    for again in (IVideoGPTTokenizer.from_pretrained(tmp_path).eval(), load_ivideogpt_tokenizer(tmp_path)):
        assert torch.equal(again.encode(2 * clip(1, 3) - 1), codes) and torch.equal(again.decode(codes), vq.decode(codes))
    half = load_ivideogpt_tokenizer(folder, dtype=torch.bfloat16)
    assert half.decode(codes).dtype == torch.bfloat16 and half.decode(codes).isfinite().all()


def test_the_published_sizes(tmp_path):
    """README: 310M at 256 pixels, 114M at 64."""
    with torch.device("meta"):
        large = IVideoGPTTokenizer()
        small = IVideoGPTTokenizer((128, 256, 512), max_att_resolution=16, resolution=64)
    for vq, millions, factor in ((large, 310, 16), (small, 114, 4)):
        assert sum(p.numel() for p in vq.parameters()) / 1e6 == pytest.approx(millions, abs=1)
        assert (vq.side, vq.patches, vq.downsample_factor) == (16, 4, factor)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda vq: vq.encode(torch.zeros(1, 1, 3, SIZE, SIZE)), "clips must be [B, 2 or more, 3, 16, 16]"),
        (lambda vq: vq.encode(torch.zeros(1, 2, 3, SIZE, 8)), "clips must be"),
        (lambda vq: vq.decode(torch.zeros(1, 2 * GRID**2 + 1).long()), "codes must be [B, 128 + a multiple of 4]"),
        (lambda vq: vq.decode(torch.zeros(1, GRID**2).long()), "codes must be"),
        (lambda vq: vq.decode(torch.zeros(1, 2 * GRID**2)), "whole numbers"),
        (lambda vq: vq.decode(torch.full((1, 2 * GRID**2), CODES)), "codes of context pictures lie outside their 24"),
        (lambda vq: vq.decode(torch.zeros(1, 2 * GRID**2 + EACH).long()), "codes of later pictures lie outside their 20"),
        (lambda vq: IVideoGPTTokenizer((32, 48)), "multiples of 32 groups"),
        (lambda vq: IVideoGPTTokenizer((32, 64), resolution=12), "whole patches of 8 pixels"),
        (lambda vq: IVideoGPTTokenizer((32,), resolution=64, max_att_resolution=16), "a context that is read"),
    ],
)
def test_what_the_tokenizer_cannot_read_is_refused(folder, call, says):
    with pytest.raises(InputError) as error:
        call(load_ivideogpt_tokenizer(folder))
    one_clear_line(error.value, says)


# ------------------------------------------------------------------------------------------------------------- bad folders


def edited(name: str, **changes: Any) -> Any:
    """Changes a JSON file; ``None`` leaves an entry out."""

    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def tokenizer_weights(change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer" / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return edit


def cut(name: str) -> Any:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    return edit


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer"), "is no folder of iVideoGPT"),
        (lambda f: shutil.rmtree(f / "transformer"), "is no folder of iVideoGPT"),
        (lambda f: (f / "tokenizer" / WEIGHTS).unlink(), f"has no weights, neither {WEIGHTS}"),
        (lambda f: (f / "transformer" / "model.safetensors").unlink(), "has no weights"),
        (cut(f"tokenizer/{WEIGHTS}"), "truncated, corrupt or no weight file"),
        (cut("transformer/model.safetensors"), "truncated, corrupt or no weight file"),
        (lambda f: (f / "tokenizer" / "config.json").write_text("{"), "no readable JSON"),
        (tokenizer_weights(lambda s: s.pop("quant_linear.bias")), "missing quant_linear.bias"),
        (tokenizer_weights(lambda s: s.update({"extra": torch.zeros(1)})), "unexpected extra"),
        (
            tokenizer_weights(lambda s: s.update({"quant_conv.bias": torch.zeros(9)})),
            "quant_conv.bias has shape [9], expected [4]",
        ),
        (tokenizer_weights(lambda s: s.update({"quant_conv.bias": torch.zeros(4).char()})), "has dtype torch.int8"),
        (edited("tokenizer/config.json", norm_type="spatial"), "norm_type 'spatial' is not supported"),
        (edited("tokenizer/config.json", down_block_types=["AttnDownEncoderBlock2D"]), "down_block_types"),
        (edited("tokenizer/config.json", block_out_channels=[32, 40]), "multiples of 32 groups"),
        (edited("tokenizer/config.json", resolution="big"), "does not make a tokenizer"),
        (edited("tokenizer/config.json", context_length=1), "kv_pos_emb has shape [128, 32], expected [64, 32]"),
        (edited("tokenizer/config.json", num_dyn_embeddings=None), "is no folder of iVideoGPT"),
        (edited("tokenizer/config.json", num_dyn_embeddings=21), "dynamics_quantize.embedding.weight has shape"),
        (edited("transformer/config.json", hidden_size=64), "is no LlamaForCausalLM"),
    ],
)
def test_bad_folders_are_one_clear_line(folder, tmp_path, damage, says):
    shutil.copytree(folder, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(CheckpointError) as error:
        IVideoGPTPipeline.from_pretrained(tmp_path / "a")
    one_clear_line(str(error.value).replace(str(tmp_path), ""), says)


def test_models_that_read_actions_are_refused(folder, tmp_path):
    reference.write_folder(tmp_path, actions=True)
    assert find_kind(tmp_path) == "ivideogpt"
    with pytest.raises(CheckpointError) as error:
        IVideoGPTPipeline.from_pretrained(tmp_path)
    one_clear_line(str(error.value).replace(str(tmp_path), ""), "reads actions, which is not supported")
    with pytest.raises(InputError) as error2:
        IVideoGPTPipeline.from_pretrained(folder)(frames=clip(1, 2), actions=torch.zeros(1, 6, 4))
    one_clear_line(error2.value, "models that read actions are not supported")


def test_files_that_do_not_belong_together_are_refused(folder, tmp_path):
    vq = load_ivideogpt_tokenizer(folder)
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(CheckpointError) as error:
        IVideoGPTPipeline(LlamaForCausalLM(config), vq)
    one_clear_line(error.value, "the model has 40 ids, the tokenizer needs 46")
    with pytest.raises(CheckpointError) as error:
        load_ivideogpt_tokenizer(tmp_path)
    one_clear_line(str(error.value).replace(str(tmp_path), ""), "not that of an iVideoGPT tokenizer")
    with pytest.raises(CheckpointError) as error:
        load_ivideogpt(tmp_path)
    one_clear_line(str(error.value).replace(str(tmp_path), ""), "holds no config.json")
