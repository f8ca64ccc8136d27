"""EAGLE drafters (arXiv 2401.15077) for image models: one decoder layer that predicts the target's next feature.

At slot t the drafter reads the embedding of the token in slot t and the target's feature (post-norm hidden state) of slot
t - 1, and predicts the feature of slot t; the target's own, frozen head makes logits of it. EAGLE's papers number the
slots by the feature, so that the same pair is called (x_{t+1}, h_t) there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import ChameleonConfig, LlamaConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from arsd.errors import InputError

BLOCKS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaDecoderLayer),
    "chameleon": (ChameleonConfig, ChameleonDecoderLayer),
}


class EagleDrafter(ModelMixin, ConfigMixin):
    """One decoder layer of the target's block type behind ``Linear([embedding, feature])``.

    Head and rotary table are the target's and are not part of this module; nor is the embedding, unless it has its own.

    Args:
        hidden_size: width D of the target.
        num_heads: attention heads.
        intermediate_size: width of the gated MLP.
        num_key_value_heads: key/value heads; ``None`` means as many as heads.
        norm_eps: epsilon of the RMS norms.
        block: ``llama`` or ``chameleon`` (with norms of queries and keys).
        input_norm: whether the layer begins with an RMS norm. EAGLE's and LANTERN's LlamaGen drafters have none, LANTERN's
            Lumina-mGPT drafters do.
        condition_inputs: what stands for the embedding in condition slots: ``embedding``, the condition itself, or
            ``zero-token``, the embedding of token 0 (LANTERN's LlamaGen drafters).
        see_padding: whether padded condition slots are read (LANTERN's LlamaGen drafters do).
        see_first: whether the first condition slot behind the padding is read, although the slot before it, whose feature
            it reads, is padding or none (LANTERN's drafters do not).
        bias: whether the linear layer in front has a bias.
        vocab_size: ids of a frozen embedding of its own; ``None`` reads the target's.
        embed_upscale: factor of the embeddings.

    Raises:
        InputError: for values that make no decoder layer.
    """

    _no_split_modules = ["LlamaDecoderLayer", "ChameleonDecoderLayer"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 1280,
        num_heads: int = 20,
        intermediate_size: int = 3584,
        num_key_value_heads: int | None = None,
        norm_eps: float = 1e-5,
        block: str = "llama",
        input_norm: bool = False,
        condition_inputs: str = "embedding",
        see_padding: bool = False,
        see_first: bool = True,
        bias: bool = True,
        vocab_size: int | None = None,
        embed_upscale: float = 1.0,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise InputError(f"block must be one of {', '.join(BLOCKS)}, not {block!r}")
        if condition_inputs not in ("embedding", "zero-token"):
            raise InputError(f"condition_inputs must be 'embedding' or 'zero-token', not {condition_inputs!r}")
        make_config, make_layer = BLOCKS[block]
        try:
            self.block_config = make_config(
                hidden_size=hidden_size,
                num_hidden_layers=1,
                num_attention_heads=num_heads,
                num_key_value_heads=num_key_value_heads or num_heads,
                intermediate_size=intermediate_size,
                rms_norm_eps=norm_eps,
                attn_implementation="sdpa",
            )
        except Exception as error:  # transformers checks its configurations with errors of their own
            sizes = f"hidden_size {hidden_size!r}, num_heads {num_heads!r}, intermediate_size {intermediate_size!r}"
            raise InputError(f"no decoder layer has {sizes}: {' '.join(str(error).split())[:200]}") from error
        self.embed_tokens: nn.Embedding | None = None
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, hidden_size).requires_grad_(False)
        self.fc = nn.Linear(2 * hidden_size, hidden_size, bias=bias)
        self.layer = make_layer(self.block_config, layer_idx=0)
        if not input_norm:
            self.layer.input_layernorm = nn.Identity()

    @classmethod
    def for_transformer(cls, lm: Any, **options: Any) -> EagleDrafter:
        """A new drafter that fits a transformers decoder with head (``LlamaForCausalLM``, ...).

        Args:
            lm: the target.
            options: more arguments of the class.
        """
        config = lm.config
        block = "chameleon" if config.model_type == "chameleon" else "llama"
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            num_key_value_heads=config.num_key_value_heads,
            norm_eps=config.rms_norm_eps,
            block=block,
            **options,
        )

    def forward(
        self,
        embeds: Tensor,
        features: Tensor,
        mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Any = None,
    ) -> Tensor:
        """Predicted features [B, T, D] of T slots.

        Args:
            embeds: [B, T, D] embeddings of the tokens in these slots, not yet scaled.
            features: [B, T, D] features of the slots before them, the target's own or predicted.
            mask: additive attention mask [B, 1, T, S].
            position_embeddings: cos and sin of the slots, from the target's rotary table.
            cache: a transformers cache of one layer, or ``None``.
        """
        hidden = self.fc(torch.cat([embeds * self.config["embed_upscale"], features], dim=-1))
        out = self.layer(
            hidden,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=position_embeddings,
        )
        return out[0] if isinstance(out, tuple) else out

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> EagleDrafter:
        """Load a drafter that was published with LANTERN; see :func:`arsd.models.eagle_files.load_eagle`."""
        from arsd.models.eagle_files import load_eagle

        return load_eagle(path, **options)

    def save_single_file(self, path: str | Path, *, lm: Any = None) -> None:
        """Write the published layout; see :func:`arsd.models.eagle_files.save_eagle`."""
        from arsd.models.eagle_files import save_eagle

        save_eagle(self, path, lm=lm)
