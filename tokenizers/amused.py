"""aMUSEd's VQGAN (arXiv 2401.01808) as MineWorld has it: taming's network whose middle does not attend, with codes of 64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers looks it up in a component's module
from torch import nn

from arsd.tokenizers.vqgan import VQGANTokenizer


class AmusedTokenizer(VQGANTokenizer):
    """Convolutional autoencoder, see :class:`VQGANTokenizer`; the defaults are MineWorld's tokenizer.

    Args:
        codebook_size: number of codes.
        codebook_dim: dimension of a code.
        latent_channels: channels between the encoder and the 1x1 convolution to ``codebook_dim``.
        block_out_channels: channels per resolution, from the full one down, in multiples of 32.
        layers_per_block: residual blocks per resolution (one more in the decoder).
        attention_levels: indices into ``block_out_channels`` of the resolutions that attend.
        mid_attention: whether the middle attends.

    Raises:
        InputError: for sizes that cannot be built.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 8192,
        codebook_dim: int = 64,
        latent_channels: int = 64,
        block_out_channels: Sequence[int] = (128, 256, 256, 512, 768),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (),
        mid_attention: bool = False,
    ) -> None:
        sizes = (codebook_size, codebook_dim, latent_channels, block_out_channels, layers_per_block, attention_levels)
        super().__init__(*sizes)
        if not mid_attention:
            nothing: list[Any] = [None]  # as diffusers has it where nothing attends
            for part in (self.net.encoder, self.net.decoder):
                part.mid_block.attentions = nn.ModuleList(nothing)

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> AmusedTokenizer:
        """Load a published file; see :func:`arsd.models.mineworld_files.load_vae`."""
        from arsd.models.mineworld_files import load_vae

        return load_vae(path, **options)

    def save_single_file(self, path: str | Path) -> None:
        """Write the upstream layout; see :func:`arsd.models.mineworld_files.save_vae`."""
        from arsd.models.mineworld_files import save_vae

        save_vae(self, path)
