"""Emu3's image tokenizer (arXiv 2409.18869, section 2.2): a video tokenizer, of which a picture is one latent frame.

The network is transformers' ``Emu3VQVAE``; this gives it the interface of the other image tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from arsd.tokenizers.checks import check_ids, check_pictures


class Emu3VQTokenizer(ModelMixin, ConfigMixin):
    """Convolutional autoencoder over frames, with a codebook that is searched by Euclidean distance.

    Args:
        codebook_size: number of codes.
        embed_dim: dimension of a code.
        latent_channels: channels between encoder and codes.
        base_channels: channels at full resolution; a multiple of 32.
        channel_multiplier: one entry per resolution; ``len - 1`` halvings.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: indices of the resolutions that attend.
        temporal_downsample_factor: frames per latent frame. A picture is that many equal frames on the way in, and the first
            of them on the way out.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 32768,
        embed_dim: int = 4,
        latent_channels: int = 4,
        base_channels: int = 256,
        channel_multiplier: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (3,),
        temporal_downsample_factor: int = 4,
    ) -> None:
        super().__init__()
        self.net = Emu3VQVAE(
            Emu3VQVAEConfig(
                codebook_size=codebook_size,
                embed_dim=embed_dim,
                latent_channels=latent_channels,
                base_channels=base_channels,
                channel_multiplier=list(channel_multiplier),
                num_res_blocks=num_res_blocks,
                attn_resolutions=list(attn_resolutions),
                temporal_downsample_factor=temporal_downsample_factor,
                hidden_size=base_channels * channel_multiplier[-1],
            )
        )

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along one side."""
        return int(self.net.vision_spatial_factor)

    @property
    def codebook(self) -> Tensor:
        """The codes: [codebook_size, embed_dim]."""
        return self.net.quantize.embedding.weight

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Code ids [B, h, w] of pictures [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: when a side is not a multiple of the downsampling factor.
        """
        factor = self.downsample_factor
        check_pictures(images, factor)
        sizes = torch.tensor([images.shape[2:]] * len(images))
        found: Any = self.net.encode(images.to(self.dtype), image_sizes=sizes)
        return torch.stack(list(found.image_tokens))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of ids [B, h, w], nominally in [-1, 1] and not clamped.

        Raises:
            InputError: when the ids are not a [B, h, w] grid of codes.
        """
        check_ids(ids, len(self.codebook))
        pixels: Tensor = self.net.decode(ids)
        return pixels

    @classmethod
    def from_published(cls, folder: str | Path, **options: Any) -> Emu3VQTokenizer:
        """Load a published folder; see :func:`arsd.models.emu3_files.load_emu3_vq`."""
        from arsd.models.emu3_files import load_emu3_vq

        return load_emu3_vq(folder, **options)
