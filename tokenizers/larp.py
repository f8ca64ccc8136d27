"""LARP's video tokenizer (arXiv 2410.21264): clips to a sequence of codes that is no grid, and back.

Vision transformers on both sides. The encoder reads the patches of a clip and as many learned queries as there are codes,
and each query becomes a code on the unit sphere; the decoder reads the codes and a query for each patch. So every code
tells something of the whole clip, and their order is that in which a language model writes them. Published folders are read
by :func:`arsd.models.larp_files.load_larp_tokenizer`.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from arsd.errors import InputError


class Attention(nn.Module):
    """Self-attention of every slot to every slot; queries, keys and values without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A layer of a vision transformer (arXiv 2010.11929), normalised in front of its parts."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LARPTokenizer(ModelMixin, ConfigMixin):
    """Clips of ``frames`` pictures of ``size`` x ``size`` pixels to ``num_tokens`` codes, and back.

    Args:
        codebook_size: number of codes.
        codebook_dim: dimension of a code.
        num_tokens: N, codes of a clip.
        size: pixels along one side.
        frames: T, pictures of a clip.
        patch_size: pixels along one side of a patch.
        frame_patch_size: pictures of a patch.
        encoder_size: width of the encoder.
        decoder_size: width of the decoder.
        encoder_layers: of the encoder.
        decoder_layers: of the decoder.
        encoder_heads: attention heads of the encoder.
        decoder_heads: attention heads of the decoder.
        norm_eps: epsilon of the norms in the blocks. No file tells it: upstream takes that of the timm that is installed,
            which was 1e-5 when the weights were published, and is 1e-6 in later ones.

    Raises:
        InputError: for sizes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        num_tokens: int = 1024,
        size: int = 128,
        frames: int = 16,
        patch_size: int = 8,
        frame_patch_size: int = 4,
        encoder_size: int = 768,
        decoder_size: int = 768,
        encoder_layers: int = 12,
        decoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_heads: int = 12,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if size % patch_size or frames % frame_patch_size or encoder_size % encoder_heads or decoder_size % decoder_heads:
            raise InputError("patches must divide the clip, and heads the widths")
        patch = (frame_patch_size, patch_size, patch_size)
        self.grid = (frames // frame_patch_size, size // patch_size, size // patch_size)
        count = self.grid[0] * self.grid[1] * self.grid[2]
        self.patches = nn.Conv3d(3, encoder_size, patch, patch)
        self.encoder = nn.ModuleList(Block(encoder_size, encoder_heads, norm_eps) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(Block(decoder_size, decoder_heads, norm_eps) for _ in range(decoder_layers))
        self.patch_positions = nn.Parameter(0.02 * torch.randn(count, encoder_size))
        self.queries = nn.Parameter(0.02 * torch.randn(num_tokens, encoder_size))
        self.code_positions = nn.Parameter(0.02 * torch.randn(num_tokens, decoder_size))
        self.patch_queries = nn.Parameter(0.02 * torch.randn(count, decoder_size))
        self.to_code = nn.Linear(encoder_size, codebook_dim)
        self.codes = nn.Embedding(codebook_size, codebook_dim)
        self.from_code = nn.Linear(codebook_dim, decoder_size)
        self.norm = nn.LayerNorm(decoder_size, 1e-6)
        self.to_pixels = nn.Linear(decoder_size, 3 * frame_patch_size * patch_size**2)

    @property
    def downsample_factor(self) -> int:
        """Pixels along one side of a patch."""
        return int(self.config["patch_size"])

    @property
    def codebook(self) -> Tensor:
        """The codes as they are used: [codebook_size, codebook_dim], rows of length 1."""
        return F.normalize(self.codes.weight, dim=-1)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Code ids [B, N] of clips [B, 3, T, H, W] in [-1, 1]: of each query the nearest code on the sphere.

        Upstream's sampling script draws the codes of given frames at temperature 0.03 instead; its training takes the
        nearest, as here.

        Raises:
            InputError: for clips of another size.
        """
        shape = (3, self.config["frames"], self.config["size"], self.config["size"])
        if clips.ndim != 5 or not len(clips) or tuple(clips.shape[1:]) != shape:
            raise InputError(f"clips must be [B, {', '.join(map(str, shape))}], not {tuple(clips.shape)}")
        x = self.patches((clips.to(self.dtype) + 1) / 2).flatten(2).transpose(1, 2) + self.patch_positions
        x = torch.cat([x, self.queries.expand(len(x), -1, -1)], dim=1)
        for block in self.encoder:
            x = block(x)
        latents = self.to_code(x[:, -len(self.queries) :])
        exact = torch.promote_types(self.dtype, torch.float32)  # half precision would see ties
        return (F.normalize(latents.to(exact), dim=-1) @ F.normalize(self.codes.weight.to(exact), dim=-1).T).argmax(-1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] of code ids [B, N], nominally in [-1, 1] and not clamped.

        Raises:
            InputError: when these are no codes.
        """
        fits = ids.ndim == 2 and len(ids) and ids.shape[1] == len(self.queries) and ids.dtype in (torch.int32, torch.int64)
        if not fits or int(ids.min()) < 0 or int(ids.max()) >= self.codes.num_embeddings:
            raise InputError(f"ids must be [B, {len(self.queries)}] whole numbers from 0 to {self.codes.num_embeddings - 1}")
        x = self.from_code(F.normalize(self.codes(ids), dim=-1)) + self.code_positions
        x = torch.cat([x, self.patch_queries.expand(len(x), -1, -1)], dim=1)
        for block in self.decoder:
            x = block(x)
        x = self.to_pixels(self.norm(x[:, -len(self.patch_queries) :]))
        side, depth = self.config["patch_size"], self.config["frame_patch_size"]
        x = x.unflatten(1, self.grid).unflatten(-1, (depth, side, side, 3))  # [B, t, h, w, depth, side, side, 3]
        clips = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        return 2 * clips - 1
