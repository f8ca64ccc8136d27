"""Tiny pipelines with a drafter."""

from __future__ import annotations

from typing import Any

import torch
from tiny_pipeline import TOKENS, codes, hushed
from torch import Tensor
from torch.nn import functional as F

import arsd
from arsd import EagleDrafter

PROMPTS = ["red apple", "green pear dog face blue heart", "dog face", "blue heart"]  # the second fills its slots


def eagle(pipe: arsd.LlamaGenPipeline, seed: int = 3) -> EagleDrafter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EagleDrafter.for_transformer(pipe.transformer.lm).eval().to(pipe.transformer.dtype)


def drafting(pipe: arsd.LlamaGenPipeline, drafter: Any = None) -> arsd.LlamaGenPipeline:
    pipe.register_modules(drafter=drafter if drafter is not None else eagle(pipe))
    return hushed(pipe)


def inputs(pipe: arsd.LlamaGenPipeline) -> dict[str, Any]:
    return {"prompt": PROMPTS} if pipe.text_encoder is not None else {"class_labels": [0, 1, 2, 3]}


def decoded(pipe: arsd.LlamaGenPipeline) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(tokens, condition, padding, target that has read them all and kept its features)."""
    tokens = codes(pipe, PROMPTS)
    conditions = pipe.encode_inputs(PROMPTS)
    target = pipe.target_maker(conditions)(4, len(PROMPTS))
    target.keep_features()
    with torch.inference_mode():
        target.prefill([-target.unread] * len(tokens), 4)
        for n in range(0, TOKENS, 4):
            lengths = torch.full((len(tokens),), n)
            target.rollback(lengths)
            fed = F.pad(tokens, (1, 0))[:, n : n + 4]
            target.forward(fed, lengths, lengths.tolist())
    return tokens, conditions.condition, conditions.padding, target
