"""LlamaGen's VQ image tokenizer (arXiv 2406.06525, section 3.1): pictures to code ids and back.

The network is transformers' ``JanusVQVAE`` (the same taming-style autoencoder); what it lacks is added here: L2-normalised
nearest-neighbour look-up on the way in, any grid shape on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from arsd.errors import InputError


class VQTokenizer(ModelMixin, ConfigMixin):
    """Convolutional autoencoder with a codebook on the unit sphere.

    Args:
        codebook_size: number of codes.
        codebook_dim: dimension of a code.
        latent_channels: channels between the encoder and the 1x1 convolution to ``codebook_dim``.
        base_channels: channels at full resolution; a multiple of 32 (group normalisation).
        channel_multiplier: one entry per resolution; ``len - 1`` halvings, so 5 entries give a factor of 16.
        num_res_blocks: residual blocks per resolution (one more in the decoder).
        patch_size: side of the pixel patches that are folded into channels in front of the network (and unfolded behind it);
            LlamaGen has 1. Full-resolution convolutions cost most of a small tokenizer's time on a CPU.
        norm_groups: groups of the group normalisations. LlamaGen has 32, at 128 base channels; with 32 channels that would
            be instance normalisation, which erases the colour of a picture.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        latent_channels: int = 256,
        base_channels: int = 128,
        channel_multiplier: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        norm_groups: int = 32,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.net = JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=codebook_dim,
                num_embeddings=codebook_size,
                latent_channels=latent_channels,
                base_channels=base_channels,
                channel_multiplier=list(channel_multiplier),
                num_res_blocks=num_res_blocks,
                in_channels=3 * patch_size**2,
                out_channels=3 * patch_size**2,
            )
        )
        for module in self.net.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = norm_groups

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along one side: the patch, halved resolutions included."""
        config: Any = self.config
        return int(config.patch_size * 2 ** (len(config.channel_multiplier) - 1))

    @property
    def codebook(self) -> Tensor:
        """The codes as they are used: [codebook_size, codebook_dim], rows of length 1."""
        table = self.net.quantize.embedding
        every = torch.arange(table.num_embeddings, device=table.weight.device)
        return F.normalize(table(every), dim=-1)  # a call, so that weights which are elsewhere are brought

    def latents(self, images: Tensor) -> Tensor:
        """Unit-length latents [B, h, w, codebook_dim] of pictures [B, 3, H, W] in [-1, 1], before look-up."""
        z = self.net.quant_conv(self.net.encoder(F.pixel_unshuffle(images, self.config["patch_size"])))
        return F.normalize(z.permute(0, 2, 3, 1), dim=-1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of code vectors [B, h, w, codebook_dim]."""
        out = self.net.decoder(self.net.post_quant_conv(codes.permute(0, 3, 1, 2).contiguous()))
        return F.pixel_shuffle(out, self.config["patch_size"])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Code ids [B, h, w] of pictures [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: when a side is not a multiple of the downsampling factor.
        """
        factor = self.downsample_factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise InputError(f"pictures must be [B, 3, H, W] with sides in multiples of {factor}, not {tuple(images.shape)}")
        return (self.latents(images.to(self.dtype)) @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of ids [B, h, w], nominally in [-1, 1] and not clamped.

        Raises:
            InputError: when the ids are not a [B, h, w] grid of codes.
        """
        if ids.ndim != 3 or ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= len(self.codebook):
            raise InputError(f"ids must be a [B, h, w] grid of codes below {len(self.codebook)}")
        return self.pixels(F.embedding(ids, self.codebook))

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> VQTokenizer:
        """Load a published ``.pt`` or ``.safetensors`` file; see :func:`arsd.models.llamagen_files.load_vq`."""
        from arsd.models.llamagen_files import load_vq

        return load_vq(path, **options)

    def save_single_file(self, path: str | Path) -> None:
        """Write the upstream layout, ``{"model": state_dict}``."""
        from arsd.models.llamagen_files import save_vq

        save_vq(self, path)
