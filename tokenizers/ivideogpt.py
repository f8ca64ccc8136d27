"""iVideoGPT's compressive tokenizer (arXiv 2405.15223): a few context pictures in full, later ones as what changes.

Context pictures have a grid of codes each, as in any VQGAN. A later picture is encoded and decoded under cross-attention to
the features of all context pictures at several resolutions, and has a few codes of a codebook of its own. The networks are
diffusers' encoder and decoder; the cross-attention is added here. Published folders (``tokenizer/``) are read by
:func:`arsd.models.ivideogpt_files.load_ivideogpt_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from arsd.errors import InputError

HEADS = 4  # of the cross-attention


class Codes(nn.Module):
    """A codebook that is searched by Euclidean distance."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., e]."""
        return self.embedding(ids)

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents [..., e] -> ids [...]; distances are taken in float32 at least."""
        dtype = torch.promote_types(latents.dtype, torch.float32)
        distances = torch.cdist(latents.flatten(0, -2).to(dtype), self.embedding.weight.to(dtype))
        return distances.argmin(1).view(latents.shape[:-1])


class CrossAttention(nn.Module):
    """Every place of a picture reads all places of all context pictures; places have learned positions.

    Args:
        channels: of the features.
        side: places along one side.
        pictures: c, context pictures.
        groups: of the group normalisations.
    """

    def __init__(self, channels: int, side: int, pictures: int, groups: int) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.kv_norm, self.q_norm = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.kv_pos_emb = nn.Parameter(torch.zeros(pictures * side**2, channels))
        self.q_pos_emb = nn.Parameter(torch.zeros(side**2, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Features [B, C, h, w] and those of the context [B, c, C, h, w] -> [B, C, h, w]."""
        kv = self.kv_norm(context.transpose(1, 2).flatten(2)).transpose(1, 2) + self.kv_pos_emb
        q = self.q_norm(x).flatten(2).transpose(1, 2) + self.q_pos_emb
        seen, _ = self.att(q, kv, kv, need_weights=False)
        return F.silu(x + seen.transpose(1, 2).reshape(x.shape))


class _Attending:
    """What encoder and decoder share: cross-attention behind those of their levels that are small enough."""

    attends: list[bool]
    cross_att_blocks: nn.ModuleList

    def _add_attention(self, widths: Sequence[int], sides: Sequence[int], largest: int, pictures: int, groups: int) -> None:
        self.attends = [side <= largest for side in sides]
        levels = zip(widths, sides, self.attends, strict=True)
        self.cross_att_blocks = nn.ModuleList(CrossAttention(w, s, pictures, groups) for w, s, near in levels if near)

    def _through(self, x: Tensor, blocks: Sequence[nn.Module], context: Sequence[Tensor]) -> Tensor:
        attentions = iter(self.cross_att_blocks)
        for block, near, features in zip(blocks, self.attends, context, strict=True):
            x = block(x)
            x = next(attentions)(x, features) if near else x
        return x


