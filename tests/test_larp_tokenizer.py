"""LARP's video tokenizer: published folders give the codes and clips of an independent network; bad ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_larp as reference
import torch
from reference_larp import CODES, FRAMES, SIDE, TOKENS
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.larp_files import find_kind, load_larp_tokenizer
from arsd.tokenizers.larp import LARPTokenizer


def clips(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, FRAMES, SIDE, SIDE, generator=seeded(1), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("learned", [False, True])
def test_codes_and_clips_are_the_published_ones(tmp_path, learned):
    """With the tables of the published tokenizer, and with those of all its flags."""
    state = reference.write_tokenizer(tmp_path, learned)
    vq = load_larp_tokenizer(tmp_path)
    assert vq.dtype == torch.float32 and not vq.training and find_kind(tmp_path) == "larp-tokenizer"
    ids = vq.encode(clips())
    assert ids.shape == (2, TOKENS) and ids.dtype == torch.int64 and len(ids.unique()) > 5
    assert torch.equal(ids, reference.encode(state, (clips() + 1) / 2))
    found = vq.decode(ids)
    assert found.shape == (2, 3, FRAMES, SIDE, SIDE) and found.std() > 0.3 and not found.requires_grad
    torch.testing.assert_close(found.double(), 2 * reference.decode(state, ids) - 1, atol=1e-5, rtol=0)
    exact = load_larp_tokenizer(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(exact.decode(ids), 2 * reference.decode(state, ids) - 1, atol=1e-6, rtol=0)


def test_a_clip_does_not_depend_on_the_others(tmp_path):
    reference.write_tokenizer(tmp_path)
    vq = load_larp_tokenizer(tmp_path, dtype=torch.float64)
    ids = torch.randint(CODES, (3, TOKENS), generator=seeded(2))
    together = vq.decode(ids)
    for i in range(3):
        torch.testing.assert_close(vq.decode(ids[i : i + 1])[0], together[i], atol=1e-12, rtol=0)


def test_the_codebook_lies_on_the_unit_sphere_as_it_is_used(tmp_path):
    state = reference.write_tokenizer(tmp_path)
    vq = load_larp_tokenizer(tmp_path)
    rows = state["bottleneck.regularizer.embedding.weight"]
    torch.testing.assert_close(vq.codebook, rows / rows.norm(dim=-1, keepdim=True))
    assert rows.norm(dim=-1).std() > 0.1


def test_the_prior_of_the_training_is_not_read_and_need_not_be_there(tmp_path):
    for name, prior in (("with", True), ("without", False)):
        reference.write_tokenizer(tmp_path / name, state=reference.tokenizer_state(prior=prior))
    with_prior, without = (load_larp_tokenizer(tmp_path / name).state_dict() for name in ("with", "without"))
    assert with_prior.keys() == without.keys() and all(torch.equal(v, without[k]) for k, v in with_prior.items())


def test_it_is_a_model_of_diffusers_and_other_dtypes_work(tmp_path):
    reference.write_tokenizer(tmp_path / "a")
    vq = load_larp_tokenizer(tmp_path / "a")
    vq.save_pretrained(tmp_path / "b")
    again = LARPTokenizer.from_pretrained(tmp_path / "b").eval()
    ids = vq.encode(clips())
    assert torch.equal(again.encode(clips()), ids) and torch.equal(again.decode(ids), vq.decode(ids))
    half = load_larp_tokenizer(tmp_path / "a", dtype=torch.bfloat16)
    assert half.decode(ids).dtype == torch.bfloat16 and (half.decode(ids) - vq.decode(ids)).abs().mean() < 0.05
    assert (half.encode(clips()) == ids).float().mean() > 0.7


@pytest.mark.parametrize(
    "shape", [(2, 3, FRAMES, SIDE), (1, 3, FRAMES - 1, SIDE, SIDE), (1, 3, FRAMES, SIDE, 8), (0, 3, 8, 16, 16)]
)
def test_what_is_no_clip_is_refused(tmp_path, shape):
    reference.write_tokenizer(tmp_path)
    with pytest.raises(InputError) as error:
        load_larp_tokenizer(tmp_path).encode(torch.zeros(shape))
    one_clear_line(error.value, f"clips must be [B, 3, {FRAMES}, {SIDE}, {SIDE}]")


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(1, TOKENS), torch.zeros(TOKENS).long(), torch.full((1, TOKENS), CODES), torch.zeros(0, TOKENS).long()],
)
def test_what_are_no_codes_is_refused(tmp_path, ids):
    reference.write_tokenizer(tmp_path)
    with pytest.raises(InputError) as error:
        load_larp_tokenizer(tmp_path).decode(ids)
    one_clear_line(error.value, f"ids must be [B, {TOKENS}] whole numbers from 0 to {CODES - 1}")


def changed(key: str, value: Tensor | None) -> Any:
    """Writes the folder with one tensor changed or left out."""

    def write(folder: Path) -> None:
        state = reference.tokenizer_state()
        state.pop(key)
        reference.write_tokenizer(folder, state=state | ({} if value is None else {key: value}))

    return write


def configured(**config: Any) -> Any:
    return lambda folder: reference.write_tokenizer(folder, **config)


def cut(folder: Path) -> None:
    reference.write_tokenizer(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_LOOKUP = {
    "name": "bottleneck",
    "args": {"norm": "none", "regularizer": {"name": "vq", "args": {"l2_normalized": False}}},
}
BAD_NORM = {"name": "bottleneck", "args": {"norm": "ln_d", "regularizer": {"name": "vq", "args": {"l2_normalized": True}}}}


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda folder: folder.mkdir(), "no folder of LARP's video tokenizer"),
        (lambda folder: reference.write_transformer(folder), "holds a transformer of LARP"),
        (cut, "truncated, corrupt or no weight file"),
        (changed("decoder.blocks.1.attn.qkv.weight", None), "missing decoder.blocks.1.attn.qkv.weight"),
        (
            changed("encoder.blocks.0.mlp.fc1.bias", torch.zeros(7)),
            "encoder.blocks.0.mlp.fc1.bias has shape [7], expected [128]",
        ),
        (
            changed("final_layer.linear.bias", torch.zeros(768, dtype=torch.int8)),
            "final_layer.linear.bias has dtype torch.int8",
        ),
        (
            changed("encoder_patch_pe", None),
            "encoder_patch_pe + encoder_patch_token_type_embed must make [8, 32], but is missing",
        ),
        (changed("encoder_patch_pe", torch.zeros(1, 9, 32)), "must make [8, 32], but is of shape [9, 32]"),
        (
            changed("bottleneck.in_linear.weight", torch.zeros(4)),
            "bottleneck.in_linear.weight has shape [4], expected 2 axes",
        ),
        (configured(input_size="big"), "config.json: input_size cannot be 'big'"),
        (configured(encoder_num_heads=5), "must divide"),
        (configured(decoder_patch_size=4), "are not supported"),
        (configured(temporal_patch_size=1), "are not supported"),
        (configured(bottleneck=BAD_LOOKUP), "not looked up on the unit sphere"),
        (configured(bottleneck=BAD_NORM), "not looked up on the unit sphere"),
        (configured(bottleneck=3), "not looked up on the unit sphere"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, write, says):
    write(tmp_path / "a")
    with pytest.raises(CheckpointError) as error:
        load_larp_tokenizer(tmp_path / "a")
    message = str(error.value).replace(str(tmp_path), "")
    one_clear_line(message, says)
