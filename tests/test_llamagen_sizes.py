"""Every published LlamaGen size loads as it is, class- and text-conditional, and computes what upstream computes.

Files of whole models have their published names and exact shapes, and tensors without content; a few layers of each head
size have real weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import reference_llamagen as reference
import torch
from torch import Tensor

from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.llamagen_files import load_transformer, load_vq, transformer_config

CODES, SLOTS, CAPTION_DIM = 16384, 120, 2048


class Size(NamedTuple):
    layers: int
    heads: int
    width: int
    head_dim: int
    mlp: int
    millions: float  # parameters, as upstream states them


SIZES = {
    "B": Size(12, 12, 768, 64, 2048, 111),
    "L": Size(24, 16, 1024, 64, 2816, 343),
    "XL": Size(36, 20, 1280, 64, 3584, 775),
    "XXL": Size(48, 24, 1536, 64, 4096, 1400),
    "XXXL": Size(48, 40, 2560, 64, 6912, 3900),
    "1B": Size(22, 32, 2048, 64, 5632, 1200),
    "3B": Size(24, 32, 3200, 100, 8704, 3100),
    "7B": Size(32, 32, 4096, 128, 11008, 6600),
}
# name -> size, text-conditional, tokens along one side, container
PUBLISHED = {
    "c2i_B_256.pt": ("B", False, 16, "model"),
    "c2i_L_256.pt": ("L", False, 16, "model"),
    "c2i_B_384.pt": ("B", False, 24, "model"),
    "c2i_L_384.pt": ("L", False, 24, "model"),
    "c2i_XL_384.pt": ("XL", False, 24, "model"),
    "c2i_XXL_384.pt": ("XXL", False, 24, None),
    "c2i_3B_384.pt": ("3B", False, 24, None),
    "t2i_XL_stage1_256.pt": ("XL", True, 16, "model"),
    "t2i_XL_stage2_512.pt": ("XL", True, 32, "model"),
}
NAMES = ["c2i_{}_256.pt", "c2i_{}_384.pt", "c2i_{}_ds8_256.pt", "t2i_{}_stage1_256.pt", "t2i_{}_stage2_512.pt"]
SIDES = [16, 24, 32, 16, 32]


def shapes(size: Size, text: bool, codes: int = CODES) -> dict[str, tuple[int, ...]]:
    """The published keys."""
    width = size.width
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (codes, width)}
    if text:
        found["cls_embedding.uncond_embedding"] = (SLOTS, CAPTION_DIM)
        found["cls_embedding.cap_proj.fc1.weight"] = (width, CAPTION_DIM)
        found["cls_embedding.cap_proj.fc2.weight"] = (width, width)
    else:
        found["cls_embedding.embedding_table.weight"] = (1001, width)
    for i in range(size.layers):
        block = {"attention.wqkv": (3 * width, width), "attention.wo": (width, width)}
        block |= {f"feed_forward.{name}": (size.mlp, width) for name in ("w1", "w3")}
        block["feed_forward.w2"] = (width, size.mlp)
        found |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
        found |= {f"layers.{i}.{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
    return found | {"norm.weight": (width,), "output.weight": (codes, width)}


def empty_state(size: Size, text: bool) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(size, text).items()}


def wanted(size: Size, text: bool, grid: int) -> dict[str, object]:
    condition = {"condition_tokens": SLOTS, "caption_dim": CAPTION_DIM} if text else {"num_classes": 1000}
    return {
        "vocab_size": CODES,
        "hidden_size": size.width,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "num_key_value_heads": None,
        "intermediate_size": size.mlp,
        "grid": grid,
        "condition": "text" if text else "class",
        **condition,
    }


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize(("pattern", "side"), list(zip(NAMES, SIDES, strict=True)))
@pytest.mark.parametrize("name", SIZES)
def test_every_size_follows_from_its_shapes(name: str, pattern: str, side: int) -> None:
    size, text = SIZES[name], pattern.startswith("t2i")
    assert size.mlp == -(-int(8 * size.width / 3) // 256) * 256 and size.head_dim * size.heads == size.width
    config = transformer_config(empty_state(size, text), f"models/{pattern.format(name)}")
    assert config == wanted(size, text, side)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_the_model_has_exactly_the_published_parameters(name: str, text: bool) -> None:
    size, state = SIZES[name], empty_state(SIZES[name], text)
    with torch.device("meta"):
        model = LlamaGenTransformer(**transformer_config(state, "x_256.pt"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(tensor.numel() for tensor in state.values())
    assert len(list(model.parameters())) == len(state) + 2 * size.layers  # q, k and v are apart
    assert model.lm.model.rotary_emb.head_dim == model.lm.model.layers[0].self_attn.head_dim == size.head_dim
    if not text:
        assert count / 1e6 == pytest.approx(size.millions, rel=0.04 if size.millions > 1000 else 0.002)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_file_loads_by_its_name_alone(tmp_path: Path, name: str) -> None:
    size, text, grid, container = PUBLISHED[name]
    state = empty_state(SIZES[size], text)
    torch.save({container: state} if container else state, tmp_path / name)
    model = load_transformer(tmp_path / name)  # keys and shapes are checked on the way
    assert model.config.items() >= wanted(SIZES[size], text, grid).items()
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in state.values())
    table = model.lm.model.rotary_emb
    assert table.cos.shape == ((SLOTS if text else 1) + grid * grid, SIZES[size].head_dim) and table.cos.isfinite().all()


@pytest.mark.parametrize(("name", "multiplier"), [("vq_ds16_c2i.pt", (1, 1, 2, 2, 4)), ("vq_ds8_c2i.pt", (1, 2, 2, 4))])
def test_the_published_tokenizers_load(tmp_path: Path, name: str, multiplier: tuple[int, ...]) -> None:
    state = reference.vq_state(base=128, multiplier=multiplier, blocks=2, z=256)
    state["quantize.embedding.weight"] = torch.randn(CODES, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"model": state}, tmp_path / name)
    vq = load_vq(tmp_path / name)
    assert vq.downsample_factor == (16 if "ds16" in name else 8)
    assert vq.config.items() >= {"codebook_size": CODES, "codebook_dim": 8, "latent_channels": 256}.items()
    millions = sum(parameter.numel() for parameter in vq.parameters()) / 1e6
    assert round(millions) == (72 if "ds16" in name else 70)  # as upstream states them
    ids = torch.randint(CODES, (1, 2, 3), generator=torch.Generator().manual_seed(1))
    expected = reference.vq_decode(state, ids)
    assert (vq.decode(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


# --------------------------------------------------------------------------------------- what layers of real width compute


def real_state(size: Size, text: bool, codes: int) -> dict[str, Tensor]:
    """Random weights whose activations stay near 1, and so do the logits."""
    generator = torch.Generator().manual_seed(0)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        return 1 + 0.3 * drawn if "norm" in key else drawn / shape[-1] ** 0.5

    return {key: draw(key, shape) for key, shape in shapes(size, text, codes).items()}


@pytest.fixture
def relative_error(tmp_path: Path) -> Callable[..., float]:
    def measure(size: Size, text: bool, grid: int = 3, codes: int = 64, batch: int = 2) -> float:
        state = real_state(size, text, codes)
        torch.save({"model": state}, tmp_path / "a.pt")
        model = load_transformer(tmp_path / "a.pt", grid=grid, num_heads=size.heads)
        (tmp_path / "a.pt").unlink()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(codes, (batch, grid * grid), generator=generator)
        if text:
            features = torch.randn(batch, SLOTS, CAPTION_DIM, generator=generator)
            mask = torch.arange(SLOTS) >= torch.tensor([[SLOTS - 20], [0]])[:batch]
            slots = reference.caption_slots(state, features * mask[..., None])
            expected = reference.logits(state, size.heads, grid, slots, ids, mask)
            found = model(model.embed_captions(features, mask.long()), ids, mask.long())
        else:
            labels = torch.tensor([7, 1000])[:batch]
            expected = reference.logits(state, size.heads, grid, reference.class_slots(state, labels), ids)
            found = model(model.embed_classes(labels), ids)
        assert expected.std() > 0.5 and expected.shape == (batch, grid * grid, codes)
        return float((found - expected).abs().max() / expected.abs().max())

    return measure


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(  # head_dim 64, 100 and 128
    ("name", "layers"), [("B", 3), ("3B", 1), pytest.param("7B", 1, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_logits_of_real_width_are_upstreams(
    relative_error: Callable[..., float], name: str, layers: int, text: bool
) -> None:
    assert relative_error(SIZES[name]._replace(layers=layers), text) <= 1e-5
