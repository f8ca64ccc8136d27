"""The Video-LLM that ships, on its sample: every way to guess gives the text of ``generate``, or plain AR's of the seed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arsd import VideoLLMPipeline
from arsd.models.selection import POLICIES
from arsd.video import read_video

SAMPLE = Path(__file__).parent.parent / "arsd" / "checkpoints" / "emoji-video-chat" / "sample.webp"
QUESTIONS = ("Describe the clip.", "Describe the clip in one sentence.", "What moves?")
NEW, SEED = 40, 7

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@cache
def pipe(dtype: str = "float32") -> VideoLLMPipeline:
    return VideoLLMPipeline.from_pretrained("emoji-video-chat", dtype=dtype)


@cache
def clip(frames: int) -> np.ndarray:
    return read_video(SAMPLE, num_frames=frames)[0]


def answered(decoder: str, rows: int, frames: int, sampled: bool, dtype: str = "float32") -> Any:
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0, "seed": SEED} if sampled else {}
    videos, questions = [clip(frames)] * rows, list(QUESTIONS[:rows])
    return pipe(dtype)(videos, questions, max_new_tokens=NEW, decoder=decoder, **how)


@cache
def plain(rows: int, frames: int, sampled: bool, dtype: str = "float32") -> Tensor:
    return answered("ar", rows, frames, sampled, dtype).tokens


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_plain_ars_text(policy: str, sampled: bool):
    for budget in (8, 64, "all"):
        out = answered(f"std:budget={budget},draft_length=4,policy={policy}", 1, 16, sampled)
        assert torch.equal(out.tokens, plain(1, 16, sampled)), (policy, budget)
        taken = (out.stats.tokens[0] - out.stats.forward_passes) / out.stats.forward_passes
        assert taken > (3.3 if budget == "all" else 0.3), (policy, budget, taken)


@pytest.mark.parametrize("sampled", [False, True])
def test_every_other_way_to_guess_gives_it(sampled: bool):
    for decoder in (
        "prompt-lookup",
        "token-recycling",
        "layer-skip:draft_length=3,skip=0.25",
        "sjd:window=4",
        "ucb-spec",
        "exp3-spec",
    ):
        assert torch.equal(answered(decoder, 1, 16, sampled).tokens, plain(1, 16, sampled)), decoder


def test_plain_ar_is_generate():
    """Greedily, token for token, with the processor's own inputs."""
    out = answered("ar", 1, 16, False)
    inputs = pipe()._prompt(clip(16), QUESTIONS[0], (None, None, None), None)[0]
    theirs = pipe().model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert theirs[0, -out.tokens.shape[1] :].tolist() == out.tokens[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (2, "float32"), (3, "float32"), (2, "float64")])
def test_batches_and_long_clips_too(rows: int, sampled: bool, dtype: str):
    """64 frames, budgets from 8 to all, rows that end at different lengths, all policies."""
    for policy in POLICIES:
        for budget in (8, 128, 1024, "all"):
            out = answered(f"std:budget={budget},draft_length=5,policy={policy}", rows, 64, sampled, dtype)
            assert torch.equal(out.tokens, plain(rows, 64, sampled, dtype)), (policy, budget)
    for decoder in ("token-recycling", "ucb-spec:fade=1.0", "exp3-spec:reproducible=true"):
        assert torch.equal(answered(decoder, rows, 64, sampled, dtype).tokens, plain(rows, 64, sampled, dtype)), decoder
