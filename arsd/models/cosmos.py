"""Cosmos-Predict1's autoregressive video model (arXiv 2501.03575): a stock ``Qwen3ForCausalLM`` with 3-D rotary positions.

A clip is a volume of codes in the order (t, y, x), with nothing between rows or frames. NVIDIA's base models have no
condition but the frames that a clip begins with. With ``caption_dim``, condition slots of a caption stand in front, as
LlamaGen has them: this is how emoji-video is conditioned on text. Published files are read by
:mod:`arsd.models.cosmos_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from arsd.errors import InputError
from arsd.models.llamagen import CaptionProjection, attention_bias
from arsd.models.rotary import VolumeRotaryTable, volume_rotary_angles


class CosmosTransformer(ModelMixin, ConfigMixin):
    """Autoregressive transformer over ``frames * rows * columns`` video codes.

    Args:
        vocab_size: number of codes.
        hidden_size: model width D.
        num_layers: decoder layers.
        num_heads: query heads.
        num_key_value_heads: key/value heads; ``None`` means as many as heads.
        head_dim: channels of a head; ``None`` means ``hidden_size / num_heads``.
        intermediate_size: width F of the gated MLP.
        frames: latent frames of a clip.
        rows: of codes.
        columns: codes per row.
        rope_base: base of the rotary table.
        norm_eps: epsilon of the RMS norms.
        yarn_scale: see :func:`arsd.models.rotary.volume_rotary_angles`.
        yarn_betas: likewise.
        yarn_lengths: likewise.
        condition_tokens: condition slots of a caption; 0 for models without.
        caption_dim: width of the caption features.
        sampling: the sampling options published with the weights (fields of :class:`arsd.decoding.LawConfig`).
        frame_rate: frames per second of the clips that the model was trained on.

    Raises:
        InputError: for sizes that do not fit.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Qwen3DecoderLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 64000,
        hidden_size: int = 4096,
        num_layers: int = 16,
        num_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int | None = 128,
        intermediate_size: int = 14336,
        frames: int = 5,
        rows: int = 40,
        columns: int = 64,
        rope_base: float = 500000.0,
        norm_eps: float = 1e-5,
        yarn_scale: float | None = None,
        yarn_betas: Sequence[float] = (4.0, 1.0),
        yarn_lengths: Sequence[int] = (3, 40),
        condition_tokens: int = 0,
        caption_dim: int | None = None,
        sampling: dict[str, Any] | None = None,
        frame_rate: float = 24.0,
    ) -> None:
        super().__init__()
        if (condition_tokens > 0) != (caption_dim is not None):
            raise InputError("condition_tokens and caption_dim go together: a model has captions, or it has none")
        head_dim = head_dim or hidden_size // num_heads
        self.lm = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_key_value_heads or num_heads,
                head_dim=head_dim,
                intermediate_size=intermediate_size,
                max_position_embeddings=condition_tokens + frames * rows * columns,
                rms_norm_eps=norm_eps,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        rotary: Any = self.rotary_table()
        self.lm.model.rotary_emb = rotary
        if caption_dim is not None:
            self.caption_projection = CaptionProjection(caption_dim, hidden_size)
            self.uncond_embedding = nn.Parameter(torch.randn(condition_tokens, caption_dim) / caption_dim**0.5)

    def rotary_table(self) -> VolumeRotaryTable:
        """The positions of condition slots and codes, made anew: they follow from the configuration alone."""
        config: Any = self.config
        head_dim = config.head_dim or config.hidden_size // config.num_heads
        yarn = config.yarn_scale, tuple(config.yarn_betas), tuple(config.yarn_lengths)
        size = config.frames, config.rows, config.columns, head_dim
        return VolumeRotaryTable(config.condition_tokens, volume_rotary_angles(*size, config.rope_base, *yarn))

    @property
    def num_tokens(self) -> int:
        """Codes of a clip."""
        return int(self.config["frames"] * self.config["rows"] * self.config["columns"])

    def embed_captions(self, features: Tensor, mask: Tensor) -> Tensor:
        """Condition slots [B, T, D] of left-padded caption features [B, T, caption_dim] and their mask [B, T].

        Raises:
            InputError: for another shape, or a model without captions.
        """
        expected = (self.config["condition_tokens"], self.config["caption_dim"])
        if expected[1] is None:
            raise InputError("this model has no captions: it goes on from frames")
        if features.ndim != 3 or tuple(features.shape[1:]) != expected or mask.shape != features.shape[:2]:
            raise InputError(f"caption features must be [B, {expected[0]}, {expected[1]}] with a [B, {expected[0]}] mask")
        return self.caption_projection(features * mask[..., None].to(features.dtype))

    def embed_null_caption(self, batch: int) -> Tensor:
        """Condition slots [B, T, D] of the learned null caption."""
        return self.caption_projection(self.uncond_embedding)[None].expand(batch, -1, -1)

    def forward(self, ids: Tensor, condition: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            ids: [B, T] the first T codes of clips.
            condition: [B, P, D] condition slots, of a model with captions.
            attention_mask: [B, P], 0 at padded condition slots, which no token attends to.

        Returns:
            [B, T, vocab] of codes 0..T-1 where there is a condition (the last code is a label only and is not fed), else
            [B, T, vocab] of codes 1..T.
        """
        embeds = self.lm.model.embed_tokens(ids if condition is None else ids[:, :-1])
        if condition is not None:
            embeds = torch.cat([condition, embeds], dim=1)
        position_ids = torch.arange(embeds.shape[1], device=embeds.device)[None]
        bias = attention_bias(embeds, attention_mask)
        hidden = self.lm.model(inputs_embeds=embeds, attention_mask=bias, position_ids=position_ids, use_cache=False)
        return self.lm.lm_head(hidden.last_hidden_state[:, -ids.shape[1] :])

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> CosmosTransformer:
        """Load a published folder or its ``model.pt``; see :func:`arsd.models.cosmos_files.load_transformer`."""
        from arsd.models.cosmos_files import load_transformer

        return load_transformer(path, **options)

    def save_single_file(self, path: str | Path) -> None:
        """Write the upstream layout; see :func:`arsd.models.cosmos_files.save_transformer`."""
        from arsd.models.cosmos_files import save_transformer

        save_transformer(self, path)
