"""The Cosmos tokenizer: TorchScript files with NVIDIA's signatures give ids, pictures and videos, and are saved again."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import reference_cosmos as reference
import torch
from diffusers import DiffusionPipeline
from tiny_pipeline import one_clear_line, seeded
from torch import nn

from arsd.errors import CheckpointError, InputError
from arsd.provenance import model_hash
from arsd.tokenizers.cosmos import CosmosTokenizer

PUBLISHED = (8, 8, 8, 5, 5, 5)


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 48, generator=seeded(1)) * 2 - 1


def videos(frames: int = 17, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, frames, 32, 48, generator=seeded(2)) * 2 - 1


def script(module: nn.Module, path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)


# ------------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("levels", [reference.LEVELS, PUBLISHED])
def test_ids_and_pictures_are_what_the_files_give(tmp_path, levels):
    state = reference.write_cosmos(tmp_path, levels)
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    ids = vq.encode(pictures())
    assert ids.dtype == torch.int64 and ids.shape == (2, 2, 3) and len(ids.unique()) > 6
    assert torch.equal(ids, reference.encode(state, pictures(), levels))
    found = vq.decode(ids)
    torch.testing.assert_close(found.double(), reference.decode(state, ids, levels), atol=1e-6, rtol=0)
    assert found.shape == (2, 3, 32, 48) and found.std() > 0.1 and not found.requires_grad
    alone = torch.cat([vq.decode(one[None]) for one in ids])
    torch.testing.assert_close(alone, found)
    assert torch.equal(vq.decode(ids.int()), found)


@pytest.mark.parametrize("levels", [reference.LEVELS, PUBLISHED])
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_ids_and_videos_are_what_the_files_give(tmp_path, levels, frames):
    state = reference.write_cosmos(tmp_path, levels)
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    ids = vq.encode_video(videos(frames))
    assert ids.dtype == torch.int64 and ids.shape == (2, 1 + frames // 8, 2, 3) and len(ids.unique()) > 6
    assert torch.equal(ids, reference.encode_video(state, videos(frames), levels)) and vq.temporal_factor == 8
    found = vq.decode_video(ids)
    torch.testing.assert_close(found.double(), reference.decode_video(state, ids, levels), atol=1e-6, rtol=0)
    assert found.shape == videos(frames).shape and found.std() > 0.1 and not found.requires_grad
    torch.testing.assert_close(torch.cat([vq.decode_video(one[None]) for one in ids]), found)


def test_a_picture_is_a_video_of_one_frame_and_beginnings_do_not_depend_on_what_follows(tmp_path):
    reference.write_cosmos(tmp_path)
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    ids = vq.encode_video(videos(17))
    assert torch.equal(vq.encode(pictures()), vq.encode_video(pictures()[:, :, None])[:, 0])
    assert torch.equal(vq.decode(ids[:, 0]), vq.decode_video(ids[:, :1])[:, :, 0])
    assert torch.equal(vq.encode_video(videos(17)[:, :, :9]), ids[:, :2])


def test_the_codebook_is_in_the_order_of_the_ids(tmp_path):
    """Against digits by division, and against the codes that the encoder gives beside its ids."""
    reference.write_cosmos(tmp_path, PUBLISHED, config=False)  # as NVIDIA's folder: nothing says the levels
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    table = vq.codebook
    assert table.shape == (64000, 6) and table.dtype == torch.float32
    for number in (0, 1, 7, 8, 511, 512, 2560, 12345, 63999):
        assert table[number].tolist() == reference.code_of(number, PUBLISHED)
    assert table[0].tolist() == [-1] * 6 and table[-1].tolist() == [0.75] * 3 + [1.0] * 3
    ids, codes, _ = vq.encoder(pictures()[:, :, None])
    assert torch.equal(table[ids.long()], codes.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_files_compute_in_their_own_dtype_whatever_the_pipelines_is(tmp_path, dtype):
    state = reference.write_cosmos(tmp_path, dtype=dtype)
    vq = CosmosTokenizer.from_pretrained(tmp_path, torch_dtype=torch.float64)
    ids, kept = vq.encode(pictures()), {name: p.clone() for name, p in vq.named_parameters()}
    for other in (torch.float64, torch.float32):
        assert vq.to(other) is vq and vq.dtype == dtype
        assert all(torch.equal(p, kept[name]) for name, p in vq.named_parameters()) and len(kept) == 4
        assert torch.equal(vq.encode(pictures().to(other)), ids)
    assert vq.double().half().decode(ids).dtype == dtype
    difference = (vq.decode(ids).double() - reference.decode(state, ids)).abs().max()
    assert difference < (0.02 if dtype == torch.bfloat16 else 1e-6)
    plain = CosmosTokenizer(*(cls(reference.LEVELS).to(dtype) for cls in (reference.Encoder, reference.Decoder)))
    moved = plain.to("meta", torch.float64)  # where TorchScript cannot go; the way there is the same
    assert {(p.device.type, p.dtype) for p in moved.parameters()} == {("meta", dtype)}


def test_the_same_ids_give_the_same_bits_every_time(tmp_path):
    """TorchScript optimises after its first calls, which may round otherwise; that is turned off, here and nowhere else."""
    reference.write_cosmos(tmp_path)
    vq, seen = CosmosTokenizer.from_pretrained(tmp_path), []

    class Watched(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            seen.append(torch._C._get_graph_executor_optimize())
            return torch.zeros(1, 3, 1, 16, 16)

    ids = torch.zeros(1, 1, 1, dtype=torch.int64)
    first = vq.decode(ids)
    assert all(torch.equal(vq.decode(ids), first) for _ in range(4))
    vq.decoder = Watched()
    vq.decode(ids)
    assert seen == [False] and torch._C._get_graph_executor_optimize()


# ------------------------------------------------------------------------------------------------------- saved and loaded


class Holder(DiffusionPipeline):
    """A pipeline with nothing but the tokenizer."""

    def __init__(self, vq: CosmosTokenizer) -> None:
        super().__init__()
        self.register_modules(vq=vq)


def test_it_is_a_component_of_diffusers(tmp_path, recwarn):
    reference.write_cosmos(tmp_path / "a")
    vq = CosmosTokenizer.from_pretrained(tmp_path / "a")
    Holder(vq).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "model_index.json").read_text())["vq"] == [
        "arsd.tokenizers.cosmos",
        "CosmosTokenizer",
    ]
    files = {path.name for path in (tmp_path / "b" / "vq").iterdir()}
    assert files == {"encoder.jit", "decoder.jit", "config.json"}
    for path in (tmp_path / "a").iterdir():  # the saved one needs nothing of the first
        path.unlink()
    again = Holder.from_pretrained(tmp_path / "b", dtype=torch.float64).vq
    assert again.config["levels"] == list(reference.LEVELS) and again.downsample_factor == 16 and not again.training
    assert torch.equal(again.encode(pictures()), vq.encode(pictures()))
    assert torch.equal(again.decode(vq.encode(pictures())), vq.decode(vq.encode(pictures())))
    assert not [w for w in recwarn if "torch.jit" in str(w.message)]


def test_another_program_is_another_model(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        reference.write_cosmos(tmp_path / name, seed=seed)
    (tmp_path / "b" / "encoder.jit").write_bytes((tmp_path / "a" / "encoder.jit").read_bytes())
    (tmp_path / "b" / "decoder.jit").write_bytes((tmp_path / "a" / "decoder.jit").read_bytes())
    first, same, other = (model_hash(tmp_path / name) for name in "abc")
    assert first == same != other


# ------------------------------------------------------------------------------------------------------------------ errors


class Continuous(nn.Module):
    """As the encoder of a CV tokenizer: latents, no ids."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], 16, 1, x.shape[3] // 16, x.shape[4] // 16)


