"""Which tokens of a multimodal prompt are pictures: what all Video-LLMs of transformers have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("video_token_id", "video_token_index", "image_token_id", "image_token_index")


def visual_ids(config: Any) -> set[int]:
    """The ids that stand for frames or pictures in ``input_ids``; empty for a model of text.

    Args:
        config: of a whole model. Qwen-VL and LLaVA have an id for videos and one for pictures, SmolVLM and InternVL one for
            both; frames' delimiters are words, and not among them.
    """
    ids = (getattr(config, name, None) for name in NAMES)
    return {i for i in ids if isinstance(i, int)}


def visual_mask(config: Any, input_ids: Tensor) -> Tensor:
    """Where ``input_ids`` (of any shape) are visual: bool, of the same shape.

    Args:
        config: of a whole model.
        input_ids: of its prompt.
    """
    ids = torch.tensor(sorted(visual_ids(config)), dtype=input_ids.dtype, device=input_ids.device)
    return torch.isin(input_ids, ids)


def text_config(model: Any) -> Any:
    """The configuration of a model's language part (layers, heads, positions)."""
    return model.config.get_text_config(decoder=True)
