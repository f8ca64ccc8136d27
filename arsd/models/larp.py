"""LARP's autoregressive video model (arXiv 2410.21264): a stock ``LlamaForCausalLM`` with learned absolute positions.

The codes of a clip are no grid: each of them tells something of the whole clip (:mod:`arsd.tokenizers.larp`). In front of
them stands a class (UCF-101), or the codes of a clip that begins as asked and then stands still, and a separator (frame
prediction, Kinetics-600). Published folders are read by :mod:`arsd.models.larp_files`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from arsd.errors import InputError
from arsd.models.llamagen import attention_bias
from arsd.models.rotary import VolumeRotaryTable


class PositionedLlama(LlamaModel):
    """A Llama that adds a learned vector per slot to what it is fed, and turns nothing.

    Args:
        config: of the stock class.
        slots: how many positions have a vector; those behind (junk slots) read the last one.
    """

    def __init__(self, config: LlamaConfig, slots: int) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(slots, config.hidden_size)
        self.rotary_emb = self.no_rotary()

    def no_rotary(self) -> Any:
        """A table of angles of 0."""
        return VolumeRotaryTable(1, torch.zeros(0, self.config.hidden_size // self.config.num_attention_heads // 2))

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, **options: Any) -> Any:
        """As the stock class, of embeddings [B, T, D] at the absolute slots ``position_ids`` [B, T]."""
        known = self.positions(position_ids.clamp_max(self.positions.num_embeddings - 1))
        return super().forward(inputs_embeds=inputs_embeds + known, position_ids=position_ids, **options)


class LARPTransformer(ModelMixin, ConfigMixin):
    """Autoregressive transformer over the ``num_tokens`` codes of a clip, after the condition slots.

    Args:
        vocab_size: number of codes C.
        hidden_size: model width D.
        num_layers: decoder layers.
        num_heads: attention heads.
        intermediate_size: width F of the gated MLP.
        num_key_value_heads: key/value heads; ``None`` means as many as heads.
        num_tokens: N, codes of a clip.
        condition: ``"class"`` (one slot), or ``"frames"``: N codes of the given frames, and the separator, whose id is C.
        num_classes: number of classes (class only); the null class has this id.
        given_frames: frames that the clips of the training began with (frames only).
        norm_eps: epsilon of the RMS norms.
        sampling: the sampling options published with the weights (fields of :class:`arsd.decoding.LawConfig`).

    Raises:
        InputError: for sizes that do not fit, or another condition.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["LlamaDecoderLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 1280,
        num_layers: int = 30,
        num_heads: int = 20,
        intermediate_size: int = 3584,
        num_key_value_heads: int | None = None,
        num_tokens: int = 1024,
        condition: str = "class",
        num_classes: int = 101,
        given_frames: int = 5,
        norm_eps: float = 1e-5,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if condition not in ("class", "frames"):
            raise InputError(f"condition must be 'class' or 'frames', not {condition!r}")
        if num_heads < 1 or hidden_size % (2 * num_heads):
            raise InputError(f"hidden_size {hidden_size} is no multiple of 2 * {num_heads} heads")
        slots = self.condition_tokens + num_tokens - 1  # the last code is never fed
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_value_heads or num_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=slots + 1,
            rms_norm_eps=norm_eps,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.lm = LlamaForCausalLM(config)
        self.lm.model = PositionedLlama(config, slots)
        if condition == "class":
            self.class_embedding = nn.Embedding(num_classes + 1, hidden_size)
        else:
            self.lm.model.embed_tokens = nn.Embedding(vocab_size + 1, hidden_size)  # and the separator

    @property
    def num_tokens(self) -> int:
        """Codes of a clip."""
        return int(self.config["num_tokens"])

    @property
    def condition_tokens(self) -> int:
        """Condition slots."""
        return 1 if self.config["condition"] == "class" else self.num_tokens + 1

    def embed_classes(self, labels: Tensor) -> Tensor:
        """Condition slots [B, 1, D] of class ids [B]; the null class is ``num_classes``.

        Raises:
            InputError: for a class that the model does not have.
        """
        count = int(self.config["num_classes"])
        if self.config["condition"] != "class":
            raise InputError("this model goes on from frames: leave out class_labels")
        if labels.ndim != 1 or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= count):
            raise InputError(f"class labels must be whole numbers in 0..{count} ({count} is the null class)")
        return self.class_embedding(labels)[:, None]

    def embed_clips(self, codes: Tensor) -> Tensor:
        """Condition slots [B, N + 1, D] of the codes [B, N] of clips that begin as asked.

        Raises:
            InputError: for another shape, codes that there are not, or a model of classes.
        """
        if self.config["condition"] != "frames":
            raise InputError("this model has classes: give class_labels, not frames")
        known = int(self.config["vocab_size"])
        if codes.ndim != 2 or codes.shape[1] != self.num_tokens or int(codes.min()) < 0 or int(codes.max()) >= known:
            raise InputError(f"the codes of given frames must be [B, {self.num_tokens}] below {known}")
        return self.lm.model.embed_tokens(torch.nn.functional.pad(codes, (0, 1), value=known))

    def forward(self, condition: Tensor, ids: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, vocab] of the codes ``ids`` [B, T] after ``condition`` slots [B, P, D]."""
        embeds = torch.cat([condition, self.lm.model.embed_tokens(ids[:, :-1])], dim=1)
        places = torch.arange(embeds.shape[1], device=embeds.device).expand(len(ids), -1)
        out = self.lm.model(
            inputs_embeds=embeds, position_ids=places, attention_mask=attention_bias(embeds), use_cache=False
        )
        return self.lm.lm_head(out.last_hidden_state[:, condition.shape[1] - 1 :])
