"""Taming's VQGAN (arXiv 2012.09841) and MoVQGAN (arXiv 2209.09002) as image tokenizers: pictures to code ids and back.

Chameleon, Anole and Lumina-mGPT paint with the first, Lumina-mGPT 2.0 with the second. The network of both is diffusers'
``VQModel``; added here: a look-up whose memory does not grow with the picture, and ids of any grid on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn import functional as F

from arsd.errors import InputError
from arsd.tokenizers.checks import check_ids, check_pictures

_DISTANCES = 2**24  # latents x codes that are compared at once: 64 MiB in float32


class VQGANTokenizer(ModelMixin, ConfigMixin):
    """Convolutional autoencoder with a codebook that is searched by Euclidean distance.

    The defaults are Chameleon's tokenizer, which is Lumina-mGPT's and Anole's, too. Group normalisations have 32 groups.

    Args:
        codebook_size: number of codes.
        codebook_dim: dimension of a code.
        latent_channels: channels between the encoder and the 1x1 convolution to ``codebook_dim``.
        block_out_channels: channels per resolution, from the full one down, in multiples of 32; ``len - 1`` halvings.
        layers_per_block: residual blocks per resolution (one more in the decoder).
        attention_levels: indices into ``block_out_channels`` of the resolutions that attend, in encoder and decoder.
            Attention in the middle is always there.
        norm_type: ``"group"`` (taming), or ``"spatial"``: the decoder scales and shifts its normalised features by the
            codes at the same place (MoVQGAN). The latter needs ``codebook_dim`` equal to ``latent_channels``.
        lookup: a latent's code is the one at the least Euclidean ``"distance"``, or the one with the largest inner product
            (``"dot"``: IBQ, arXiv 2412.02692, the tokenizer of Emu3.5).

    Raises:
        InputError: for sizes that cannot be built.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 8192,
        codebook_dim: int = 256,
        latent_channels: int = 256,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (),
        norm_type: str = "group",
        lookup: str = "distance",
    ) -> None:
        super().__init__()
        levels = range(len(block_out_channels))
        if not block_out_channels or any(width < 32 or width % 32 for width in block_out_channels):
            raise InputError(f"block_out_channels must be multiples of 32, not {list(block_out_channels)}")
        if not set(attention_levels) <= set(levels):
            raise InputError(f"attention_levels must be indices below {len(levels)}, not {list(attention_levels)}")
        if norm_type not in ("group", "spatial"):
            raise InputError(f'norm_type must be "group" or "spatial", not {norm_type!r}')
        if lookup not in ("distance", "dot"):
            raise InputError(f'lookup must be "distance" or "dot", not {lookup!r}')
        if norm_type == "spatial" and codebook_dim != latent_channels:
            raise InputError(f"spatial norms need codebook_dim {codebook_dim} equal to latent_channels {latent_channels}")
        attends = [level in attention_levels for level in levels]
        self.net = VQModel(
            down_block_types=tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attends),
            up_block_types=tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attends)),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            num_vq_embeddings=codebook_size,
            vq_embed_dim=codebook_dim,
            norm_type=norm_type,
        )

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along one side."""
        config: Any = self.config
        return int(2 ** (len(config.block_out_channels) - 1))

    @property
    def codebook(self) -> Tensor:
        """The codes as they are used: [codebook_size, codebook_dim], of any length."""
        return self.net.quantize.embedding.weight

    def latents(self, images: Tensor) -> Tensor:
        """Latents [B, h, w, codebook_dim] of pictures [B, 3, H, W] in [-1, 1], before look-up."""
        return self.net.encode(images).latents.permute(0, 2, 3, 1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of code vectors [B, h, w, codebook_dim]."""
        return self.net.decode(codes.permute(0, 3, 1, 2).contiguous(), force_not_quantize=True).sample

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Code ids [B, h, w] of pictures [B, 3, H, W] in [-1, 1].

        Distances are taken in float32 at least, so that a half-precision tokenizer does not see ties.

        Raises:
            InputError: when a side is not a multiple of the downsampling factor.
        """
        factor = self.downsample_factor
        check_pictures(images, factor)
        latents = self.latents(images.to(self.dtype))
        find = _nearest if self.config["lookup"] == "distance" else _largest
        return find(latents.flatten(0, 2), self.codebook).view(latents.shape[:3])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of ids [B, h, w], nominally in [-1, 1] and not clamped.

        Raises:
            InputError: when the ids are not a [B, h, w] grid of codes.
        """
        check_ids(ids, len(self.codebook))
        return self.pixels(F.embedding(ids, self.codebook))

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> VQGANTokenizer:
        """Load a published ``.ckpt`` or ``.safetensors`` file; see :func:`arsd.models.vqgan_files.load_vqgan`."""
        from arsd.models.vqgan_files import load_vqgan

        return load_vqgan(path, **options)

    def save_single_file(self, path: str | Path) -> None:
        """Write the upstream layout; see :func:`arsd.models.vqgan_files.save_vqgan`."""
        from arsd.models.vqgan_files import save_vqgan

        save_vqgan(self, path)


def _nearest(latents: Tensor, codes: Tensor) -> Tensor:
    """Ids [N] of the ``codes`` [C, e] nearest to ``latents`` [N, e]; the first one at a tie, as upstream (on the CPU)."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    codes = codes.to(dtype)
    lengths = codes.square().sum(1)
    ids = []
    for part in latents.to(dtype).split(max(1, _DISTANCES // len(codes))):
        # upstream's terms in upstream's order: near a tie, rounding decides
        distances = (part.square().sum(1, keepdim=True) + lengths).sub_(part @ codes.T, alpha=2)
        ids.append(distances.argmin(1))
    return torch.cat(ids)


def _largest(latents: Tensor, codes: Tensor) -> Tensor:
    """Ids [N] of the ``codes`` [C, e] with the largest inner products with ``latents`` [N, e]."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    codes = codes.to(dtype)
    parts = latents.to(dtype).split(max(1, _DISTANCES // len(codes)))
    return torch.cat([(part @ codes.T).argmax(1) for part in parts])