class Finer(nn.Module):
    """As the decoder of a tokenizer with 8 pixels per code."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(ids.shape[0], 3, 1, 8 * ids.shape[2], 8 * ids.shape[3])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda f: (f / "encoder.jit").unlink(),
            "encoder.jit is not a file: give vq=..., the folder of huggingface.co/nvidia",
        ),
        (lambda f: (f / "decoder.jit").unlink(), "decoder.jit is not a file"),
        (lambda f: (f / "decoder.jit").write_bytes((f / "decoder.jit").read_bytes()[:700]), "decoder.jit is truncated"),
        (lambda f: (f / "encoder.jit").write_bytes(b"version https://git-lfs"), "encoder.jit is truncated, corrupt or no"),
        (lambda f: torch.save({"a": torch.ones(2)}, f / "encoder.jit"), "no TorchScript file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no readable JSON"),
    ],
)
def test_missing_and_damaged_files_are_one_clear_line(tmp_path, damage, says):
    reference.write_cosmos(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        CosmosTokenizer.from_pretrained(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_programs_of_another_tokenizer_are_named_when_they_show_it(tmp_path):
    reference.write_cosmos(tmp_path)
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    script(Continuous(), tmp_path / "encoder.jit")
    script(Finer(), tmp_path / "decoder.jit")
    other = CosmosTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as error:
        CosmosTokenizer(other.encoder, vq.decoder, reference.LEVELS).encode(pictures())
    one_clear_line(
        error.value, "encoder.jit gives torch.float32 [2, 16, 1, 2, 3] where ids [2, 1, 2, 3] belong: give the folder"
    )
    with pytest.raises(CheckpointError) as error:
        CosmosTokenizer(vq.encoder, other.decoder, reference.LEVELS).decode(torch.zeros(1, 2, 3, dtype=torch.int64))
    one_clear_line(
        error.value, "decoder.jit gives [1, 3, 1, 16, 24] where pictures [1, 3, 1, 32, 48] belong: give the folder"
    )


def test_programs_with_another_step_in_time_are_named(tmp_path):
    """As a tokenizer with 4 frames per code is."""
    reference.write_cosmos(tmp_path)
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    other = CosmosTokenizer(vq.encoder, vq.decoder, reference.LEVELS, temporal_factor=4)
    assert other.temporal_factor == 4
    with pytest.raises(CheckpointError) as error:
        other.encode_video(videos(9))
    one_clear_line(error.value, "gives torch.int32 [2, 2, 2, 3] where ids [2, 3, 2, 3] belong: give the folder")
    with pytest.raises(CheckpointError) as error:
        other.decode_video(torch.zeros(1, 2, 1, 1, dtype=torch.int64))
    one_clear_line(error.value, "gives [1, 3, 9, 16, 16] where pictures [1, 3, 5, 16, 16] belong: give the folder")
    other.save_pretrained(tmp_path / "again")
    assert CosmosTokenizer.from_pretrained(tmp_path / "again").temporal_factor == 4


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((3, 9, 32, 32), "videos must be [B, 3, T, H, W] with T = 1 + 8 k frames, not (3, 9, 32, 32)"),
        ((1, 3, 8, 32, 32), "videos must be [B, 3, T, H, W] with T = 1 + 8 k frames"),
        ((1, 3, 0, 32, 32), "videos must be"),
        ((1, 4, 9, 32, 32), "pictures must be [B, 3, H, W]"),
        ((1, 3, 9, 40, 32), "sides in multiples of 16"),
        ((0, 3, 9, 32, 32), "pictures must be [B, 3, H, W]"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, shape, says):
    reference.write_cosmos(tmp_path)
    with pytest.raises(InputError) as error:
        CosmosTokenizer.from_pretrained(tmp_path).encode_video(torch.zeros(shape))
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(2, 2, 2).long(), torch.zeros(1, 2, 2, 2), torch.full((1, 1, 2, 2), 32), torch.zeros(1, 0, 2, 2).long()],
)
def test_what_are_no_ids_of_a_video_is_refused(tmp_path, ids):
    reference.write_cosmos(tmp_path)
    with pytest.raises(InputError, match="ids"):
        CosmosTokenizer.from_pretrained(tmp_path).decode_video(ids)


@pytest.mark.parametrize("levels", [(), (8, 1), ("a",), (8, 2.5)])
def test_levels_that_make_no_grid_are_refused(tmp_path, levels):
    reference.write_cosmos(tmp_path)
    vq = CosmosTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="levels must be whole numbers of 2 or more"):
        CosmosTokenizer(vq.encoder, vq.decoder, levels)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 40), (0, 3, 32, 32), (1, 3, 1, 32, 32)])
def test_what_is_no_picture_is_refused(tmp_path, shape):
    reference.write_cosmos(tmp_path)
    with pytest.raises(InputError, match=r"pictures must be \[B, 3, H, W\] with sides in multiples of 16"):
        CosmosTokenizer.from_pretrained(tmp_path).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 2).long(), torch.zeros(1, 2, 2), torch.full((1, 2, 2), 32), -torch.ones(1, 1, 1).long()]
)
def test_what_are_no_ids_is_refused(tmp_path, ids):
    reference.write_cosmos(tmp_path)
    with pytest.raises(InputError, match=r"ids must be a \[B, h, w\] grid of whole numbers from 0 to 31"):
        CosmosTokenizer.from_pretrained(tmp_path).decode(ids)
