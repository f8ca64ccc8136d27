"""Published weights of taming's VQGAN and of MoVQGAN, read and written in their own key layout.

These are ``vqgan.ckpt`` of Meta's Chameleon (which Lumina-mGPT and Anole use, too), the ``model.vqmodel.*`` tensors of an
Anole folder, and ``movqgan_67M/102M/270M.ckpt`` (Lumina-mGPT 2.0 uses the last). They carry no config: it follows from
keys and shapes. Upstream attends with 1x1 convolutions, diffusers with linear maps: the same numbers in another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.errors import CheckpointError
from arsd.models.weight_files import (
    check_keys,
    check_tensors,
    count_indices,
    read_state_dict,
    shape_of,
    write_state_dict,
)
from arsd.tokenizers.vqgan import VQGANTokenizer

_PREFIX = "model.vqmodel."  # where a language model's folder keeps its tokenizer
_TRAINING_KEYS = ("loss.", "ema.", "ema_", "model_ema.")  # perceptual loss, discriminator and running averages
_RENAMES = (  # ours to upstream's, in this order; the levels of the decoder are counted the other way round
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".down_blocks.", ".down."),
    (".up_blocks.", ".up."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".group_norm.", ".norm."),
    (".spatial_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)


def vqgan_config(state: Mapping[str, Tensor], name: str | Path) -> dict[str, Any]:
    """Arguments of :class:`VQGANTokenizer` for the upstream tensors ``state`` (shapes only), called ``name`` in messages.

    Raises:
        CheckpointError: when a tensor that tells a size is missing, or the tokenizer is of another kind.
    """
    codes, code_dim = shape_of(state, "quantize.embedding.weight", 2, name)
    base = shape_of(state, "encoder.conv_in.weight", 4, name)[0]
    if "encoder.conv_blocks.0.res.0.conv1.weight" in state:
        raise CheckpointError(f"{name} is a LlamaGen tokenizer: load it with VQTokenizer.from_single_file")
    if not any(key.startswith("decoder.") for key in state):
        what = f"{name} has a tokenizer's encoder only (as facebook/chameleon-7b has), which cannot paint"
        raise CheckpointError(f"{what}: give Meta's vqgan.ckpt or the folder of an Anole checkpoint")
    levels = range(count_indices(state, r"encoder\.down\.(\d+)\."))
    widths = [shape_of(state, f"encoder.down.{level}.block.0.conv1.weight", 4, name)[0] for level in levels]
    if not widths or base != widths[0] or any(width % 32 for width in widths):
        raise CheckpointError(
            f"{name}: encoder channels {[base, *widths]} are no VQGAN's: give a vqgan or movqgan .ckpt file"
        )
    latent_channels = shape_of(state, "encoder.conv_out.weight", 4, name)[0]
    spatial = any(".conv_y." in key for key in state)
    if spatial and code_dim != latent_channels:
        sizes = f"codes of {code_dim} and latents of {latent_channels} channels"
        raise CheckpointError(f"{name}: a MoVQGAN with {sizes} is not supported: give a published movqgan_*.ckpt")
    return {
        "codebook_size": codes,
        "codebook_dim": code_dim,
        "latent_channels": latent_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": count_indices(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_levels": tuple(level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state),
        "norm_type": "spatial" if spatial else "group",
    }


def load_vqgan(
    source: str | Path | Mapping[str, Tensor],
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    lookup: str = "distance",
) -> VQGANTokenizer:
    """Load an upstream VQGAN or MoVQGAN tokenizer in evaluation mode on the CPU.

    Args:
        source: a ``.ckpt``/``.pt`` or ``.safetensors`` file, see :func:`read_state_dict`, or its tensors by upstream key.
            Keys may start with ``model.vqmodel.``. The tensors are copied, and the mapping stays as it is.
        name: what messages call the source; by default the path.
        dtype: dtype of all parameters; by default that of the codebook.
        lookup: how codes are found, see :class:`VQGANTokenizer`; files do not tell.

    Raises:
        CheckpointError: when the file cannot be read, lacks keys (all of the decoder's, for instance), has other keys
            (those of losses and running averages are dropped), or a shape does not fit.
    """
    tensors = source if isinstance(source, Mapping) else read_state_dict(source)
    name = name or ("the tokenizer's state dict" if isinstance(source, Mapping) else str(source))
    short = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
    state = {key: value for key, value in short.items() if not key.startswith(_TRAINING_KEYS)}
    del tensors, short
    config = vqgan_config(state, name)
    with torch.device("meta"):
        tokenizer = VQGANTokenizer(**config, lookup=lookup)
    layout, ours = _layout(tokenizer), tokenizer.state_dict()
    check_keys(state, layout, name, "MoVQGAN" if config["norm_type"] == "spatial" else "VQGAN")
    check_tensors(state, {key: _upstream(key, ours[mine]).shape for key, mine in layout.items()}, name)
    dtype = dtype or state["quantize.embedding.weight"].dtype
    copies = {}
    for key, mine in layout.items():
        value = state.pop(key).detach().reshape(ours[mine].shape)
        copies[mine] = value.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    tokenizer.load_state_dict(copies, assign=True)
    return tokenizer.eval()


def save_vqgan(tokenizer: VQGANTokenizer, path: str | Path) -> None:
    """Write ``tokenizer`` in the upstream layout; the exact inverse of :func:`load_vqgan`, bit for bit.

    A VQGAN is written as ``{"state_dict": ...}`` and a MoVQGAN flat, because upstream opens them so; both flat if ``path``
    ends in ``.safetensors``. The file replaces an older one only when it is complete.
    """
    ours = tokenizer.state_dict()
    state = {key: _upstream(key, ours[mine]).detach().cpu().contiguous() for key, mine in _layout(tokenizer).items()}
    write_state_dict(state, path, "state_dict" if tokenizer.config["norm_type"] == "group" else None)


def _layout(tokenizer: VQGANTokenizer) -> dict[str, str]:
    """Our parameter by upstream key."""
    top = len(tokenizer.config["block_out_channels"]) - 1
    layout = {}
    for mine in tokenizer.state_dict():
        key = mine.removeprefix("net.")
        for old, new in _RENAMES:
            key = key.replace(old, new)
        layout[re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{top - int(match[1])}.", key)] = mine
    return layout


def _upstream(key: str, value: Tensor) -> Tensor:
    """Our tensor in upstream's shape: the matrices of an attention are 1x1 convolutions there."""
    return value[..., None, None] if value.ndim == 2 and not key.startswith("quantize.") else value
