"""What :class:`arsd.VideoLLMPipeline` is made of beside the model: text in pieces, options of a call, folders of models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from arsd.decoding import DecodingStrategy
from arsd.decoding.strategies import STRATEGIES
from arsd.errors import CheckpointError, InputError
from arsd.pipelines.auto import CHECKPOINTS, find_model, shipped_models
from arsd.pipelines.outputs import noise_keys

NOT_NEEDED = ("onnx/*", "*.gguf")  # further copies of the weights, in hub repositories


class Pieces:
    """A streamer that hands on text: each token's own piece as soon as it is whole characters.

    Args:
        tokenizer: that decodes.
        hear: called with each piece; together the pieces are the text of all tokens.
    """

    def __init__(self, tokenizer: Any, hear: Callable[[str], Any]) -> None:
        self.tokenizer, self.hear = tokenizer, hear
        self.ids: list[int] | None = None  # None: the prompt is still to come
        self.start = self.done = 0  # ids from `start` are decoded again, those up to `done` are handed on

    def put(self, value: Tensor) -> None:
        """The prompt, then tokens."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._hand_on(last=False)

    def end(self) -> None:
        """Hand on what is left, and be ready for another prompt."""
        self._hand_on(last=True)
        self.ids, self.start, self.done = None, 0, 0

    def _hand_on(self, last: bool) -> None:
        ids = self.ids or []
        known, now = said(self.tokenizer, ids[self.start : self.done]), said(self.tokenizer, ids[self.start :])
        if len(now) > len(known) and (last or not now.endswith("\N{REPLACEMENT CHARACTER}")):
            self.start, self.done = self.done, len(ids)
            self.hear(now[len(known) :])


def said(tokenizer: Any, ids: Any) -> str:
    """The text of ids, without special tokens, every other character kept."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def shipped_video_llms() -> list[str]:
    """Names of the Video-LLMs that come with the package."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json") if _kind_of(path.parent) in _known())


def find_video_llm(name: str | Path, **hub: Any) -> Path:
    """Where a Video-LLM is: a shipped name, a folder, or a hub id (downloaded).

    Raises:
        CheckpointError: when it is none of them.
    """
    shipped = shipped_video_llms()
    if str(name) in (*shipped, *shipped_models()):  # models of pictures, too: check_kind says what they are
        return CHECKPOINTS / str(name)
    if not Path(name).exists() and str(name).count("/") != 1:
        known = ", ".join(shipped) or "none"
        raise CheckpointError(f"no Video-LLM {str(name)!r}: shipped ones are {known}; else give a folder or hub id")
    return find_model(name, ignore_patterns=list(NOT_NEEDED), **hub)


def _known() -> set[str]:
    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _kind_of(folder: Path) -> str | None:
    """The model type that a folder's config names."""
    try:
        return json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def check_kind(path: Path) -> None:
    """Raise CheckpointError for a folder that is no multimodal model of transformers."""
    kind = _kind_of(path)
    if kind in _known():
        return
    if (path / "model_index.json").is_file():
        raise CheckpointError(f"{path} makes pictures: load it with arsd.AutoARPipeline")
    found = f"is a model of type {kind!r}" if kind else "has no config.json that names a model"
    raise CheckpointError(f"{path} {found}, no Video-LLM: give a folder of transformers with a model and its processor")


def saved_decoder(path: Path) -> DecodingStrategy | None:
    """The decoder that was saved in a folder, or ``None``.

    Raises:
        CheckpointError: when it is damaged.
    """
    file = path / "decoder" / "decoder_config.json"
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_bytes())
        return next(c for c in STRATEGIES.values() if c.__name__ == saved["_class_name"]).from_config(saved)
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise CheckpointError(f"{file} is damaged or names an unknown decoder ({error}): delete it") from error


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda x: isinstance(x, (int, float)) and 0 < x < math.inf,
        "a number above 0 (do_sample=False is greedy)",
    ),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "a whole number of at least 0"),
    "top_p": (lambda x: isinstance(x, (int, float)) and 0 < x <= 1, "a number above 0 and at most 1"),
    "max_new_tokens": (lambda x: isinstance(x, int) and x >= 1, "a whole number of at least 1"),
    "seed": (lambda x: isinstance(x, int) and 0 <= x < 2**63, "a whole number in 0..2^63-1"),
}
OURS = ("custom_generate", "return_dict_in_generate", "num_return_sequences", "num_beams", "assistant_model", "max_length")


def checked_options(
    generator: torch.Generator | None, do_sample: bool, more: dict[str, Any], **given: Any
) -> dict[str, Any]:
    """Options of ``generate``: those ``given`` that are not ``None``, and ``more`` that are not ours to check.

    Raises:
        InputError: for values that do not fit, or two that do not go together.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        fits, what = LIMITS[name]
        if isinstance(value, bool) or not fits(value):
            raise InputError(f"{name} must be {what}, not {value!r}")
        if name in ("temperature", "top_k", "top_p") and not do_sample:
            raise InputError(f"{name} is for drawing tokens: pass do_sample=True, too")
    if taken := [name for name in OURS if name in more]:
        raise InputError(f"{taken[0]} is no option of this call: leave it out")
    if generator is not None:
        if "seed" in given:
            raise InputError("give generator or seed, not both")
        given["seed"] = noise_keys(generator, 1)[0][0]
    return {**given, "do_sample": do_sample, **more}
