"""LlamaGen (arXiv 2406.06525): class- and text-conditional image tokens on a stock ``LlamaForCausalLM``.

Nothing of the network is written anew: a Llama with its rotary module replaced by a 2-D table and a small
condition embedder in front *is* LlamaGen. Published ``.pt`` files are read by :mod:`arsd.models.llamagen_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from arsd.errors import InputError
from arsd.models.rotary import GridRotaryTable


class CaptionProjection(nn.Module):
    """Caption features to model width: two bias-free linear layers with tanh-GELU between (upstream's ``cap_proj``)."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_size, bias=False)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[..., in_features] -> [..., hidden_size]."""
        return self.fc2(self.act(self.fc1(features)))


def attention_bias(embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Additive causal mask [B, 1, T, T] of ``embeds`` [B, T, D]; no token attends to padded condition slots.

    Args:
        embeds: the inputs of a decoder.
        attention_mask: [B, P], 0 at padded slots among the first P.
    """
    batch, length = embeds.shape[:2]
    mask = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril().expand(batch, 1, -1, -1)
    if attention_mask is not None:
        keep = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
        keep[:, : attention_mask.shape[1]] = attention_mask.bool()
        mask = (mask & keep[:, None, None]) | torch.eye(length, dtype=torch.bool, device=embeds.device)
    bias = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device)
    return bias.masked_fill_(~mask, torch.finfo(embeds.dtype).min)


class LlamaGenTransformer(ModelMixin, ConfigMixin):
    """Autoregressive transformer over ``grid * grid`` image codes in raster order, after the condition slots.

    Args:
        vocab_size: number of image codes.
        hidden_size: model width D.
        num_layers: decoder layers.
        num_heads: attention heads.
        intermediate_size: width F of the gated MLP.
        num_key_value_heads: key/value heads; ``None`` means as many as heads.
        grid: tokens along one side of the image.
        condition: ``"class"`` (c2i, one condition slot) or ``"text"`` (t2i).
        condition_tokens: condition slots (1 for classes; upstream uses 120 for text).
        caption_dim: width of the caption features (text only).
        num_classes: number of classes (class only); the null class has this id.
        rope_base: base of the rotary table.
        norm_eps: epsilon of the RMS norms.
        condition_keys: whether attention can tell condition slots apart, see :class:`GridRotaryTable` (no published
            checkpoint can).
        sampling: the sampling options published with the weights (fields of :class:`arsd.decoding.LawConfig`), which a
            pipeline uses where a call names none.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["LlamaDecoderLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 2048,
        num_key_value_heads: int | None = None,
        grid: int = 16,
        condition: str = "class",
        condition_tokens: int = 1,
        caption_dim: int = 2048,
        num_classes: int = 1000,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        condition_keys: bool = False,
        sampling: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if condition not in ("class", "text"):
            raise InputError(f"condition must be 'class' or 'text', not {condition!r}")
        self.lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_key_value_heads or num_heads,
                intermediate_size=intermediate_size,
                max_position_embeddings=condition_tokens + grid * grid,
                rms_norm_eps=norm_eps,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        rotary: Any = GridRotaryTable(condition_tokens, grid, hidden_size // num_heads, rope_base, condition_keys)
        self.lm.model.rotary_emb = rotary
        if condition == "class":
            self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        else:
            self.caption_projection = CaptionProjection(caption_dim, hidden_size)
            self.uncond_embedding = nn.Parameter(torch.randn(condition_tokens, caption_dim) / caption_dim**0.5)

    @property
    def num_tokens(self) -> int:
        """Image tokens per picture."""
        return int(self.config["grid"]) ** 2

    def embed_classes(self, labels: Tensor) -> Tensor:
        """Condition slots [B, 1, D] of class ids [B]; the null class is ``num_classes``.

        Raises:
            InputError: for a class that the model does not have.
        """
        count = int(self.config["num_classes"])
        if self.config["condition"] != "class" or labels.ndim != 1:
            raise InputError("class labels must be a 1-D tensor, and the model class-conditional")
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) > count):
            raise InputError(f"class labels must lie in 0..{count} ({count} is the null class)")
        return self.class_embedding(labels)[:, None]

    def embed_captions(self, features: Tensor, mask: Tensor) -> Tensor:
        """Condition slots [B, T, D] of left-padded caption features [B, T, caption_dim] and their mask [B, T].

        Raises:
            InputError: for another shape.
        """
        if self.config["condition"] != "text":
            raise InputError("this model is class-conditional: give class_labels, not a prompt")
        expected = (self.config["condition_tokens"], self.config["caption_dim"])
        if features.ndim != 3 or tuple(features.shape[1:]) != expected or mask.shape != features.shape[:2]:
            raise InputError(f"caption features must be [B, {expected[0]}, {expected[1]}] with a [B, {expected[0]}] mask")
        return self.caption_projection(features * mask[..., None].to(features.dtype))

    def embed_null_caption(self, batch: int) -> Tensor:
        """Condition slots [B, T, D] of the learned null caption."""
        return self.caption_projection(self.uncond_embedding)[None].expand(batch, -1, -1)

    def forward(self, condition: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Teacher-forced logits [B, T, vocab] of the tokens ``ids`` [B, T] after ``condition`` slots [B, P, D].

        Args:
            condition: embedded condition slots.
            ids: all image tokens; the last one is a label only and is not fed.
            attention_mask: [B, P], 0 at padded condition slots, which no token attends to.
        """
        embeds = torch.cat([condition, self.lm.model.embed_tokens(ids[:, :-1])], dim=1)
        position_ids = torch.arange(embeds.shape[1], device=embeds.device)[None]
        bias = attention_bias(embeds, attention_mask)
        hidden = self.lm.model(inputs_embeds=embeds, attention_mask=bias, position_ids=position_ids, use_cache=False)
        return self.lm.lm_head(hidden.last_hidden_state[:, condition.shape[1] - 1 :])

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> LlamaGenTransformer:
        """Load a published ``.pt`` or ``.safetensors`` file; see :func:`arsd.models.llamagen_files.load_transformer`."""
        from arsd.models.llamagen_files import load_transformer

        return load_transformer(path, **options)

    def save_single_file(self, path: str | Path) -> None:
        """Write the upstream layout, ``{"model": state_dict}``."""
        from arsd.models.llamagen_files import save_transformer

        save_transformer(self, path)