class ContextEncoder(Encoder):
    """diffusers' encoder, which also gives its features."""

    def forward(self, sample: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 3, H, W] to latents [B, z, h, w] and the features behind each level."""
        x, features = self.conv_in(sample), []
        for block in self.down_blocks:
            x = block(x)
            features.append(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x)))), features


class ContextDecoder(Decoder):
    """diffusers' decoder, which also gives its features."""

    def forward(self, sample: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, z, h, w] to pictures [B, 3, H, W] and the features behind the middle and behind each level."""
        x, features = self.conv_in(sample), []
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
            features.append(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x))), features


class DynamicsEncoder(_Attending, Encoder):
    """diffusers' encoder under cross-attention to the context.

    Args:
        sides: places along one side behind each level.
        largest: of those that attend.
        pictures: context pictures.
        options: of the stock class.
    """

    def __init__(self, sides: Sequence[int], largest: int, pictures: int, **options: Any) -> None:
        super().__init__(**options)
        self._add_attention(options["block_out_channels"], sides, largest, pictures, options["norm_num_groups"])

    def forward(self, sample: Tensor, context: Sequence[Tensor]) -> Tensor:
        """[B, 3, H, W] and features of the context [B, c, C, h, w] behind each level to latents [B, z, h, w]."""
        x = self._through(self.conv_in(sample), list(self.down_blocks), context)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class DynamicsDecoder(_Attending, Decoder):
    """diffusers' decoder under cross-attention to the context, in the middle too.

    Args:
        sides: places along one side in the middle, and behind each level.
        largest: of those that attend.
        pictures: context pictures.
        options: of the stock class.
    """

    def __init__(self, sides: Sequence[int], largest: int, pictures: int, **options: Any) -> None:
        super().__init__(**options)
        widths = options["block_out_channels"][::-1]
        self._add_attention((widths[0], *widths), sides, largest, pictures, options["norm_num_groups"])

    def forward(self, sample: Tensor, context: Sequence[Tensor]) -> Tensor:
        """[B, z, h, w] and features of the context [B, c, C, h, w], as :class:`ContextDecoder` gives, to [B, 3, H, W]."""
        x = self._through(self.conv_in(sample), [self.mid_block, *self.up_blocks], context)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class IVideoGPTTokenizer(ModelMixin, ConfigMixin):
    """Clips of square pictures, of which the first ``context_length`` are context, to codes and back.

    The names of the arguments and parameters are the published ones.

    Args:
        block_out_channels: channels per resolution, from the full one down; ``len - 1`` halvings.
        layers_per_block: residual blocks per resolution (one more in the decoders).
        latent_channels: z, channels between the networks and the codes.
        norm_num_groups: groups of the group normalisations.
        num_vq_embeddings: codes of context pictures.
        num_dyn_embeddings: codes of later pictures.
        vq_embed_dim: dimension of a code; ``None``: ``latent_channels``.
        mid_block_add_attention: whether the networks of context pictures attend to themselves in the middle.
        context_length: c, context pictures.
        max_att_resolution: the largest side of features that attend to those of the context.
        resolution: pixels along one side.
        patch_size: latents along one side of what one code of a later picture tells.

    Raises:
        InputError: for sizes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 256, 256, 512, 768),
        layers_per_block: int = 2,
        latent_channels: int = 64,
        norm_num_groups: int = 32,
        num_vq_embeddings: int = 8192,
        num_dyn_embeddings: int = 8192,
        vq_embed_dim: int | None = None,
        mid_block_add_attention: bool = False,
        context_length: int = 2,
        max_att_resolution: int = 32,
        resolution: int = 256,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        widths, factor = tuple(block_out_channels), 2 ** (len(block_out_channels) - 1)
        if not widths or any(width % norm_num_groups or width % HEADS for width in widths):
            raise InputError(f"block_out_channels must be multiples of {norm_num_groups} groups, not {list(widths)}")
        self.side = resolution // factor
        if resolution % (factor * patch_size) or not 0 < self.side <= max_att_resolution or context_length < 1:
            what = f"{resolution} pixels, context_length {context_length}, max_att_resolution {max_att_resolution}"
            raise InputError(f"{what}: it needs whole patches of {factor * patch_size} pixels, and a context that is read")
        down = [resolution // 2 ** min(level + 1, len(widths) - 1) for level in range(len(widths))]
        up = [self.side * 2 ** min(level + 1, len(widths) - 1) for level in range(len(widths))]
        shared: dict[str, Any] = {"block_out_channels": widths, "layers_per_block": layers_per_block}
        shared |= {"norm_num_groups": norm_num_groups}
        read: dict[str, Any] = shared | {"down_block_types": ("DownEncoderBlock2D",) * len(widths), "double_z": False}
        read |= {"out_channels": latent_channels}
        paint: dict[str, Any] = shared | {"up_block_types": ("UpDecoderBlock2D",) * len(widths)}
        paint |= {"in_channels": latent_channels}
        near = max_att_resolution, context_length
        self.encoder = ContextEncoder(**read, mid_block_add_attention=mid_block_add_attention)
        self.decoder = ContextDecoder(**paint, mid_block_add_attention=mid_block_add_attention)
        self.cond_encoder = DynamicsEncoder(down, *near, **read)
        self.cond_decoder = DynamicsDecoder([self.side, *up], *near, **paint)
        dim, patch = vq_embed_dim or latent_channels, latent_channels * patch_size**2
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent_channels, dim, 1), nn.Conv2d(dim, latent_channels, 1)
        self.quant_linear, self.post_quant_linear = nn.Linear(patch, dim), nn.Linear(dim, patch)
        self.quantize, self.dynamics_quantize = Codes(num_vq_embeddings, dim), Codes(num_dyn_embeddings, dim)

    @property
    def context_length(self) -> int:
        """Context pictures."""
        return int(self.config["context_length"])

    @property
    def downsample_factor(self) -> int:
        """Pixels along one side of a code of a context picture."""
        return int(self.config["resolution"]) // self.side

    @property
    def patches(self) -> int:
        """Codes along one side of a later picture."""
        return self.side // int(self.config["patch_size"])

    @property
    def codebook(self) -> Tensor:
        """The vectors [C + C', e] of the codes of context pictures, and behind them those of later ones."""
        return torch.cat([self.quantize.embedding.weight, self.dynamics_quantize.embedding.weight])

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Codes [B, c * side^2 + (T - c) * patches^2] of clips [B, T, 3, H, W] in [-1, 1], of at least c pictures.

        Picture by picture, row by row; those of later pictures are counted from C on, as in :attr:`codebook`.

        Raises:
            InputError: for clips of another size.
        """
        size, first = int(self.config["resolution"]), self.context_length
        if clips.ndim != 5 or not len(clips) or clips.shape[1] < first or tuple(clips.shape[2:]) != (3, size, size):
            raise InputError(f"clips must be [B, {first} or more, 3, {size}, {size}], not {tuple(clips.shape)}")
        unit = (clips.to(self.dtype) + 1) / 2
        latents, features = self.encoder(unit[:, :first].flatten(0, 1))
        codes = self.quantize.nearest(self.quant_conv(latents).permute(0, 2, 3, 1))
        parts = [codes.view(len(clips), -1)]
        if later := clips.shape[1] - first:
            d = self.cond_encoder(unit[:, first:].flatten(0, 1), self._repeated(features, later))
            patch = int(self.config["patch_size"])
            d = d.unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3)
            found = self.dynamics_quantize.nearest(self.quant_linear(d))
            parts.append(found.view(len(clips), -1) + int(self.config["num_vq_embeddings"]))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Clips [B, T, 3, H, W] of codes as :meth:`encode` gives them, nominally in [-1, 1] and not clamped.

        Raises:
            InputError: when these are no such codes.
        """
        first, known = self.context_length, int(self.config["num_vq_embeddings"])
        context, each = first * self.side**2, self.patches**2
        later, rest = divmod(codes.shape[-1] - context, each) if codes.ndim == 2 else (-1, 0)
        if later < 0 or rest or not len(codes) or codes.dtype not in (torch.int32, torch.int64):
            raise InputError(f"codes must be [B, {context} + a multiple of {each}] whole numbers, not {tuple(codes.shape)}")
        shown, changes = codes[:, :context], codes[:, context:] - known
        for name, part, count in (("context", shown, known), ("later", changes, int(self.config["num_dyn_embeddings"]))):
            if part.numel() and (int(part.min()) < 0 or int(part.max()) >= count):
                raise InputError(f"codes of {name} pictures lie outside their {count}")
        vectors = self.quantize(shown).view(-1, self.side, self.side, self._dim).permute(0, 3, 1, 2)
        frames, features = self.decoder(self.post_quant_conv(vectors))
        parts = [frames.unflatten(0, (len(codes), first))]
        if later:
            patch = int(self.config["patch_size"])
            d = self.post_quant_linear(self.dynamics_quantize(changes).view(-1, each, self._dim))
            d = d.unflatten(1, (self.patches, self.patches)).unflatten(-1, (patch, patch, -1))
            d = d.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
            frames = self.cond_decoder(d, self._repeated(features, later))
            parts.append(frames.unflatten(0, (len(codes), later)))
        return 2 * torch.cat(parts, dim=1) - 1

    @property
    def _dim(self) -> int:
        return self.quantize.embedding.embedding_dim

    def _repeated(self, features: Sequence[Tensor], later: int) -> list[Tensor]:
        """Features [B * c, C, h, w] of the context as [B * later, c, C, h, w]."""
        return [x.unflatten(0, (-1, self.context_length)).repeat_interleave(later, dim=0) for x in features]
